"""Stage A: trains a LoRA adapter on the factual rows of a CSV, with a loop written out by hand.

    python stage_a_sft_training.py                                  # bundled model, bundled data
    python stage_a_sft_training.py --train_csv my_train.csv --val_csv my_val.csv --model_name meta-llama/Llama-2-7b-hf

What happens at a step depends on the seed and the step alone (order of rows, dropout, learning rate), so a run that
goes on from a checkpoint is the run that was never interrupted.
"""

import contextlib
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sft_common import (
    InputError,
    RunError,
    log,
    number,
    option,
    parse_options,
    private_folder,
    run_script,
    safe_id,
    sha256,
    some,
    write_json,
    write_whole,
)
from sft_dataset import (
    Batch,
    Example,
    SFTDataset,
    epoch_order,
    factual_rows,
    load_datasets,
    packed_batch,
    padded_batch,
    read_rows,
    warn_about_leaks,
    warn_about_rows,
)
from sft_prompt import pad_token_id
from sft_report import ProgressBar, advise, best_epoch, draw_losses, model_card

DATA, MODEL, TRAINING, LORA, MACHINE, RUN = "data", "model", "training", "LoRA", "machine", "run"


@dataclass
class TrainConfig:
    train_csv: str = option("phase1_data/sft/train_set_processed.csv", "training rows", group=DATA)
    val_csv: str = option("phase1_data/sft/validation_set_processed.csv", "validation rows", group=DATA)
    max_length: int = option(512, "tokens of prompt and summary together; longer notes are shortened", type=number(int, 32), group=DATA)
    sentence_numbering: str = option(
        "auto", "number the note's sentences: auto = where summaries carry citations", choices=["auto", "on", "off"], group=DATA
    )
    instruction: str | None = option(None, "what the prompt asks for (default: built in)", group=DATA)

    model_name: str = option("smollm2-135m-instruct", "base model: the bundled one, a local folder or a hub id", group=MODEL)
    use_8bit: bool = option(False, "load the base model in 8 bit (bitsandbytes)", group=MODEL)
    use_4bit: bool = option(False, "load the base model in 4 bit (bitsandbytes, NF4)", group=MODEL)

    num_epochs: int = option(2, "passes over the training rows", type=number(int, 1), group=TRAINING)
    learning_rate: float = option(2e-4, "the highest, reached after warm-up", type=number(float, 0, open_low=True), group=TRAINING)
    batch_size: int = option(8, "rows in one forward pass", type=number(int, 1), group=TRAINING)
    gradient_accumulation_steps: int = option(1, "forward passes in one update", type=number(int, 1), group=TRAINING)
    warmup_ratio: float = option(0.03, "share of the updates over which the learning rate rises", type=number(float, 0, 1), group=TRAINING)
    lr_scheduler: str = option("cosine", "how it falls afterwards", choices=["cosine", "linear", "constant"], group=TRAINING)
    weight_decay: float = option(0.0, "AdamW's weight decay", type=number(float, 0), group=TRAINING)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 = never", type=number(float, 0), group=TRAINING)
    early_stopping_patience: int = option(
        0, "stop after this many epochs without a lower validation loss; 0 = never", type=number(int, 0), group=TRAINING
    )
    seed: int = option(42, "of row order, dropout and LoRA's first weights", type=number(int, 0, 2**32 - 1), group=TRAINING)

    lora_r: int = option(16, "rank", type=number(int, 1), group=LORA)
    lora_alpha: float = option(32, "scale: the adapter counts alpha / r times", type=number(float, 0, open_low=True), group=LORA)
    lora_dropout: float = option(0.05, "share of the adapter's inputs dropped in training", type=number(float, 0, 0.99), group=LORA)
    target_modules: list[str] = option(["q_proj", "v_proj"], "layers that get an adapter, or all-linear", group=LORA)

    device: str = option("auto", "where to train", choices=["auto", "cuda", "mps", "cpu"], group=MACHINE)
    dtype: str = option("auto", "of the base model", choices=["auto", "float32", "bfloat16", "float16"], group=MACHINE)
    gradient_checkpointing: bool = option(False, "less memory, about a third more time", group=MACHINE)

    output_dir: str = option("models/sft_specialist", "where everything is written", group=RUN)
    save_steps: int = option(
        0, "also save every so many updates, keeping the newest; 0 = at epoch ends only", type=number(int, 0), group=RUN
    )
    resume: bool = option(False, "go on from the newest checkpoint in output_dir", group=RUN)
    overwrite: bool = option(False, "replace an earlier run in output_dir", group=RUN)


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
    "gradient_checkpointing",
    "early_stopping_patience",
}


@dataclass
class Progress:
    """Where a run stands: with the weights and the optimizer's state, all that a checkpoint needs."""

    step: int = 0  # updates done
    untrained_val_loss: float | None = None
    epochs: list[dict] = field(default_factory=list)  # as in training_stats.json
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
        self.loss_sum, self.n_tokens, self.n_target_tokens, self.seconds = 0.0, 0, 0, 0.0

    def out_of_patience(self, patience: int) -> bool:
        """Whether the epochs since the best one are `patience` or more (0: never), asked at the end of an epoch."""
        return bool(patience and self.epochs and len(self.epochs) - best_epoch(self.epochs)["epoch"] >= patience)


# ------------------------------------------------------------------------------------------------ pure functions


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

    def micro_batches(self, rows: list, process: int) -> list[list]:
        """The share of `rows` that one process takes, by forward pass. Every process gets as many forward passes as the
        others; in a short last group some are empty."""
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        batches += [[]] * (-len(batches) % self.n_processes)
        return batches[process :: self.n_processes]


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (0-based): a linear rise, then cosine, linear or no fall (to 0 after the last)."""
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    left = 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)
    shape = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return config.learning_rate * shape[config.lr_scheduler]


def dropout_seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def summed_loss(model, batch: Batch):
    """Cross-entropy in nats, summed over the batch's target tokens: a float32 scalar tensor."""
    import torch.nn.functional as F

    logits = model(**batch.inputs, use_cache=False).logits  # packed (1, n_target_tokens, vocabulary)
    logits = logits[0] if batch.where is None else logits[batch.where]  # (n_target_tokens, vocabulary)
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


# ------------------------------------------------------------------------------------------------ the loop


def evaluate(run: "Run") -> float:
    """Validation loss: cross-entropy in nats per target token over the whole set, whatever the batch size and the number
    of processes."""
    import torch

    accelerator, examples = run.accelerator, sorted(run.val_set.examples, key=lambda example: len(example.input_ids))
    share = examples[accelerator.process_index :: accelerator.num_processes]
    total = 0.0
    run.model.eval()
    with torch.no_grad():
        for start in range(0, len(share), run.config.batch_size):
            batch = run.make_batch(share[start : start + run.config.batch_size]).to(accelerator.device)
            total += summed_loss(run.model, batch).item()
    run.model.train()
    total = accelerator.reduce(torch.tensor(total, device=accelerator.device)).item()
    loss = total / sum(example.n_target_tokens for example in examples)
    if not math.isfinite(loss):
        raise RunError(f"the validation loss is {loss}", f"{advice_for_faults(run)}")
    return loss


def update(run: "Run", step: int) -> dict:
    """One update of the weights: forward and backward over its rows, then the optimizer. Returns its line of metrics."""
    import torch

    config, accelerator, plan = run.config, run.accelerator, run.plan
    learning_rate = learning_rate_at(step, plan.total_steps, config)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    examples = [run.train_set.examples[i] for i in plan.rows(step)]
    n_target_tokens = sum(example.n_target_tokens for example in examples)  # over all processes
    micro_batches = plan.micro_batches(examples, accelerator.process_index)
    loss_sum = torch.zeros((), device=accelerator.device)
    for j, micro_batch in enumerate(micro_batches):
        torch.manual_seed(dropout_seed(config.seed, step, j, accelerator.process_index))
        batch = run.make_batch(micro_batch or examples[:1]).to(accelerator.device)
        more_to_come = j + 1 < len(micro_batches)
        with accelerator.no_sync(run.wrapped) if more_to_come else contextlib.nullcontext():
            loss = summed_loss(run.wrapped, batch) * bool(micro_batch)  # a process with no rows left takes part, weighing nothing
            # The mean over the update's target tokens; DDP averages over the processes, which is undone here
            accelerator.backward(run.scaler.scale(loss * accelerator.num_processes / n_target_tokens))
        loss_sum += loss.detach()
    if any(parameter.grad is None for parameter in run.parameters):
        raise RunError("some LoRA weights get no gradient", "use other --target_modules, or leave out --use_4bit and --use_8bit")
    loss = accelerator.reduce(loss_sum).item() / n_target_tokens
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm or math.inf).item()
    check_finite(run, step, loss, grad_norm, examples)
    run.scaler.step(run.optimizer)  # skipped where a float16 gradient overflowed
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "epoch": step // plan.steps_per_epoch + 1,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "n_examples": len(examples),
        "n_tokens": sum(len(example.input_ids) for example in examples),
        "n_target_tokens": n_target_tokens,
    }


def train(config: TrainConfig) -> dict:
    """A whole run; returns what training_stats.json holds.

    Raises InputError for what the user can mend before it starts, RunError where it cannot go on.
    """
    run = set_up(config)
    progress, plan, say = run.progress, run.plan, run.say
    if progress.untrained_val_loss is None:
        progress.untrained_val_loss = evaluate(run)
        say(f"Untrained Val Loss: {progress.untrained_val_loss:.4f}")

    while progress.step < plan.total_steps and not progress.out_of_patience(config.early_stopping_patience):
        epoch = progress.step // plan.steps_per_epoch + 1
        say(f"\nEpoch {epoch}/{config.num_epochs}\n{'=' * 60}")
        bar = ProgressBar(plan.steps_per_epoch, progress.step % plan.steps_per_epoch, quiet=not run.accelerator.is_main_process)
        while progress.step < epoch * plan.steps_per_epoch:
            started = time.perf_counter()
            metrics = update(run, progress.step)
            progress.add(metrics, time.perf_counter() - started)
            run.write_metrics(metrics)
            bar.update(metrics["loss"], progress.n_tokens / progress.seconds)
            if config.save_steps and progress.step % config.save_steps == 0 and progress.step % plan.steps_per_epoch:
                save_checkpoint(run, f"checkpoint_step_{progress.step}")
        bar.close()
        progress.end_epoch(epoch, evaluate(run), metrics["learning_rate"], run.peak_memory_mb())
        say("Train Loss: {train_loss:.4f}\nVal Loss: {val_loss:.4f}\nLearning Rate: {learning_rate:.2e}".format(**progress.epochs[-1]))
        folder = save_checkpoint(run, f"checkpoint_epoch_{epoch}")
        say(f"Saved checkpoint to {folder}")
        run.write_stats()
    finish(run)
    return run.stats()


# ------------------------------------------------------------------------------------------------ before the loop


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
    plan: Plan
    parameters: list  # the trainable ones
    optimizer: object
    scaler: object  # of float16 losses; does nothing for other dtypes
    base_name: str
    sft_config: dict
    identity: dict  # what a run that goes on from a checkpoint must share with the run that wrote it
    progress: Progress

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def say(self, message: str = "") -> None:
        if self.accelerator.is_main_process:
            log(message)

    def peak_memory_mb(self) -> float:
        from sft_model import peak_memory_mb

        return peak_memory_mb(self.accelerator.device)

    def write_metrics(self, metrics: dict) -> None:
        if self.accelerator.is_main_process:
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def stats(self) -> dict:
        trainable, total = self.model.get_nb_trainable_parameters()
        return {
            "untrained_val_loss": self.progress.untrained_val_loss,
            "kept_epoch": best_epoch(self.progress.epochs)["epoch"],
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
    # Options and files are checked before the slow imports
    output_dir = Path(config.output_dir)
    check_output_dir(output_dir, config)
    if config.use_8bit and config.use_4bit:
        raise InputError("--use_8bit and --use_4bit together", "choose one")
    rows = read_rows(config.train_csv), read_rows(config.val_csv)
    for part, path in zip(rows, (config.train_csv, config.val_csv)):
        factual_rows(part, path)

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    import sft_model

    placement = sft_model.pick_device(config.device, config.dtype)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # one process may be downloading a model
    accelerator = Accelerator(cpu=placement.device.type == "cpu", mixed_precision="no", kwargs_handlers=[patience])
    accelerator.gradient_accumulation_steps = 1  # accumulation is ours; accelerate's division (set by the environment) is not wanted
    say = log if accelerator.is_main_process else lambda message: None
    say(f"Device: {accelerator.device}, {str(placement.dtype).removeprefix('torch.')} ({placement.why})")
    with accelerator.main_process_first():  # one process converts or downloads the base model
        base_folder = sft_model.resolve_model(config.model_name)
        base_weights = sft_model.base_weights_sha256(base_folder)
    tokenizer = sft_model.load_tokenizer(base_folder)
    options = {name: getattr(config, name) for name in ("max_length", "instruction", "sentence_numbering")}
    with accelerator.main_process_first():  # one process tokenises, the others read its cache
        train_set, val_set = load_datasets(
            config.train_csv, config.val_csv, tokenizer, rows=rows, cache_dir=output_dir / "token_cache", **options
        )
    if accelerator.is_main_process:
        warn_about_rows(config.train_csv, rows[0], train_set)
        warn_about_rows(config.val_csv, rows[1], val_set)
        warn_about_leaks(*rows)

    quantization = "8bit" if config.use_8bit else "4bit" if config.use_4bit else None
    model = sft_model.load_base_model(base_folder, accelerator.device, placement.dtype, quantization)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if config.max_length > longest:
        raise InputError(f"--max_length {config.max_length}: {config.model_name} takes {longest} tokens at most", f"--max_length {longest}")
    model = sft_model.add_lora(
        model, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, target_modules=config.target_modules, seed=config.seed
    )
    packed, padding = sft_model.enable_packing(model, config.max_length), pad_token_id(tokenizer)
    if config.gradient_checkpointing:
        sft_model.set_gradient_checkpointing(model, True)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

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
        wrapped=accelerator.prepare_model(model),
        tokenizer=tokenizer,
        train_set=train_set,
        val_set=val_set,
        make_batch=packed_batch if packed else lambda examples: padded_batch(examples, padding),
        plan=Plan(len(train_set), config.batch_size, config.gradient_accumulation_steps, n_processes, config.num_epochs, config.seed),
        parameters=parameters,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=placement.dtype == torch.float16),
        base_name=sft_model.portable_name(config.model_name, base_folder),
        sft_config=describe_run(config, rows, (train_set, val_set), str(placement.dtype), hashes)
        | {"base_model_is_local": sft_model.is_local(config.model_name)},
        identity={k: v for k, v in asdict(config).items() if k not in MAY_CHANGE}
        | {"n_processes": n_processes, "base_dtype": str(placement.dtype), "packed": packed}
        | hashes,
        progress=Progress(),
    )
    describe_plan(run, quantization, packed, sum(row.label == "hallucinated" for row in rows[0]))
    if config.resume:
        restore(run)
    elif accelerator.is_main_process:
        clear_output_dir(output_dir)
    accelerator.wait_for_everyone()
    return run


def describe_plan(run: Run, quantization: str | None, packed: bool, n_hallucinated: int) -> None:
    config, plan = run.config, run.plan
    trainable, total = run.model.get_nb_trainable_parameters()
    padded = "" if packed else "; padded batches, since it takes no packed rows"
    run.say(f"Base model: {config.model_name}{f', {quantization}' if quantization else ''}{padded}")
    run.say(f"LoRA: r={config.lora_r}, alpha={config.lora_alpha:g}; {trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
    run.say(
        f"Data: {len(run.train_set):,} training rows, {len(run.val_set):,} validation rows; {n_hallucinated:,} hallucinated rows kept for Stage B"
    )
    run.say(
        f"Plan: {plan.total_steps:,} updates in {config.num_epochs} epochs, {plan.rows_per_step} rows each (batch {config.batch_size}"
        f" x accumulation {config.gradient_accumulation_steps} x processes {plan.n_processes})"
    )


def describe_run(config: TrainConfig, rows, datasets: tuple[SFTDataset, SFTDataset], dtype: str, hashes: dict[str, str]) -> dict:
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
    training = {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in asdict(config).items()}
    packages = [name for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes") if find_spec(name)]
    return {
        "format_version": 1,
        "prompt": asdict(datasets[0].encoder.template),
        "max_length": config.max_length,
        "training": training | {"dtype": dtype.removeprefix("torch.")},
        "rows": counts,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "sha256": hashes,
    }


# ------------------------------------------------------------------------------------------------ output folder and checkpoints


def own_files(output_dir: Path) -> list[Path]:
    """What an earlier run left in `output_dir`, whole or half done; what others put there stays."""
    files = [output_dir / name for name in ("training_stats.json", "metrics.jsonl", "loss_curve.png")]
    folders = [
        folder for name in ("final_model", "checkpoint_*") for folder in output_dir.glob(name) if (folder / "sft_config.json").is_file()
    ]
    return [path for path in (*files, *folders, *half_done(output_dir)) if path.exists()]


def half_done(output_dir: Path) -> list[Path]:
    """Folders that a killed run was about to write."""
    return [path for name in (".checkpoint_*", ".final_model*") for path in output_dir.glob(name)]


def check_output_dir(output_dir: Path, config: TrainConfig) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file", "name a folder")
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite together", "choose one")
    if config.resume:
        newest_checkpoint(output_dir)
    elif not config.overwrite and own_files(output_dir):
        raise InputError(
            f"{output_dir} holds an earlier run", "--resume goes on with it, --overwrite replaces it, --output_dir names another folder"
        )


def clear_output_dir(output_dir: Path) -> None:
    for path in own_files(output_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    private_folder(output_dir)


def save_checkpoint(run: Run, name: str) -> Path:
    """Saves adapter and training state to output_dir/name; of the folders that --save_steps writes, the newest stays."""
    from sft_model import save_adapter

    folder = run.output_dir / name
    if run.accelerator.is_main_process:
        progress = run.progress
        state = {
            "identity": run.identity,
            "progress": asdict(progress),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
        }
        sft_config = run.sft_config | {"step": progress.step, "epoch": len(progress.epochs)}
        targets = sorted(run.model.peft_config["default"].target_modules)
        card = model_card(sft_config, run.base_name, targets, progress.untrained_val_loss, progress.epochs)
        save_adapter(folder, run.model, run.tokenizer, run.base_name, sft_config, card, state)
        for older in run.output_dir.glob("checkpoint_step_*"):
            if older != folder:
                shutil.rmtree(older)
    run.accelerator.wait_for_everyone()
    return folder


def newest_checkpoint(output_dir: Path) -> Path:
    """The checkpoint that is furthest on. Raises InputError if there is none."""
    steps = {}
    for folder in output_dir.glob("checkpoint_*"):
        if (folder / "training_state.pt").is_file() and (folder / "sft_config.json").is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                steps[folder] = json.loads((folder / "sft_config.json").read_text())["step"]
    if not steps:
        raise InputError(f"--resume: {output_dir} holds no checkpoint", "leave out --resume to start anew, or name the run's --output_dir")
    return max(steps, key=steps.get)


def restore(run: Run) -> None:
    """Takes up the run where its newest checkpoint left it. Raises InputError if it was another run."""
    import sft_model

    folder = newest_checkpoint(run.output_dir)
    state = sft_model.read_state(folder)
    saved, now = state["identity"], run.identity
    differences = [name for name in now if saved.get(name) != now[name]]
    if differences:
        was = ", ".join(f"{name} was {saved.get(name)}, is {now[name]}" for name in differences)
        raise InputError(
            f"--resume: {folder} belongs to a run with other options: {was}", "use the same options, or --overwrite to start anew"
        )
    sft_model.load_adapter_weights(run.model, folder, may_be_zero=True)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])
    if run.progress.step > run.plan.total_steps:
        done = len(run.progress.epochs)
        raise InputError(
            f"--resume: {done} epochs are done, more than --num_epochs {run.config.num_epochs}", f"--num_epochs {done} or more"
        )
    for path in half_done(run.output_dir) if run.accelerator.is_main_process else ():
        shutil.rmtree(path)
    if run.accelerator.is_main_process:  # metrics of updates that will be done again
        file = run.output_dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        write_whole(file, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= run.progress.step))
    run.say(f"Going on from {folder}: {run.progress.step:,} of {run.plan.total_steps:,} updates are done")


def check_finite(run: Run, step: int, loss: float, grad_norm: float, examples: list[Example]) -> None:
    """Stops a run whose loss or gradient is not finite, before it spoils the weights; float16 overflow is only counted."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if math.isfinite(loss) and run.scaler.is_enabled() and run.scaler.get_scale() > 1:
        run.progress.skipped_updates += 1  # the scale is halved, until it fits
        return
    ids = some((safe_id(example.row_id) for example in examples), 16)
    raise RunError(f"update {step + 1}: loss {loss}, gradient norm {grad_norm}; its rows have the ids {ids}", advice_for_faults(run))


def advice_for_faults(run: Run) -> str:
    try:
        saved = f"{newest_checkpoint(run.output_dir).name} is whole"
    except InputError:
        saved = "nothing is saved yet"
    return f"lower --learning_rate (now {run.config.learning_rate:g}) or use --dtype float32; {saved}"


# ------------------------------------------------------------------------------------------------ after the loop


def finish(run: Run) -> None:
    """Keeps the best epoch as final_model, draws the losses and says how the run went."""
    from sft_model import replace_folder

    best = best_epoch(run.progress.epochs)
    if run.accelerator.is_main_process:
        aside = run.output_dir / ".final_model.new"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(
            run.output_dir / f"checkpoint_epoch_{best['epoch']}",
            private_folder(aside),
            ignore=shutil.ignore_patterns("*.pt"),
            dirs_exist_ok=True,
        )
        replace_folder(aside, run.output_dir / "final_model")
        run.write_stats()
        metrics = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
        curve = draw_losses(metrics, run.progress.untrained_val_loss, run.progress.epochs)
        write_whole(run.output_dir / "loss_curve.png", curve)
    run.say("\nTraining completed!")
    run.say(f"Saved final model to {run.output_dir / 'final_model'} (epoch {best['epoch']}, the lowest Val Loss: {best['val_loss']:.4f})")
    for advice in advise(run.progress.untrained_val_loss, run.progress.epochs, run.progress.skipped_updates):
        run.say(advice)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


def main() -> None:
    train(parse_options(TrainConfig, "Trains a LoRA adapter on the factual rows of a CSV (Stage A, supervised fine-tuning)."))


if __name__ == "__main__":
    run_script(main)
