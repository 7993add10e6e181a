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
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sft_checkpoint import TOKEN_CACHE, check_output_dir, full_disk_said, keep_as_final, restore, save_checkpoint, start_anew
from sft_common import (
    InputError,
    RunError,
    log,
    noted_signals,
    number,
    option,
    parse_options,
    plural,
    run_script,
    sha256,
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
from sft_faults import advice_for_faults, check_finite, in_memory, stop_if_asked
from sft_prompt import pad_token_id
from sft_report import ProgressBar, advise, best_epoch, draw_losses, duration

DATA, MODEL, TRAINING, LORA, MACHINE, RUN = "data", "model", "training", "LoRA", "machine", "run"
CPU_TOKENS = 800  # in one forward pass on a CPU: its matrix products gain little from more, and memory grows with them


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
    batch_size: int = option(8, "rows in one forward pass, at most", type=number(int, 1), group=TRAINING)
    gradient_accumulation_steps: int = option(1, "an update takes this many times batch_size rows", type=number(int, 1), group=TRAINING)
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
    max_tokens_per_batch: int | None = option(
        None,
        f"split forward passes at about so many tokens: less memory, the same update (default: {CPU_TOKENS:,} on a CPU, else no limit)",
        type=number(int, 1),
        group=MACHINE,
    )
    shard_base: bool = option(
        False, "split the base model's weights over the processes (FSDP): for models larger than one GPU", group=MACHINE
    )
    gradient_checkpointing: bool = option(False, "less memory, about a third more time", group=MACHINE)

    output_dir: str = option("models/sft_specialist", "where everything is written", group=RUN)
    save_steps: int = option(
        0, "also save every so many updates, keeping the newest; 0 = at epoch ends only", type=number(int, 0), group=RUN
    )
    keep_checkpoints: int = option(0, "of the epochs' checkpoints keep so many, and the best one; 0 = all", type=number(int, 0), group=RUN)
    resume: bool = option(False, "go on from the newest checkpoint in output_dir", group=RUN)
    overwrite: bool = option(False, "replace an earlier run in output_dir", group=RUN)
    dry_run: bool = option(False, "try the largest update, say what the run would take, write nothing", group=RUN)
    report_to: str = option("none", "also write the numbers (no text) for a tracker", choices=["none", "tensorboard"], group=RUN)


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

    def micro_batches(self, examples: list[Example], process: int, most_rows: int, most_tokens: int | None, padded: bool) -> list[list]:
        """The share of an update's `examples` that one process takes, by forward pass: at most `most_rows` each, about
        `most_tokens`, alike in size. Every process gets as many passes; where examples are few, some are empty."""
        ordered = sorted(examples, key=lambda example: -example.n_tokens)
        n_tokens = len(ordered) * ordered[0].n_tokens if padded else sum(example.n_tokens for example in ordered)
        n = min(len(ordered), max(math.ceil(len(ordered) / most_rows), math.ceil(n_tokens / (most_tokens or n_tokens))))
        batches = [[] for _ in range(math.ceil(n / self.n_processes) * self.n_processes)]
        for i, example in enumerate(ordered):
            if padded:  # beside others of its length
                batches[i * len(batches) // len(ordered)].append(example)
            else:
                min(batches, key=lambda batch: (len(batch) >= most_rows, sum(e.n_tokens for e in batch))).append(example)
        return batches[process :: self.n_processes]


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (0-based): a linear rise, then cosine, linear or no fall (to 0 after the last)."""
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    left = 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)
    shape = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return config.learning_rate * shape[config.lr_scheduler]


def timed(work: Callable) -> tuple[float, object]:
    """(seconds that `work()` took, what it returned)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def dropout_seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def summed_loss(model, batch: Batch):
    """Cross-entropy in nats, summed over the batch's target tokens: a float32 scalar tensor."""
    from sft_kernels import SummedCrossEntropy

    logits = model(**batch.inputs, use_cache=False).logits  # packed (1, n_target_tokens, vocabulary)
    logits = logits[0] if batch.where is None else logits.flatten(0, 1)[batch.where]  # (n_target_tokens, vocabulary)
    return SummedCrossEntropy.apply(logits, batch.targets)


# ------------------------------------------------------------------------------------------------ the loop


def evaluate(run: "Run", examples: Sequence[Example]) -> float:
    """Validation loss: cross-entropy in nats per target token over all `examples`, whatever the batch size and the number
    of processes."""
    import torch

    accelerator, losses = run.accelerator, []
    run.model.eval()
    with torch.no_grad():
        ordered, size = sorted(examples, key=lambda example: example.n_tokens), run.progress.micro_batch_size
        for start in range(0, len(ordered), size * accelerator.num_processes):
            for share in run.micro_batches(ordered[start : start + size * accelerator.num_processes], accelerator.process_index):
                batch = run.make_batch(share or ordered[:1]).to(accelerator.device)  # one with no rows left takes part, weighing nothing
                losses.append(summed_loss(run.model, batch) * bool(share))
            if accelerator.num_processes == 1:  # else all would have to leave at the same place
                stop_if_asked(run)
    run.model.train()
    total = accelerator.reduce(torch.tensor(sum(torch.stack(losses).tolist()), device=accelerator.device)).item()
    loss = total / sum(example.n_target_tokens for example in examples)
    if not math.isfinite(loss):
        raise RunError(f"the validation loss is {loss}", f"{advice_for_faults(run)}")
    return loss


def gradients(run: "Run", step: int, examples: list[Example], n_target_tokens: int):
    """Forward and backward over this process's share of an update's rows. Returns its summed loss, a scalar tensor."""
    import torch

    accelerator, micro_batches = run.accelerator, run.micro_batches(examples, run.accelerator.process_index)
    loss_sum = torch.zeros((), device=accelerator.device)
    for j, micro_batch in enumerate(micro_batches):
        torch.manual_seed(dropout_seed(run.config.seed, step, j, accelerator.process_index))
        batch = run.make_batch(micro_batch or examples[:1]).to(accelerator.device)
        more_to_come = j + 1 < len(micro_batches)
        with accelerator.no_sync(run.wrapped) if more_to_come else contextlib.nullcontext():
            loss = summed_loss(run.wrapped, batch) * bool(micro_batch)  # a process with no rows left takes part, weighing nothing
            # The mean over the update's target tokens; DDP averages over the processes, which is undone here
            accelerator.backward(run.scaler.scale(loss * accelerator.num_processes / n_target_tokens))
        loss_sum += loss.detach()
    return loss_sum


def update(run: "Run", step: int) -> dict:
    """One update of the weights: gradients of its rows, then the optimizer. Returns its line of metrics."""
    import torch

    config, accelerator, plan = run.config, run.accelerator, run.plan
    learning_rate = learning_rate_at(step, plan.total_steps, config)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    examples = [run.train_set.examples[i] for i in plan.rows(step)]
    n_target_tokens = sum(example.n_target_tokens for example in examples)  # over all processes
    loss_sum = in_memory(run, lambda: gradients(run, step, examples, n_target_tokens))
    if any(parameter.grad is None for parameter in run.parameters):
        raise RunError("some LoRA weights get no gradient", "use other --target_modules, or leave out --use_4bit and --use_8bit")
    if accelerator.num_processes > 1 and run.wrapped is run.model:  # a split base has no DDP around it to do this
        for parameter in run.parameters:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm or math.inf)
    loss, grad_norm = torch.stack((accelerator.reduce(loss_sum) / n_target_tokens, grad_norm)).tolist()  # the one wait for a GPU
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
        "n_tokens": sum(example.n_tokens for example in examples),
        "n_target_tokens": n_target_tokens,
    }


def train(config: TrainConfig) -> dict:
    """A whole run; returns what training_stats.json holds (with dry_run, what `dry_run` measured).

    Raises InputError for what the user can mend, RunError where it cannot go on, Stopped after SIGTERM or Ctrl-C.
    """
    run = set_up(config)
    if config.dry_run:
        return dry_run(run)
    progress, plan, say = run.progress, run.plan, run.say
    with noted_signals() as run.signals:
        if progress.untrained_val_loss is None:
            progress.untrained_val_loss = in_memory(run, lambda: evaluate(run, run.val_set.examples))
            say(f"Untrained Val Loss: {progress.untrained_val_loss:.4f}")

        while len(progress.epochs) < config.num_epochs and not progress.out_of_patience(config.early_stopping_patience):
            epoch = len(progress.epochs) + 1
            say(f"\nEpoch {epoch}/{config.num_epochs}\n{'=' * 60}")
            bar = ProgressBar(plan.steps_per_epoch, progress.step - (epoch - 1) * plan.steps_per_epoch, not run.accelerator.is_main_process)
            while progress.step < epoch * plan.steps_per_epoch:
                seconds, metrics = timed(lambda: update(run, progress.step))
                progress.add(metrics, seconds)
                run.write_metrics(metrics)
                bar.update(metrics["loss"], progress.n_tokens / progress.seconds)
                if config.save_steps and progress.step % config.save_steps == 0 and progress.step % plan.steps_per_epoch:
                    save_checkpoint(run, f"checkpoint_step_{progress.step}")
                stop_if_asked(run)
            bar.close()
            val_loss = in_memory(run, lambda: evaluate(run, run.val_set.examples))
            progress.end_epoch(epoch, val_loss, learning_rate_at(progress.step - 1, plan.total_steps, config), run.peak_memory_mb())
            say("Train Loss: {train_loss:.4f}\nVal Loss: {val_loss:.4f}\nLearning Rate: {learning_rate:.2e}".format(**progress.epochs[-1]))
            folder = save_checkpoint(run, f"checkpoint_epoch_{epoch}")
            say(f"Saved checkpoint to {folder}")
            run.write_stats()
        finish(run)
    return run.stats()


def dry_run(run: "Run") -> dict:
    """Does the update with the largest forward pass, then a usual one and a validation, and says what the whole run would
    take. The weights it changes are thrown away; nothing is written. Returns the numbers it says."""
    config, plan, train_examples, val_examples = run.config, run.plan, run.train_set.examples, run.val_set.examples

    def largest_pass(step: int) -> int:
        examples = [train_examples[i] for i in plan.rows(step)]
        passes = [batch for process in range(plan.n_processes) for batch in run.micro_batches(examples, process)]
        if run.padded:
            return max(len(batch) * max((example.n_tokens for example in batch), default=0) for batch in passes)
        return max(sum(example.n_tokens for example in batch) for batch in passes)

    steps = sorted(range(plan.total_steps), key=largest_pass)
    update(run, steps[-1])
    update_seconds, metrics = timed(lambda: update(run, steps[len(steps) // 2]))
    some_examples = sorted(val_examples, key=lambda example: example.n_tokens)[:: max(1, len(val_examples) // config.batch_size)]
    validation_seconds, _ = timed(lambda: in_memory(run, lambda: evaluate(run, some_examples)))
    validation_seconds *= sum(e.n_tokens for e in val_examples) / sum(e.n_tokens for e in some_examples)
    epoch_seconds = update_seconds / metrics["n_tokens"] * sum(e.n_tokens for e in train_examples)
    seconds = config.num_epochs * epoch_seconds + (config.num_epochs + 1) * validation_seconds
    measured = {
        "total_steps": plan.total_steps,
        "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
        "micro_batch_size": run.progress.micro_batch_size,
        "largest_forward_pass_tokens": largest_pass(steps[-1]),
        "peak_memory_mb": run.peak_memory_mb(),
        "seconds_per_update": update_seconds,
        "tokens_per_second": metrics["n_tokens"] / update_seconds,
        "estimated_seconds": seconds,
    }
    run.say(
        "\nDry run: the data and the model can be used; nothing was written\n"
        "  largest forward pass {largest_forward_pass_tokens:,} tokens: peak memory {peak_memory_mb:,.0f} MB\n"
        "  a usual update takes {seconds_per_update:.1f} s ({tokens_per_second:,.0f} tokens/s)".format(**measured)
    )
    run.say(f"  the whole run about {duration(seconds)}: {plural(config.num_epochs, 'epoch')}, {config.num_epochs + 1} validations")
    return measured


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
    padded: bool  # what make_batch makes; else packed rows
    most_tokens: int | None  # in one forward pass, about
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
        rows, tokens = self.progress.micro_batch_size, self.most_tokens
        if tokens and rows < self.config.batch_size:  # memory ran out
            tokens = math.ceil(tokens * rows / self.config.batch_size)
        return self.plan.micro_batches(examples, process, rows, tokens, self.padded)

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
        if self.config.report_to != "none":
            self.accelerator.log({key: value for key, value in metrics.items() if key != "step" and value is not None}, metrics["step"])

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
    # Options and files are checked before the slow imports
    output_dir = Path(config.output_dir)
    checkpoint = None if config.dry_run else check_output_dir(output_dir, resume=config.resume, overwrite=config.overwrite)
    if config.report_to != "none" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise InputError("--report_to tensorboard: the package is not installed", "pip install tensorboardX")
    if config.use_8bit + config.use_4bit + config.shard_base > 1:
        raise InputError("--use_8bit, --use_4bit and --shard_base exclude each other", "choose one")
    if "true" in (os.environ.get("ACCELERATE_USE_DEEPSPEED"), os.environ.get("ACCELERATE_USE_FSDP")):
        raise InputError("accelerate's FSDP and DeepSpeed do not fit this loop", "accelerate launch --multi_gpu, and --shard_base")
    rows = read_rows(config.train_csv), read_rows(config.val_csv)
    for part, path in zip(rows, (config.train_csv, config.val_csv)):
        factual_rows(part, path)

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    import sft_model
    from sft_kernels import speed_up_frozen_layers

    placement = sft_model.pick_device(config.device, config.dtype)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # one process may be downloading a model
    accelerator = Accelerator(
        cpu=placement.device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[patience],
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=output_dir,
    )
    accelerator.gradient_accumulation_steps = 1  # accumulation is ours; accelerate's division (set by the environment) is not wanted
    say = log if accelerator.is_main_process else lambda message: None
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        log("warning: accelerate launch --cpu starts one process alone; for more use torchrun --nproc_per_node")
    say(f"Device: {accelerator.device}, {str(placement.dtype).removeprefix('torch.')} ({placement.why})")
    with accelerator.main_process_first():  # one process converts or downloads the base model
        base_folder = sft_model.resolve_model(config.model_name)
        base_weights = sft_model.base_weights_sha256(base_folder)
    tokenizer = sft_model.load_tokenizer(base_folder)
    quantization = "8bit" if config.use_8bit else "4bit" if config.use_4bit else None
    sharded = config.shard_base and accelerator.num_processes > 1
    if config.shard_base and not sharded:
        say("--shard_base: there is one process, so nothing to split")
    device = torch.device("cpu") if sharded else accelerator.device
    model = sft_model.load_base_model(base_folder, device, placement.dtype, quantization)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if config.max_length > longest:
        raise InputError(f"--max_length {config.max_length}: {config.model_name} takes {longest} tokens at most", f"--max_length {longest}")
    model = sft_model.add_lora(
        model, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, target_modules=config.target_modules, seed=config.seed
    )
    if sharded:
        sft_model.shard_base(model, accelerator.device, accelerator.num_processes)
    else:
        speed_up_frozen_layers(model)
    packed, padding = sft_model.enable_packing(model, config.max_length), pad_token_id(tokenizer)
    if config.gradient_checkpointing:
        sft_model.set_gradient_checkpointing(model, True)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    # Tokenised last: its cache is the first thing written, once all else is known to be right
    options = {name: getattr(config, name) for name in ("max_length", "instruction", "sentence_numbering")}
    with accelerator.main_process_first():  # one process tokenises, the others read its cache
        cache_dir = None if config.dry_run else output_dir / TOKEN_CACHE
        train_set, val_set = load_datasets(config.train_csv, config.val_csv, tokenizer, rows=rows, cache_dir=cache_dir, **options)
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
        most_tokens=config.max_tokens_per_batch or (CPU_TOKENS if accelerator.device.type == "cpu" else None),
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
    run.progress.micro_batch_size = config.batch_size
    if config.dry_run:
        return run
    if checkpoint:
        restore(run, checkpoint)
    elif accelerator.is_main_process:
        if config.resume:
            say("The earlier run was interrupted before its first checkpoint: starting anew")
        start_anew(output_dir)
    accelerator.wait_for_everyone()
    if config.report_to != "none":
        numbers = {name: value for name, value in asdict(config).items() if isinstance(value, int | float)}  # no text, no paths
        accelerator.init_trackers("sft_tracker", numbers)
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
        f"Plan: {plural(plan.total_steps, 'update')} in {plural(config.num_epochs, 'epoch')}, {plan.rows_per_step} rows each (batch {config.batch_size}"
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


# ------------------------------------------------------------------------------------------------ after the loop


def finish(run: Run) -> None:
    """Keeps the best epoch as final_model, draws the losses and says how the run went."""
    if run.accelerator.is_main_process:
        run.progress.kept_epoch = keep_as_final(run.output_dir, run.progress.epochs)
        run.write_stats()
        metrics = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
        with full_disk_said(run.output_dir):
            write_whole(
                run.output_dir / "loss_curve.png",
                draw_losses(metrics, run.progress.untrained_val_loss, run.progress.epochs, run.plan.steps_per_epoch),
            )
    best = run.progress.epochs[run.progress.kept_epoch - 1]
    lowest = "the lowest" if best is best_epoch(run.progress.epochs) else "the lowest that is whole,"
    run.say("\nTraining completed!")
    run.say(f"Saved final model to {run.output_dir / 'final_model'} (epoch {best['epoch']}, {lowest} Val Loss: {best['val_loss']:.4f})")
    for advice in advise(run.progress.untrained_val_loss, run.progress.epochs, run.progress.skipped_updates):
        run.say(advice)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


def main() -> None:
    train(parse_options(TrainConfig, "Trains a LoRA adapter on the factual rows of a CSV (Stage A, supervised fine-tuning)."))


if __name__ == "__main__":
    run_script(main)
