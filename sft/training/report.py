"""What a training run reports: its plan, advice, the loss curve, the model card. No note text, no
absolute path."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

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


def best_epoch(epochs: list[dict]) -> dict:
    """The epoch (an entry of training_stats.json) with the lowest validation loss."""
    return min(epochs, key=lambda epoch: epoch["val_loss"])


def log_plan(run: "Run") -> None:
    """Four lines: base model, LoRA, data, steps."""
    config = run.config
    plan = run.plan
    quantization = quantization_of(vars(config))
    trainable, total = run.model.get_nb_trainable_parameters()
    n_hallucinated = run.sft_config["rows"]["train"]["hallucinated"]
    run.log(f"Base model: {config.model_name}{f', {quantization}' if quantization else ''}")
    run.log(
        f"LoRA: r={config.lora_r}, alpha={config.lora_alpha:g}; "
        f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})"
    )
    which = " (their numbers: training_stats.json)" if config.val_fraction is not None else ""
    run.log(
        f"Data: {plural(len(run.train_set), 'training row')}, {plural(len(run.val_set), 'validation row')}{which}; "
        f"{plural(n_hallucinated, 'hallucinated row')} kept for Stage B"
    )
    run.log(
        f"Plan: {plural(plan.total_steps, 'step')} in {plural(config.num_epochs, 'epoch')}, "
        f"{plan.rows_per_step} rows each (batch {config.batch_size} "
        f"x accumulation {config.gradient_accumulation_steps} x processes {plan.n_processes})"
    )


def why_it_ended(run: "Run") -> str:
    """Why there is no further epoch, and how to get one."""
    n_done = len(run.progress.epochs)
    if n_done >= run.config.num_epochs:
        return f"{plural(n_done, 'epoch')} of {n_done} done; a higher --num_epochs continues the run"
    best = best_epoch(run.progress.epochs)
    patience = run.config.early_stopping_patience
    return (
        f"Val Loss was not below that of epoch {best['epoch']} ({best['val_loss']:.4f}) for"
        f" {plural(n_done - best['epoch'], 'epoch')} (--early_stopping_patience {patience})"
    )


def advise(config: TrainConfig, progress: "TrainingProgress") -> list[str]:
    """What the losses tell a reader, with the options to try: none that the run is beyond already."""
    untrained = progress.untrained_val_loss
    best = best_epoch(progress.epochs)
    last = progress.epochs[-1]
    advice = []
    # After a single step the losses say nothing yet
    if progress.step > 1 and best["val_loss"] > untrained:
        fix = f"lower --learning_rate (now {config.learning_rate:g})"
        if config.learning_rate <= 1e-5:
            fix = "check the rows: python sft_dataset.py"
        advice.append(f"Val Loss rose above the untrained model's ({untrained:.4f}): {fix}")
    elif progress.step > 1 and best["val_loss"] > 0.98 * untrained:
        choices = {
            "--num_epochs 3": config.num_epochs < 3,
            "--learning_rate 5e-4": config.learning_rate < 5e-4,
            "--lora_r 32": config.lora_r < 32,
            "--target_modules all-linear": config.target_modules != ["all-linear"],
        }
        fixes = [fix for fix, is_more in choices.items() if is_more] or ["more rows"]
        advice.append(f"Val Loss barely moved: try {', '.join(fixes[:3])}")
    if last["epoch"] > best["epoch"] and last["train_loss"] < best["train_loss"]:
        advice.append(
            f"Overfitting after epoch {best['epoch']}: Train Loss kept falling while Val Loss rose; "
            f"try --num_epochs {best['epoch']} or more data"
        )
    if progress.skipped_steps:
        advice.append(
            f"{plural(progress.skipped_steps, 'step')} skipped because a float16 gradient overflowed; --dtype bfloat16 avoids it"
        )
    return advice


def load_figure() -> type:
    """matplotlib's Figure, which needs no pyplot and no backend: that is one for the whole process. The
    environment may name one that is not installed here (a notebook's), of which the first import would fail;
    one that is stays the program's."""
    is_first = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend and is_first:
        from matplotlib import rcParams

        with contextlib.suppress(ValueError):
            rcParams["backend"] = backend
    return Figure


def draw_losses(metrics: list[dict], untrained: float, epochs: list[dict], steps_per_epoch: int) -> bytes:
    """loss_curve.png: training loss by step, validation loss by epoch, the kept epoch marked."""
    ends = [epoch["epoch"] * steps_per_epoch for epoch in epochs]
    middles = [end - steps_per_epoch / 2 for end in ends]
    best = best_epoch(epochs)
    train_losses = [epoch["train_loss"] for epoch in epochs]
    val_losses = [untrained, *(epoch["val_loss"] for epoch in epochs)]
    steps = [line["step"] for line in metrics]
    step_losses = [line["loss"] for line in metrics]

    figure = load_figure()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, step_losses, color="tab:blue", alpha=0.35, linewidth=1, label="train, each step")
    axes.plot(middles, train_losses, "o-", color="tab:blue", label="train, epoch mean")
    axes.plot([0, *ends], val_losses, "s-", color="tab:orange", label="validation")
    kept = f"kept: epoch {best['epoch']}, {best['val_loss']:.3f}"
    axes.plot(ends[best["epoch"] - 1], best["val_loss"], "*", markersize=18, color="tab:green", label=kept)
    axes.set(
        xlabel="step", ylabel="loss (nats per target token)", title="Stage A: training and validation loss"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def model_card(
    sft_config: dict, base_name: str, target_modules: list[str], untrained: float, epochs: list[dict]
) -> str:
    """README.md of an adapter folder: where it comes from and what it is not for. No note text, no absolute
    path."""
    import yaml

    config = sft_config["training"]
    counts = sft_config["rows"]["train"]
    n_parts = sft_config["rows"].get("parts", {}).get("used", 0)
    parts = f", and on {n_parts:,} of their sentences with parts of the notes" if n_parts else ""
    lines = [
        f"| {epoch['epoch']} | {epoch['train_loss']:.4f} | {epoch['val_loss']:.4f} |" for epoch in epochs
    ]
    losses = "\n".join(lines)
    front = {"library_name": "peft", "base_model": base_name, "pipeline_tag": "text-generation"}
    public_name = sft_config.get("base_public_name")
    known_as = f" (`{public_name}`)" if public_name else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Clinical summary adapter (Stage A, supervised fine-tuning)

A LoRA adapter (r={config["lora_r"]}, alpha={config["lora_alpha"]:g}, on {", ".join(target_modules)}) that makes
`{" ".join(base_name.split())}`{known_as} summarize clinical notes. Trained on {counts["used"]:,} factual pairs of note and summary{parts};
{counts["hallucinated"]:,} hallucinated pairs were left out.

| epoch | train loss | validation loss |
|---|---|---|
| 0 (untrained) | | {untrained:.4f} |
{losses}

Losses are cross-entropy in nats per summary token. `sft_config.json` holds the prompt, the whole configuration and
SHA-256 checksums of data and base weights.

**Limits.** The model can still state things the note does not say. A clinician must check every summary against its
note. The weights may hold traces of the notes they were trained on: treat this folder as patient data.

    python sft_inference.py --model_path THIS_FOLDER --clinical_note "..."
"""
