"""A training run: which rows each step takes, how far it is, what it works with, and its set-up."""

import functools
import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from peft import PeftModel

from sft.cli import InputError, log
from sft.data.dataset import (
    Batch,
    Example,
    SFTDataset,
    load_datasets,
    log_data_warnings,
    packed_batch,
    padded_batch,
)
from sft.data.prompt import pad_token_id
from sft.data.rows import Row
from sft.files import FORMAT_VERSION, sha256, write_json
from sft.model.adapter import add_lora, set_gradient_checkpointing, shard_base
from sft.model.attention import enable_packing
from sft.model.base import (
    Placement,
    base_weights_sha256,
    is_local,
    load_base_model,
    load_tokenizer,
    peak_memory_mb,
    pick_device,
    portable_name,
    resolve_model,
)
from sft.model.kernels import use_frozen_kernels
from sft.options import CPU_TOKENS_PER_PASS, TrainConfig, quantization_of
from sft.training.report import best_epoch

# ------------------------------------------------------------------------------- the plan


@functools.lru_cache(maxsize=2)
def epoch_order(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the examples in `epoch` (0-based): a permutation that depends on `seed` and `epoch`
    alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(n_examples, generator=generator).tolist())


@dataclass(frozen=True)
class Plan:
    """Which rows each step of each process takes."""

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
        # The last, short group counts too
        return math.ceil(self.n_examples / self.rows_per_step)

    @property
    def total_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch

    def rows(self, step: int) -> tuple[int, ...]:
        """The examples of `step` (0-based) over all processes."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.rows_per_step
        return epoch_order(self.n_examples, self.seed, epoch)[start : start + self.rows_per_step]

    def split_rows(
        self, examples: list[Example], process: int, max_rows: int, max_tokens: int | None, padded: bool
    ) -> list[list[Example]]:
        """The forward passes of one process over its share of a step's `examples`.

        At most `max_rows` rows and about `max_tokens` tokens each, similar in size. Every process gets the
        same number of passes; with few examples some are empty."""

        def fullness(batch: list[Example]) -> tuple[bool, int]:
            return len(batch) >= max_rows, sum(example.n_tokens for example in batch)

        ordered = sorted(examples, key=lambda example: -example.n_tokens)
        if padded:
            n_tokens = len(ordered) * ordered[0].n_tokens
        else:
            n_tokens = sum(example.n_tokens for example in ordered)
        n_for_rows = math.ceil(len(ordered) / max_rows)
        n_for_tokens = math.ceil(n_tokens / (max_tokens or n_tokens))
        n_passes = min(len(ordered), max(n_for_rows, n_for_tokens))
        batches = [[] for _ in range(math.ceil(n_passes / self.n_processes) * self.n_processes)]
        for i, example in enumerate(ordered):
            if padded:
                # Beside others of its length
                batches[i * len(batches) // len(ordered)].append(example)
            else:
                min(batches, key=fullness).append(example)
        return batches[process :: self.n_processes]


# ------------------------------------------------------------------------------- the state


@dataclass
class TrainingProgress:
    """How far a run is: with the weights and the optimizer's state, all that a checkpoint needs."""

    step: int = 0  # steps done
    micro_batch_size: int = 0  # rows in one forward pass: batch_size, or less after memory ran out
    untrained_val_loss: float | None = None
    epochs: list[dict] = field(default_factory=list)  # as in training_stats.json
    kept_epoch: int = 0  # the one that is, or would be, final_model
    skipped_steps: int = 0  # float16 overflows

    # Sums over the current epoch
    loss_sum: float = 0.0
    n_tokens: int = 0
    n_target_tokens: int = 0
    seconds: float = 0.0

    def load_state(self, values: dict) -> None:
        """Takes the values that a checkpoint holds; format 1 wrote skipped_steps as skipped_updates."""
        values = {"skipped_steps": values.get("skipped_updates", 0), **values}
        for name in asdict(self):
            setattr(self, name, values[name])

    def add(self, metrics: dict, seconds: float) -> None:
        self.step = metrics["step"]
        self.loss_sum += metrics["loss"] * metrics["n_target_tokens"]
        self.n_tokens += metrics["n_tokens"]
        self.n_target_tokens += metrics["n_target_tokens"]
        self.seconds += seconds

    def end_epoch(self, val_loss: float, learning_rate: float, peak_memory_mb: float) -> dict:
        """Closes the sums; returns the epoch's entry of training_stats.json."""
        epoch = {
            "epoch": len(self.epochs) + 1,
            "train_loss": self.loss_sum / self.n_target_tokens,
            "val_loss": val_loss,
            "learning_rate": learning_rate,
            "train_seconds": self.seconds,
            "n_tokens": self.n_tokens,
            "n_target_tokens": self.n_target_tokens,
            "tokens_per_second": self.n_tokens / self.seconds,
            "peak_memory_mb": peak_memory_mb,
        }
        self.epochs.append(epoch)
        self.kept_epoch = best_epoch(self.epochs)["epoch"]
        self.loss_sum = 0.0
        self.n_tokens = 0
        self.n_target_tokens = 0
        self.seconds = 0.0
        return epoch

    def out_of_patience(self, patience: int) -> bool:
        """Whether `patience` or more epochs have passed since the best one (0: never), asked at the end of an
        epoch."""
        if not patience or not self.epochs:
            return False
        return len(self.epochs) - best_epoch(self.epochs)["epoch"] >= patience


@dataclass
class Run:
    """All that the loop works with."""

    config: TrainConfig
    accelerator: Accelerator
    model: PeftModel
    wrapped: (
        torch.nn.Module
    )  # the same in DDP, which averages gradients over the processes; saving needs `model`
    tokenizer: object  # transformers' PreTrainedTokenizerBase
    train_set: SFTDataset
    val_set: SFTDataset
    packed: bool  # else padded batches
    plan: Plan
    parameters: list[torch.nn.Parameter]  # the trainable ones
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16 losses; does nothing for other dtypes
    base_name: str
    sft_config: dict
    fingerprint: dict  # what a resumed run must share with the run that wrote the checkpoint
    progress: TrainingProgress
    signals: list[int] = field(default_factory=list)  # SIGTERM, SIGHUP or Ctrl-C, once one has come

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def make_batch(self, examples: Sequence[Example]) -> Batch:
        batch = (
            packed_batch(examples) if self.packed else padded_batch(examples, pad_token_id(self.tokenizer))
        )
        return batch.to(self.accelerator.device)

    def micro_batches(self, examples: list[Example], process: int) -> list[list[Example]]:
        """The forward passes of one process over `examples`, smaller after memory ran out."""
        max_rows = self.progress.micro_batch_size
        max_tokens = self.config.max_tokens_per_batch
        if max_tokens is None and self.accelerator.device.type == "cpu":
            max_tokens = CPU_TOKENS_PER_PASS
        if max_tokens and max_rows < self.config.batch_size:
            max_tokens = math.ceil(max_tokens * max_rows / self.config.batch_size)
        return self.plan.split_rows(examples, process, max_rows, max_tokens, not self.packed)

    def batches(self, examples: list[Example]) -> Iterator[tuple[Batch, int, bool]]:
        """This process's forward passes over `examples`: each batch, its weight in the loss, whether it is
        the last.

        A rank with no rows left runs a dummy batch of weight 0, so that all ranks make the same calls.
        """
        micro_batches = self.micro_batches(examples, self.accelerator.process_index)
        for i, micro_batch in enumerate(micro_batches, 1):
            yield (
                self.make_batch(micro_batch or examples[:1]),
                int(bool(micro_batch)),
                i == len(micro_batches),
            )

    def log(self, message: str = "") -> None:
        if self.accelerator.is_main_process:
            log(message)

    def peak_memory_mb(self) -> float:
        return peak_memory_mb(self.accelerator.device)

    def write_metrics(self, metrics: dict) -> None:
        if self.accelerator.is_main_process:
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
        if self.config.report_to != "none":
            values = {key: value for key, value in metrics.items() if key != "step" and value is not None}
            self.accelerator.log(values, metrics["step"])

    def stats(self) -> dict:
        """What training_stats.json holds."""
        trainable, total = self.model.get_nb_trainable_parameters()
        return {
            "untrained_val_loss": self.progress.untrained_val_loss,
            "kept_epoch": self.progress.kept_epoch,
            "epochs": self.progress.epochs,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "device": str(self.accelerator.device),
            "skipped_steps": self.progress.skipped_steps,
        }

    def write_stats(self) -> None:
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "training_stats.json", self.stats())


# ------------------------------------------------------------------------------- set-up


def set_up(config: TrainConfig, rows: tuple[list[Row], list[Row]]) -> Run:
    """Everything before the first step, from checked options and rows: processes, base model, LoRA,
    optimizer, data.

    Raises InputError. Writes nothing but the token cache, and that last, once all else is known to be right.
    """
    placement = pick_device(config.device, config.dtype)
    accelerator = start_processes(config, placement)
    base_folder, base_weights = find_base(config, accelerator)
    tokenizer = load_tokenizer(base_folder)
    model, packed = build_model(config, placement, accelerator, base_folder)
    optimizer = make_optimizer(config, model)
    train_set, val_set = load_data(config, accelerator, tokenizer, rows)

    dtype = str(placement.dtype).removeprefix("torch.")
    is_sharded = config.shard_base and accelerator.num_processes > 1
    hashes = {
        "train_csv": sha256(Path(config.train_csv)),
        "val_csv": sha256(Path(config.val_csv)),
        "base_weights": base_weights,
    }
    may_change = {field.name for field in fields(config) if field.metadata["may_change"]}
    fingerprint = {name: value for name, value in asdict(config).items() if name not in may_change}
    fingerprint |= {
        "n_processes": accelerator.num_processes,
        "base_dtype": str(placement.dtype),
        "packed": packed,
    }
    sft_config = describe_run(config, rows, (train_set, val_set), dtype, hashes)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        wrapped=model if is_sharded else accelerator.prepare_model(model),
        tokenizer=tokenizer,
        train_set=train_set,
        val_set=val_set,
        packed=packed,
        plan=Plan(
            len(train_set),
            config.batch_size,
            config.gradient_accumulation_steps,
            accelerator.num_processes,
            config.num_epochs,
            config.seed,
        ),
        parameters=optimizer.param_groups[0]["params"],
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=placement.dtype == torch.float16),
        base_name=portable_name(config.model_name, base_folder),
        sft_config=sft_config,
        fingerprint=fingerprint | hashes,
        progress=TrainingProgress(micro_batch_size=config.batch_size),
    )


def start_processes(config: TrainConfig, placement: Placement) -> Accelerator:
    """accelerate's process group, on CPU or GPU, alone or under torchrun; what it would add to the loop is
    off."""
    if (
        os.environ.get("ACCELERATE_USE_CPU") == "True"
        and "MASTER_PORT" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        log(
            "warning: accelerate launch --cpu starts a single process; for more, use torchrun --nproc_per_node"
        )
    # One process may be downloading a model while the others wait
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        cpu=placement.device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[patience],
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=Path(config.output_dir),
    )
    # Accumulation is the loop's; accelerate would divide the loss by what its environment says
    accelerator.gradient_accumulation_steps = 1
    if accelerator.is_main_process:
        dtype = str(placement.dtype).removeprefix("torch.")
        log(f"Device: {accelerator.device}, {dtype} ({placement.why})")
        if config.shard_base and accelerator.num_processes == 1:
            log("info: --shard_base has no effect with a single process")
    return accelerator


def find_base(config: TrainConfig, accelerator: Accelerator) -> tuple[Path, str]:
    """(folder, SHA-256) of the base model; one process converts or downloads it while the others wait."""
    with accelerator.main_process_first():
        folder = resolve_model(config.model_name)
        return folder, base_weights_sha256(folder)


def build_model(
    config: TrainConfig, placement: Placement, accelerator: Accelerator, base_folder: Path
) -> tuple[PeftModel, bool]:
    """(base model with LoRA, ready to train; whether it takes packed rows)."""
    is_sharded = config.shard_base and accelerator.num_processes > 1
    device = torch.device("cpu") if is_sharded else accelerator.device
    quantization = quantization_of(config.use_8bit, config.use_4bit)
    base = load_base_model(base_folder, device, placement.dtype, quantization)
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if config.max_length > longest:
        problem = f"--max_length {config.max_length}: {config.model_name} takes {longest} tokens at most"
        raise InputError(problem, f"use --max_length {longest}")
    model = add_lora(
        base,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        seed=config.seed,
    )
    if is_sharded:
        shard_base(model, accelerator.device, accelerator.num_processes)
    else:
        use_frozen_kernels(model)
    packed, reason = enable_packing(model, config.max_length)
    if not packed and accelerator.is_main_process:
        log(f"info: this model does not support packed rows, so batches are padded: {reason}")
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model, True)
    return model.train(), packed


def make_optimizer(config: TrainConfig, model: PeftModel) -> torch.optim.Optimizer:
    """AdamW over the trainable weights, which are float32 whatever the base's dtype."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def load_data(
    config: TrainConfig, accelerator: Accelerator, tokenizer, rows: tuple[list[Row], list[Row]]
) -> tuple[SFTDataset, SFTDataset]:
    """Both sets as tokens; one process tokenizes, the others read its cache."""
    cache_dir = None if config.dry_run else config.token_cache
    with accelerator.main_process_first():
        datasets = load_datasets(rows, tokenizer, config, cache_dir)
    log_data_warnings(rows, datasets, config)
    return datasets


def describe_run(
    config: TrainConfig,
    rows: tuple[list[Row], list[Row]],
    datasets: tuple[SFTDataset, SFTDataset],
    dtype: str,
    hashes: dict[str, str],
) -> dict:
    """sft_config.json: what inference needs to rebuild the prompt, and where the adapter comes from. No text,
    no absolute path."""
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
    training = asdict(config)
    for name in ("train_csv", "val_csv", "model_name", "output_dir"):
        if Path(training[name]).is_absolute():
            training[name] = Path(training[name]).name
    packages = [
        name for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes") if find_spec(name)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "prompt": asdict(datasets[0].encoder.template),
        "max_length": config.max_length,
        "training": training | {"dtype": dtype},
        "rows": counts,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "sha256": hashes,
        "base_model_is_local": is_local(config.model_name),
    }
