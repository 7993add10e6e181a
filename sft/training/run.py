"""A training run: which rows each step takes, how far it is, what it works with."""

import functools
import gc
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel

from sft.cli import log
from sft.data.dataset import Batch, Example, SFTDataset, packed_batch, padded_batch
from sft.data.prompt import pad_token_id
from sft.files import write_json
from sft.model.base import peak_memory_mb
from sft.options import CPU_TOKENS_PER_PASS, TrainConfig
from sft.training.report import best_first, optional

# ------------------------------------------------------------------------------- the plan


@functools.lru_cache(maxsize=2)
def epoch_order(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the examples in `epoch` (0-based): a permutation that depends on `seed` and `epoch`
    alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(n_examples, generator=generator).tolist())


@dataclass(frozen=True)
class Plan:
    """Which rows each step takes, over all processes."""

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
        """The forward passes of one process over its share of a step's `examples`: at most `max_rows` rows
        and about `max_tokens` tokens each, similar in size. Every process gets as many; some may be empty."""

        ordered = sorted(examples, key=lambda example: -example.n_tokens)
        n_tokens = sum((ordered[0] if padded else example).n_tokens for example in ordered)
        n_for_rows = math.ceil(len(ordered) / max_rows)
        n_for_tokens = math.ceil(n_tokens / (max_tokens or n_tokens))
        n_passes = min(len(ordered), max(n_for_rows, n_for_tokens))
        batches = [[] for _ in range(math.ceil(n_passes / self.n_processes) * self.n_processes)]
        for i, example in enumerate(ordered):
            if padded:
                # Beside others of its length
                batches[i * len(batches) // len(ordered)].append(example)
            else:
                # The emptiest that has room for a row
                min(batches, key=lambda b: (len(b) >= max_rows, sum(e.n_tokens for e in b))).append(example)
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
        vars(self).update({name: values[name] for name in asdict(self)})

    def add(self, metrics: dict, seconds: float) -> None:
        self.step = metrics["step"]
        self.loss_sum += metrics["loss"] * metrics["n_target_tokens"]
        self.n_tokens += metrics["n_tokens"]
        self.n_target_tokens += metrics["n_target_tokens"]
        self.seconds += seconds

    def end_epoch(self, keep_best: str, **values: float) -> dict:
        """Closes the sums; returns the epoch's entry of training_stats.json, which holds `values` too."""
        epoch = {
            "epoch": len(self.epochs) + 1,
            "train_loss": self.loss_sum / self.n_target_tokens,
            **values,
            "train_seconds": self.seconds,
            "n_tokens": self.n_tokens,
            "n_target_tokens": self.n_target_tokens,
            "tokens_per_second": self.n_tokens / self.seconds,
        }
        self.epochs.append(epoch)
        self.kept_epoch = best_first(self.epochs, keep_best)[0]["epoch"]
        self.loss_sum = 0.0
        self.n_tokens = 0
        self.n_target_tokens = 0
        self.seconds = 0.0
        return epoch

    def out_of_patience(self, config: TrainConfig) -> bool:
        """Whether as many epochs as early stopping waits for (0: never) have passed since the best one."""
        patience = config.early_stopping_patience
        if not patience or not self.epochs:
            return False
        return len(self.epochs) - best_first(self.epochs, config.keep_best)[0]["epoch"] >= patience


@dataclass
class Run:
    """All that the loop works with."""

    config: TrainConfig
    accelerator: Accelerator
    model: PeftModel
    # The same in DDP, which averages gradients over the processes; saving needs `model`
    wrapped: torch.nn.Module
    tokenizer: object  # transformers' PreTrainedTokenizerBase
    train_set: SFTDataset
    val_set: SFTDataset
    examples: list[Example]  # what the steps train on: those of train_set, then parts of them
    packed: bool  # else padded batches
    longest_shared: float  # examples of more tokens have forward passes of their own
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

    def micro_batches(self, examples: list[Example], process: int) -> list[list[Example]]:
        """The forward passes of one process over `examples`, smaller after memory ran out."""
        max_rows = self.progress.micro_batch_size
        max_tokens = self.config.max_tokens_per_batch
        if max_tokens is None and self.accelerator.device.type == "cpu":
            max_tokens = CPU_TOKENS_PER_PASS
        if max_tokens and max_rows < self.config.batch_size:
            max_tokens = math.ceil(max_tokens * max_rows / self.config.batch_size)
        shared = [example for example in examples if example.n_tokens <= self.longest_shared]
        own = [example for example in examples if example.n_tokens > self.longest_shared]
        passes = []
        for part, n_rows in ((shared, max_rows), (own, 1)):
            if part:
                passes += self.plan.split_rows(part, process, n_rows, max_tokens, not self.packed)
        return passes

    def batches(self, examples: list[Example]) -> Iterator[tuple[Batch, int, bool]]:
        """This process's forward passes over `examples`: each batch, its weight in the loss, whether it is
        the last. One with no rows left runs a batch of weight 0, so that all processes make the same
        calls."""
        micro_batches = self.micro_batches(examples, self.accelerator.process_index)
        for i, micro_batch in enumerate(micro_batches, 1):
            chosen = micro_batch or examples[:1]
            batch = (
                packed_batch(chosen) if self.packed else padded_batch(chosen, pad_token_id(self.tokenizer))
            )
            yield batch.to(self.accelerator.device), int(bool(micro_batch)), i == len(micro_batches)

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
            with optional("line in the tracker's files"):
                self.accelerator.log(values, metrics["step"])

    def stats(self) -> dict:
        """What training_stats.json holds."""
        trainable, total = self.model.get_nb_trainable_parameters()
        set_apart = {}
        for row in self.val_set.rows if self.config.val_fraction is not None else ():
            set_apart.setdefault(row.source or Path(self.config.train_files[0]).name, []).append(row.number)
        return {
            "untrained_val_loss": self.progress.untrained_val_loss,
            "kept_epoch": self.progress.kept_epoch,
            "epochs": self.progress.epochs,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "device": str(self.accelerator.device),
            "skipped_steps": self.progress.skipped_steps,
            "validation_rows": set_apart,  # row numbers by file, of those that val_fraction chose
        }

    def close(self) -> None:
        """Ends the tracker and, once all processes are here, their process group."""
        self.accelerator.wait_for_everyone()
        # DDP goes first: were its reducer the last to hold the group, the group's destructor would join
        # gloo's threads with Python's lock held, for which a thread that frees a tensor may wait
        self.wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        with optional("end of the tracker's files"):
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers = []
        self.accelerator.end_training()

    def write_stats(self) -> None:
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "training_stats.json", self.stats())
