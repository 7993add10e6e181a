"""What a training run reports: its plan, advice, the loss curve, the model card. No note text, no
absolute path."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest import mock

from sft.cli import log, on_main_process, plural
from sft.options import TrainConfig, quantization_of

if TYPE_CHECKING:
    from sft.training.run import Run, TrainingProgress


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Whatever fails inside is a warning: what only illustrates a run does not end it."""
    try:
        yield
    except Exception as error:
        if on_main_process():
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log(f"warning: no {what}: {reason}")


def duration(seconds: float) -> str:
    """ "40 s", "5 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


# What --keep_best decides by: the entry of an epoch in training_stats.json, its title, whether more is better
MERITS = {
    "loss": ("val_loss", "Val Loss", False),
    "check_score": ("check_score", "Check Score", True),
    "rouge_l": ("rouge_l", "ROUGE-L", True),
}


def best_first(epochs: list[dict], keep_best: str) -> list[dict]:
    """The epochs (entries of training_stats.json) by what --keep_best names; of equals the earlier."""
    name, _, is_more_better = MERITS[keep_best]
    return sorted(epochs, key=lambda epoch: -epoch[name] if is_more_better else epoch[name])


def log_plan(run: "Run") -> None:
    """Four lines: base model, LoRA, data, steps."""
    config = run.config
    plan = run.plan
    quantization = quantization_of(vars(config))
    trainable, total = run.model.get_nb_trainable_parameters()
    n_hallucinated = run.sft_config["rows"]["train"]["hallucinated"]
    which = " (their numbers: training_stats.json)" if config.val_fraction is not None else ""
    run.log(
        f"Base model: {config.model_name}{f', {quantization}' if quantization else ''}\n"
        f"LoRA: r={config.lora_r}, alpha={config.lora_alpha:g}; "
        f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})\n"
        f"Data: {plural(len(run.train_set), 'training row')}, {plural(len(run.val_set), 'validation row')}{which}; "
        f"{plural(n_hallucinated, 'hallucinated row')} kept for Stage B\n"
        f"Plan: {plural(plan.total_steps, 'step')} in {plural(config.num_epochs, 'epoch')}, "
        f"{plan.rows_per_step} rows each (batch {config.batch_size} "
        f"x accumulation {config.gradient_accumulation_steps} x processes {plan.n_processes})"
    )


def why_it_ended(run: "Run") -> str:
    """Why there is no further epoch, and how to get one."""
    progress = run.progress
    n_done = len(progress.epochs)
    if n_done >= run.config.num_epochs:
        return f"{plural(n_done, 'epoch')} of {n_done} done; a higher --num_epochs continues the run"
    name, title, is_more_better = MERITS[run.config.keep_best]
    best = best_first(progress.epochs, run.config.keep_best)[0]
    return (
        f"{title} was not {'above' if is_more_better else 'below'} that of epoch {best['epoch']} ({best[name]:.4f})"
        f" for {plural(n_done - best['epoch'], 'epoch')}"
        f" (--early_stopping_patience {run.config.early_stopping_patience})"
    )


def advise(config: TrainConfig, progress: "TrainingProgress") -> list[str]:
    """What the losses tell a reader, with the options to try: none that the run is beyond already."""
    start = progress.untrained_val_loss
    best = best_first(progress.epochs, "loss")[0]
    last = progress.epochs[-1]
    advice = []
    # After a single step the losses say nothing yet
    if progress.step > 1 and best["val_loss"] > start:
        fix = f"lower --learning_rate (now {config.learning_rate:g})"
        if config.learning_rate <= 1e-5:
            fix = "check the rows: python sft_dataset.py"
        whose = "the adapter's at the start" if config.init_adapter else "the untrained model's"
        advice.append(f"Val Loss rose above {whose} ({start:.4f}): {fix}")
    elif progress.step > 1 and best["val_loss"] > 0.98 * start:
        # An adapter to start from has decided on its shape
        is_new = not config.init_adapter
        choices = {
            "--num_epochs 3": config.num_epochs < 3,
            "--learning_rate 5e-4": config.learning_rate < 5e-4,
            "--lora_r 32": is_new and config.lora_r < 32,
            "--target_modules all-linear": is_new and config.target_modules != ["all-linear"],
        }
        fixes = [fix for fix, is_more in choices.items() if is_more] or ["more rows"]
        advice.append(f"Val Loss barely moved: try {', '.join(fixes[:3])}")
    if last["epoch"] > best["epoch"] and last["train_loss"] < best["train_loss"]:
        fix = f"try --num_epochs {best['epoch']} or more data"
        advice.append(
            f"Overfitting after epoch {best['epoch']}: Train Loss kept falling while Val Loss rose; {fix}"
        )
    if progress.skipped_steps:
        n_skipped = plural(progress.skipped_steps, "step")
        advice.append(
            f"{n_skipped} skipped because a float16 gradient overflowed; --dtype bfloat16 avoids it"
        )
    return advice


def load_figure() -> type:
    """matplotlib's Figure, which needs no pyplot and no backend. Of a backend in the environment that is not
    installed here (a notebook's) matplotlib's first import would fail; one that is stays the program's."""
    is_first = "matplotlib" not in sys.modules
    with mock.patch.dict(os.environ):
        backend = os.environ.pop("MPLBACKEND", None)
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    if backend and is_first:
        with contextlib.suppress(ValueError):
            rcParams["backend"] = backend
    return Figure


def draw_losses(metrics: list[dict], stats: dict, steps_per_epoch: int) -> bytes:
    """loss_curve.png: training loss by step, validation loss by epoch, the kept epoch marked. `metrics`: the
    lines of steps in metrics.jsonl; `stats`: training_stats.json."""
    epochs = stats["epochs"]
    kept = epochs[stats["kept_epoch"] - 1]
    ends = [epoch["epoch"] * steps_per_epoch for epoch in epochs]
    middles = [end - steps_per_epoch / 2 for end in ends]
    steps, step_losses = zip(*((line["step"], line["loss"]) for line in metrics))
    train_losses = [epoch["train_loss"] for epoch in epochs]
    val_losses = [stats["untrained_val_loss"], *(epoch["val_loss"] for epoch in epochs)]

    figure = load_figure()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, step_losses, color="tab:blue", alpha=0.35, linewidth=1, label="train, each step")
    axes.plot(middles, train_losses, "o-", color="tab:blue", label="train, epoch mean")
    axes.plot([0, *ends], val_losses, "s-", color="tab:orange", label="validation")
    label = f"kept: epoch {kept['epoch']}, {kept['val_loss']:.3f}"
    axes.plot(ends[kept["epoch"] - 1], kept["val_loss"], "*", markersize=18, color="tab:green", label=label)
    axes.set_title("Stage A: training and validation loss")
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def model_card(
    sft_config: dict, base_name: str, target_modules: list[str], untrained: float, epochs: list[dict]
) -> str:
    """README.md of an adapter folder: where it comes from and what it is not for."""
    import yaml

    config = sft_config["training"]
    counts = sft_config["rows"]["train"]
    n_parts = sft_config["rows"].get("parts", {}).get("used", 0)
    parts = f", and on {n_parts:,} of their sentences with parts of the notes" if n_parts else ""
    rows = [f"| {e['epoch']} | {e['train_loss']:.4f} | {e['val_loss']:.4f} |" for e in epochs]
    losses = "\n".join(rows)
    front = {"library_name": "peft", "base_model": base_name, "pipeline_tag": "text-generation"}
    public_name = sft_config.get("base_public_name")
    known_as = f" (`{public_name}`)" if public_name else ""
    start = "before training" if config.get("init_adapter") else "untrained"
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Clinical summary adapter (Stage A, supervised fine-tuning)

A LoRA adapter (r={config["lora_r"]}, alpha={config["lora_alpha"]:g}, on {", ".join(target_modules)}) that makes
`{" ".join(base_name.split())}`{known_as} summarize clinical notes. Trained on {counts["used"]:,} factual pairs of note and summary{parts};
{counts["hallucinated"]:,} hallucinated pairs were left out.

| epoch | train loss | validation loss |
|---|---|---|
| 0 ({start}) | | {untrained:.4f} |
{losses}

Losses are cross-entropy in nats per summary token. `sft_config.json` holds the prompt, the whole configuration and
SHA-256 checksums of data and base weights.

**Limits.** The model can still state things the note does not say. A clinician must check every summary against its
note. The weights may hold traces of the notes they were trained on: treat this folder as patient data.

    python sft_inference.py --model_path THIS_FOLDER --clinical_note "..."
"""
