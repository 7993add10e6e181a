"""Run."""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sft.cli import InputError, log, plural
from sft.data.dataset import (
    Batch,
    Example,
    SFTDataset,
    epoch_order,
    load_datasets,
    packed_batch,
    padded_batch,
    warn_about_leaks,
    warn_about_rows,
)
from sft.data.prompt import pad_token_id
from sft.data.rows import factual_rows, read_rows
from sft.files import sha256, write_json
from sft.options import TrainConfig
from sft.training.report import best_epoch

CPU_TOKENS = (
    800  # in one forward pass on a CPU: its matrix products gain little from more, and memory grows with them
)


# What may differ between a run and the run that goes on from its checkpoint; all else changes the mathematics
MAY_CHANGE = {
    "train_csv",  # their SHA-256 sums and that of the base weights stand for these
    "val_csv",
    "model_name",
    "device",
    "dtype",  # the dtype it comes down to counts
    "num_epochs",
    "output_dir",
    "save_steps",
    "resume",
    "overwrite",
    "keep_checkpoints",
    "dry_run",
    "report_to",
    "shard_base",
    "gradient_checkpointing",
    "early_stopping_patience",
}


@dataclass
class Progress:
    """Where a run stands: with the weights and the optimizer's state, all that a checkpoint needs."""

    step: int = 0  # updates done
    micro_batch_size: int = 0  # rows in one forward pass: batch_size, or less after memory ran out
    untrained_val_loss: float | None = None
    epochs: list[dict] = field(default_factory=list)  # as in training_stats.json
    kept_epoch: int = 0  # the one that is or would be final_model
    # sums over the epoch under way
    loss_sum: float = 0.0
    n_tokens: int = 0
    n_target_tokens: int = 0
    seconds: float = 0.0
    skipped_updates: int = 0  # float16 overflows

    def add(self, metrics: dict, seconds: float) -> None:
        self.step = metrics["step"]
        self.loss_sum += metrics["loss"] * metrics["n_target_tokens"]
        self.n_tokens += metrics["n_tokens"]
        self.n_target_tokens += metrics["n_target_tokens"]
        self.seconds += seconds

    def end_epoch(self, epoch: int, val_loss: float, learning_rate: float, peak_memory_mb: float) -> None:
        self.epochs.append(
            {
                "epoch": epoch,
                "train_loss": self.loss_sum / self.n_target_tokens,
                "val_loss": val_loss,
                "learning_rate": learning_rate,
                "train_seconds": self.seconds,
                "n_tokens": self.n_tokens,
                "n_target_tokens": self.n_target_tokens,
                "tokens_per_second": self.n_tokens / self.seconds,
                "peak_memory_mb": peak_memory_mb,
            }
        )
        self.kept_epoch = best_epoch(self.epochs)["epoch"]
        self.loss_sum, self.n_tokens, self.n_target_tokens, self.seconds = 0.0, 0, 0, 0.0

    def out_of_patience(self, patience: int) -> bool:
        """Whether the epochs since the best one are `patience` or more (0: never), asked at the end of an epoch."""
        return bool(
            patience and self.epochs and len(self.epochs) - best_epoch(self.epochs)["epoch"] >= patience
        )


@dataclass(frozen=True)
class Plan:
    """Which rows each update of each process takes."""

    n_examples: int
    batch_size: int
    gradient_accumulation_steps: int
    n_processes: int
    num_epochs: int
    seed: int

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.n_processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.n_examples / self.rows_per_step)  # the last, short group counts too

    @property
    def total_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch

    def rows(self, step: int) -> tuple[int, ...]:
        """The examples of update `step` (0-based) over all processes."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.rows_per_step
        return epoch_order(self.n_examples, self.seed, epoch)[start : start + self.rows_per_step]

    def micro_batches(
        self, examples: list[Example], process: int, max_rows: int, max_tokens: int | None, padded: bool
    ) -> list[list]:
        """The share of an update's `examples` that one process takes, by forward pass: at most `max_rows` each, about
        `max_tokens`, alike in size. Every process gets as many passes; where examples are few, some are empty."""
        ordered = sorted(examples, key=lambda example: -example.n_tokens)
        n_tokens = (
            len(ordered) * ordered[0].n_tokens if padded else sum(example.n_tokens for example in ordered)
        )
        n = min(
            len(ordered),
            max(math.ceil(len(ordered) / max_rows), math.ceil(n_tokens / (max_tokens or n_tokens))),
        )
        batches = [[] for _ in range(math.ceil(n / self.n_processes) * self.n_processes)]
        for i, example in enumerate(ordered):
            if padded:  # beside others of its length
                batches[i * len(batches) // len(ordered)].append(example)
            else:
                min(
                    batches, key=lambda batch: (len(batch) >= max_rows, sum(e.n_tokens for e in batch))
                ).append(example)
        return batches[process :: self.n_processes]


def timed(work: Callable) -> tuple[float, object]:
    """(seconds that `work()` took, what it returned)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


@dataclass
class Run:
    """All that the loop works with."""

    config: TrainConfig
    accelerator: object
    model: object  # PeftModel
    wrapped: object  # the same, as accelerate wraps it for several processes
    tokenizer: object
    train_set: SFTDataset
    val_set: SFTDataset
    make_batch: Callable[[list[Example]], Batch]
    padded: bool  # what make_batch makes; else packed rows
    max_tokens: int | None  # in one forward pass, about
    plan: Plan
    parameters: list  # the trainable ones
    optimizer: object
    scaler: object  # of float16 losses; does nothing for other dtypes
    base_name: str
    sft_config: dict
    identity: dict  # what a run that goes on from a checkpoint must share with the run that wrote it
    progress: Progress
    signals: list[int] = field(default_factory=list)  # SIGTERM or Ctrl-C, once it has come

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def micro_batches(self, examples: list[Example], process: int) -> list[list[Example]]:
        rows, tokens = self.progress.micro_batch_size, self.max_tokens
        if tokens and rows < self.config.batch_size:  # memory ran out
            tokens = math.ceil(tokens * rows / self.config.batch_size)
        return self.plan.micro_batches(examples, process, rows, tokens, self.padded)

    def say(self, message: str = "") -> None:
        if self.accelerator.is_main_process:
            log(message)

    def peak_memory_mb(self) -> float:
        from sft.model.base import peak_memory_mb

        return peak_memory_mb(self.accelerator.device)

    def write_metrics(self, metrics: dict) -> None:
        if self.accelerator.is_main_process:
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
        if self.config.report_to != "none":
            self.accelerator.log(
                {key: value for key, value in metrics.items() if key != "step" and value is not None},
                metrics["step"],
            )

    def stats(self) -> dict:
        trainable, total = self.model.get_nb_trainable_parameters()
        return {
            "untrained_val_loss": self.progress.untrained_val_loss,
            "kept_epoch": self.progress.kept_epoch,
            "epochs": self.progress.epochs,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "device": str(self.accelerator.device),
            "skipped_updates": self.progress.skipped_updates,
        }

    def write_stats(self) -> None:
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "training_stats.json", self.stats())


def set_up(config: TrainConfig) -> Run:
    """Everything before the first update: checked files, model, data, optimizer, and the checkpoint with --resume."""
    from sft.training.checkpoint import TOKEN_CACHE, check_output_dir, restore, start_fresh

    output_dir = Path(config.output_dir)
    checkpoint = (
        None
        if config.dry_run
        else check_output_dir(output_dir, resume=config.resume, overwrite=config.overwrite)
    )
    if config.report_to != "none" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise InputError("--report_to tensorboard: the package is not installed", "pip install tensorboardX")
    if config.use_8bit + config.use_4bit + config.shard_base > 1:
        raise InputError("--use_8bit, --use_4bit and --shard_base exclude each other", "choose one")
    if "true" in (os.environ.get("ACCELERATE_USE_DEEPSPEED"), os.environ.get("ACCELERATE_USE_FSDP")):
        raise InputError(
            "accelerate's FSDP and DeepSpeed do not fit this loop",
            "accelerate launch --multi_gpu, and --shard_base",
        )
    rows = read_rows(config.train_csv), read_rows(config.val_csv)
    for part, path in zip(rows, (config.train_csv, config.val_csv)):
        factual_rows(part, path)

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from sft.model.adapter import add_lora, set_gradient_checkpointing, shard_base
    from sft.model.attention import enable_packing
    from sft.model.base import (
        base_weights_sha256,
        is_local,
        load_base_model,
        load_tokenizer,
        pick_device,
        portable_name,
        resolve_model,
    )
    from sft.model.kernels import use_frozen_kernels

    placement = pick_device(config.device, config.dtype)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # one process may be downloading a model
    accelerator = Accelerator(
        cpu=placement.device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[patience],
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=output_dir,
    )
    accelerator.gradient_accumulation_steps = (
        1  # accumulation is ours; accelerate's division (set by the environment) is not wanted
    )
    say = log if accelerator.is_main_process else lambda message: None
    if (
        os.environ.get("ACCELERATE_USE_CPU") == "True"
        and "MASTER_PORT" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        log(
            "warning: accelerate launch --cpu starts one process alone; for more use torchrun --nproc_per_node"
        )
    say(f"Device: {accelerator.device}, {str(placement.dtype).removeprefix('torch.')} ({placement.why})")
    with accelerator.main_process_first():  # one process converts or downloads the base model
        base_folder = resolve_model(config.model_name)
        base_weights = base_weights_sha256(base_folder)
    tokenizer = load_tokenizer(base_folder)
    quantization = "8bit" if config.use_8bit else "4bit" if config.use_4bit else None
    sharded = config.shard_base and accelerator.num_processes > 1
    if config.shard_base and not sharded:
        say("--shard_base: there is one process, so nothing to split")
    device = torch.device("cpu") if sharded else accelerator.device
    model = load_base_model(base_folder, device, placement.dtype, quantization)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if config.max_length > longest:
        raise InputError(
            f"--max_length {config.max_length}: {config.model_name} takes {longest} tokens at most",
            f"--max_length {longest}",
        )
    model = add_lora(
        model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        seed=config.seed,
    )
    if sharded:
        shard_base(model, accelerator.device, accelerator.num_processes)
    else:
        use_frozen_kernels(model)
    packed, _ = enable_packing(model, config.max_length)
    padding = pad_token_id(tokenizer)
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model, True)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    # Tokenised last: its cache is the first thing written, once all else is known to be right
    options = {name: getattr(config, name) for name in ("max_length", "instruction", "sentence_numbering")}
    with accelerator.main_process_first():  # one process tokenises, the others read its cache
        cache_dir = None if config.dry_run else output_dir / TOKEN_CACHE
        train_set, val_set = load_datasets(
            config.train_csv, config.val_csv, tokenizer, rows=rows, cache_dir=cache_dir, **options
        )
    if accelerator.is_main_process:
        warn_about_rows(config.train_csv, rows[0], train_set)
        warn_about_rows(config.val_csv, rows[1], val_set)
        warn_about_leaks(*rows)

    hashes = {
        "train_csv": sha256(Path(config.train_csv)),
        "val_csv": sha256(Path(config.val_csv)),
        "base_weights": base_weights,
    }
    n_processes = accelerator.num_processes
    run = Run(
        config=config,
        accelerator=accelerator,
        model=model,
        wrapped=model if sharded else accelerator.prepare_model(model),
        tokenizer=tokenizer,
        train_set=train_set,
        val_set=val_set,
        make_batch=packed_batch if packed else lambda examples: padded_batch(examples, padding),
        padded=not packed,
        max_tokens=config.max_tokens_per_batch or (CPU_TOKENS if accelerator.device.type == "cpu" else None),
        plan=Plan(
            len(train_set),
            config.batch_size,
            config.gradient_accumulation_steps,
            n_processes,
            config.num_epochs,
            config.seed,
        ),
        parameters=parameters,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=placement.dtype == torch.float16),
        base_name=portable_name(config.model_name, base_folder),
        sft_config=describe_run(config, rows, (train_set, val_set), str(placement.dtype), hashes)
        | {"base_model_is_local": is_local(config.model_name)},
        identity={k: v for k, v in asdict(config).items() if k not in MAY_CHANGE}
        | {"n_processes": n_processes, "base_dtype": str(placement.dtype), "packed": packed}
        | hashes,
        progress=Progress(),
    )
    describe_plan(run, quantization, packed, sum(row.label == "hallucinated" for row in rows[0]))
    run.progress.micro_batch_size = config.batch_size
    if config.dry_run:
        return run
    if checkpoint:
        restore(run, checkpoint)
    elif accelerator.is_main_process:
        if config.resume:
            say("The earlier run was interrupted before its first checkpoint: starting anew")
        start_fresh(output_dir)
    accelerator.wait_for_everyone()
    if config.report_to != "none":
        numbers = {
            name: value for name, value in asdict(config).items() if isinstance(value, int | float)
        }  # no text, no paths
        accelerator.init_trackers("sft_tracker", numbers)
    return run


def describe_run(
    config: TrainConfig, rows, datasets: tuple[SFTDataset, SFTDataset], dtype: str, hashes: dict[str, str]
) -> dict:
    """sft_config.json: what inference needs to rebuild the prompt, and where the adapter comes from. No text, no absolute path."""
    counts = {
        name: {
            "factual": sum(row.label == "factual" for row in part),
            "hallucinated": sum(row.label == "hallucinated" for row in part),
            "used": len(dataset),
            "shortened": len(dataset.shortened),
            "refused": len(dataset.refused),
        }
        for name, part, dataset in zip(("train", "validation"), rows, datasets)
    }
    training = {
        k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v
        for k, v in asdict(config).items()
    }
    packages = [
        name for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes") if find_spec(name)
    ]
    return {
        "format_version": 1,
        "prompt": asdict(datasets[0].encoder.template),
        "max_length": config.max_length,
        "training": training | {"dtype": dtype.removeprefix("torch.")},
        "rows": counts,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "sha256": hashes,
    }


def describe_plan(run: Run, quantization: str | None, packed: bool, n_hallucinated: int) -> None:
    config, plan = run.config, run.plan
    trainable, total = run.model.get_nb_trainable_parameters()
    padded = "" if packed else "; padded batches, since it takes no packed rows"
    run.say(f"Base model: {config.model_name}{f', {quantization}' if quantization else ''}{padded}")
    run.say(
        f"LoRA: r={config.lora_r}, alpha={config.lora_alpha:g}; {trainable:,} of {total:,} parameters train ({trainable / total:.2%})"
    )
    run.say(
        f"Data: {len(run.train_set):,} training rows, {len(run.val_set):,} validation rows; {n_hallucinated:,} hallucinated rows kept for Stage B"
    )
    run.say(
        f"Plan: {plural(plan.total_steps, 'update')} in {plural(config.num_epochs, 'epoch')}, {plan.rows_per_step} rows each (batch {config.batch_size}"
        f" x accumulation {config.gradient_accumulation_steps} x processes {plan.n_processes})"
    )
