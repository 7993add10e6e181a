"""What a training run tells people: progress, advice, the loss curve, the model card. No note text, no absolute path."""

import contextlib
import io
import sys
import time

from sft.cli import log


def duration(seconds: float) -> str:
    """ "40 s", "5 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def best_epoch(epochs: list[dict]) -> dict:
    """The epoch (an entry of training_stats.json) with the lowest validation loss."""
    return min(epochs, key=lambda epoch: epoch["val_loss"])


def advise(untrained: float, epochs: list[dict], skipped_updates: int = 0) -> list[str]:
    """What the losses tell a reader, with the flag to try."""
    best, last, advice = best_epoch(epochs), epochs[-1], []
    if best["val_loss"] > untrained:
        advice.append(f"Val Loss rose above the untrained model's ({untrained:.4f}): lower --learning_rate")
    elif best["val_loss"] > 0.98 * untrained:
        advice.append("Val Loss barely moved: try --num_epochs 3, --learning_rate 5e-4 or --lora_r 32")
    if last["epoch"] > best["epoch"] and last["train_loss"] < best["train_loss"]:
        advice.append(
            f"Overfitting after epoch {best['epoch']}: Train Loss fell on while Val Loss rose; try --num_epochs {best['epoch']} or more data"
        )
    if skipped_updates:
        advice.append(
            f"{skipped_updates} updates were skipped because a float16 gradient overflowed; --dtype bfloat16 avoids it"
        )
    return advice


def draw_losses(metrics: list[dict], untrained: float, epochs: list[dict], steps_per_epoch: int) -> bytes:
    """loss_curve.png: training loss by update, validation loss by epoch, the kept epoch marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ends = [epoch["epoch"] * steps_per_epoch for epoch in epochs]
    best, half = best_epoch(epochs), ends[0] / 2
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(
        [line["step"] for line in metrics],
        [line["loss"] for line in metrics],
        color="tab:blue",
        alpha=0.35,
        linewidth=1,
        label="train, each update",
    )
    axes.plot(
        [end - half for end in ends],
        [epoch["train_loss"] for epoch in epochs],
        "o-",
        color="tab:blue",
        label="train, epoch mean",
    )
    validation = [untrained, *(epoch["val_loss"] for epoch in epochs)]
    axes.plot([0, *ends], validation, "s-", color="tab:orange", label="validation")
    axes.plot(
        ends[best["epoch"] - 1],
        best["val_loss"],
        "*",
        markersize=18,
        color="tab:green",
        label=f"kept: epoch {best['epoch']}, {best['val_loss']:.3f}",
    )
    axes.set(
        xlabel="update", ylabel="loss (nats per target token)", title="Stage A: training and validation loss"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    return image.getvalue()


def model_card(
    sft_config: dict, base_name: str, target_modules: list[str], untrained: float, epochs: list[dict]
) -> str:
    """README.md of an adapter folder: where it comes from and what it is not for. No note text, no absolute path."""
    config, counts = sft_config["training"], sft_config["rows"]["train"]
    losses = "\n".join(f"| {e['epoch']} | {e['train_loss']:.4f} | {e['val_loss']:.4f} |" for e in epochs)
    return f"""---
library_name: peft
base_model: {base_name}
pipeline_tag: text-generation
---

# Clinical summary adapter (Stage A, supervised fine-tuning)

A LoRA adapter (r={config["lora_r"]}, alpha={config["lora_alpha"]:g}, on {", ".join(target_modules)}) that makes
`{base_name}` summarise clinical notes. Trained on {counts["used"]:,} factual pairs of note and summary;
{counts["hallucinated"]:,} hallucinated pairs were left out.

| epoch | train loss | validation loss |
|---|---|---|
| 0 (untrained) | | {untrained:.4f} |
{losses}

Losses are cross-entropy in nats per summary token. `sft_config.json` holds the prompt, the whole configuration and
SHA-256 sums of data and base weights.

**Limits.** It can still state what a note does not say. Every summary needs a clinician's reading beside the note. The
weights may hold traces of the notes they were trained on: treat this folder as patient data.

    python sft_inference.py --model_path THIS_FOLDER --clinical_note "..."
"""


class ProgressBar:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere a line every half minute."""

    def __init__(self, total: int, done: int, quiet: bool):
        from tqdm import tqdm

        self.total, self.done, self.first, self.quiet = total, done, done, quiet
        self.started = self.said = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="update",
            file=sys.stderr,
            leave=False,
            disable=True if quiet else None,
        )

    def update(self, loss: float, tokens_per_second: float) -> None:
        self.done += 1
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        with contextlib.suppress(OSError):  # the terminal is gone; the run goes on
            self.bar.update()
        now = time.monotonic()
        if self.bar.disable and not self.quiet and now - self.said > 30:
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            log(
                f"  update {self.done:,}/{self.total:,}, loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, {left / 60:,.1f} min left in this epoch"
            )
            self.said = now

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()
