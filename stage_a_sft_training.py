"""Stage A: trains a LoRA adapter on the factual rows of a CSV, with a loop written out by hand.

    python stage_a_sft_training.py                                  # bundled model, bundled data
    python stage_a_sft_training.py --train_csv my_train.csv --val_csv my_val.csv --model_name FOLDER_OR_HUB_ID

What happens at a step depends on the seed and the step alone (order of rows, dropout, learning rate), so a
resumed run is the run that was never interrupted. sft/training/ holds what surrounds the loop.

torch is imported inside the functions: so that `--help` and wrong options respond immediately."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sft.cli import Progress, RunError, noted_signals, plural, run_script
from sft.data.dataset import Batch, Example, read_data
from sft.files import write_atomic
from sft.options import TrainConfig, check_config, parse_options
from sft.training.checkpoint import (
    begin,
    check_output_dir,
    is_finished,
    output_lock,
    promote_best_epoch,
    save_checkpoint,
)
from sft.training.checks import check_options
from sft.training.faults import advice_for_faults, check_finite, retry_on_oom, stop_if_asked
from sft.training.recipes import resolve
from sft.training.report import (
    MERITS,
    advise,
    best_first,
    draw_losses,
    duration,
    log_plan,
    optional,
    why_it_ended,
)
from sft.training.samples import count_endings, sample_notes

if TYPE_CHECKING:
    import torch

    from sft.training.run import Run


# ------------------------------------------------------------------------------- pure functions


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of `step` (0-based): linear warmup, then cosine, linear or no decay."""
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    left = 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)
    shapes = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}
    return config.learning_rate * shapes[config.lr_scheduler]


def dropout_seed(*numbers: int) -> int:
    """A seed that depends on all the numbers: seed, step, forward pass, process."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def timed(work: Callable) -> tuple[float, object]:
    """(seconds that `work()` took, what it returned)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def summed_loss(model: "torch.nn.Module", batch: Batch) -> "torch.Tensor":
    """Cross-entropy in nats, summed over the batch's target tokens: a float32 scalar."""
    from sft.model.kernels import SummedCrossEntropy

    logits = model(**batch.inputs, use_cache=False).logits
    if batch.target_positions is None:
        # Packed: the model computed logits for targets alone, (1, n_target_tokens, vocabulary)
        logits = logits[0]
    else:
        logits = logits.flatten(0, 1)[batch.target_positions]
    return SummedCrossEntropy.apply(logits, batch.targets)


# ------------------------------------------------------------------------------- one step


def gradients(run: "Run", step: int, examples: list[Example], n_target_tokens: int) -> "torch.Tensor":
    """Forward and backward over this process's share of a step's rows. Returns its summed loss, a scalar."""
    import torch

    accelerator = run.accelerator
    loss_sum = torch.zeros((), device=accelerator.device)
    for j, (batch, weight, is_last) in enumerate(run.batches(examples)):
        torch.manual_seed(dropout_seed(run.config.seed, step, j, accelerator.process_index))
        with contextlib.nullcontext() if is_last else accelerator.no_sync(run.wrapped):
            loss = summed_loss(run.wrapped, batch) * weight
            # The mean over the step's target tokens; DDP averages over the processes, which is undone here
            mean_loss = loss * accelerator.num_processes / n_target_tokens
            accelerator.backward(run.scaler.scale(mean_loss))
        loss_sum += loss.detach()
    return loss_sum


def train_step(run: "Run", step: int) -> dict:
    """One optimizer step: the gradients of its rows, then AdamW. Returns its line of metrics."""
    import torch

    config = run.config
    accelerator = run.accelerator

    # The learning rate is a function of the step alone
    learning_rate = learning_rate_at(step, run.plan.total_steps, config)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate

    # Forward and backward; the loss is divided by the target tokens of all processes
    examples = [run.examples[i] for i in run.plan.rows(step)]
    n_target_tokens = sum(example.n_target_tokens for example in examples)
    loss_sum = retry_on_oom(run, lambda: gradients(run, step, examples, n_target_tokens))
    if any(parameter.grad is None for parameter in run.parameters):
        fix = "use different --target_modules, or --quantization none"
        raise RunError("some LoRA weights get no gradient", fix)
    # A sharded base has no DDP around it to average the gradients
    if accelerator.num_processes > 1 and run.wrapped is run.model:
        for parameter in run.parameters:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")

    # Clip, check, step; the conversion to Python numbers is the only wait for a GPU
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm or math.inf)
    mean_loss = accelerator.reduce(loss_sum) / n_target_tokens
    loss, grad_norm = torch.stack((mean_loss, grad_norm)).tolist()
    check_finite(run, step, loss, grad_norm, examples)
    run.scaler.step(run.optimizer)  # skipped if a float16 gradient overflowed
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "epoch": step // run.plan.steps_per_epoch + 1,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "n_examples": len(examples),
        "n_tokens": sum(example.n_tokens for example in examples),
        "n_target_tokens": n_target_tokens,
    }


def evaluate(run: "Run", examples: Sequence[Example]) -> float:
    """Validation loss: cross-entropy in nats per target token over all `examples`, whatever the batch size
    and the number of processes."""
    import torch

    accelerator = run.accelerator
    ordered = sorted(examples, key=lambda example: example.n_tokens)
    n_rows = run.progress.micro_batch_size * accelerator.num_processes
    losses = []
    run.model.eval()
    with torch.no_grad():
        for start in range(0, len(ordered), n_rows):
            for batch, weight, _ in run.batches(ordered[start : start + n_rows]):
                losses.append(summed_loss(run.model, batch) * weight)
            # Of several processes, all would have to leave at the same place
            if accelerator.num_processes == 1:
                stop_if_asked(run)
    run.model.train()
    local_sum = sum(torch.stack(losses).tolist())
    total = accelerator.reduce(torch.tensor(local_sum, device=accelerator.device)).item()
    loss = total / sum(example.n_target_tokens for example in examples)
    if not math.isfinite(loss):
        raise RunError(f"the validation loss is {loss}", advice_for_faults(run))
    return loss


# ------------------------------------------------------------------------------- the loop


def train(config: TrainConfig, on_step: Callable[["Run", dict], None] | None = None) -> dict:
    """A whole run; returns what training_stats.json holds (with dry_run, what `dry_run` measured).

    `on_step(run, metrics)` is called after each step. Raises InputError for what the user can fix, RunError
    if the run cannot continue, Stopped after SIGTERM, SIGHUP or Ctrl-C."""
    check_config(config)
    config = resolve(config)
    with output_lock(config):
        # Checked before the slow imports: options, output folder, rows
        checkpoint = None if config.dry_run else check_output_dir(config)
        check_options(config)
        rows = read_data(config)
        from sft.model.base import own_settings
        from sft.training.set_up import set_up

        with own_settings():
            run = set_up(config, rows, checkpoint)
            log_plan(run)
            if config.dry_run:
                return dry_run(run)
            begin(run, checkpoint)
            if checkpoint and is_finished(run):
                run.log(f"Nothing is left to train: {why_it_ended(run)}")
            else:
                with noted_signals() as run.signals:
                    train_epochs(run, on_step)
                    finish(run)
            run.close()
            return run.stats()


def train_epochs(run: "Run", on_step: Callable[["Run", dict], None] | None) -> None:
    """The epochs that are left, each with its validation and its checkpoint."""
    config = run.config
    progress = run.progress
    if progress.untrained_val_loss is None:
        # What the base model (or the adapter to start from) can do, before the first step
        progress.untrained_val_loss = retry_on_oom(run, lambda: evaluate(run, run.val_set.examples))
        run.write_metrics({"step": 0, "epoch": 0, "val_loss": progress.untrained_val_loss})
        whose = "Starting" if config.init_adapter else "Untrained"
        run.log(f"{whose} Val Loss: {progress.untrained_val_loss:.4f}")
    if progress.step:
        log_other_schedule(run)

    while len(progress.epochs) < config.num_epochs and not progress.out_of_patience(config):
        train_epoch(run, on_step)

        # Validate, save
        n_done = len(progress.epochs) + 1
        learning_rate = learning_rate_at(progress.step - 1, run.plan.total_steps, config)
        values = {"val_loss": retry_on_oom(run, lambda: evaluate(run, run.val_set.examples))}
        scores = sample_notes(run, n_done) if config.n_sample_notes else {}
        run.write_metrics({"step": progress.step, "epoch": n_done, **values, **scores})
        values |= {"learning_rate": learning_rate, "peak_memory_mb": run.peak_memory_mb(), **scores}
        epoch = progress.end_epoch(config.keep_best, **values)
        run.log(f"Train Loss: {epoch['train_loss']:.4f}")
        run.log(f"Val Loss: {epoch['val_loss']:.4f}")
        if scores:
            run.log(
                f"ROUGE-L: {scores['rouge_l']:.4f}, Check Score: {scores['check_score']:.4f}, "
                f"Coverage: {scores['coverage']:.4f}"
            )
        run.log(f"Learning Rate: {learning_rate:.2e}")
        folder = save_checkpoint(run, f"checkpoint_epoch_{n_done}")
        run.log(f"Saved checkpoint to {folder}")
        run.write_stats()


def log_other_schedule(run: "Run") -> None:
    """Says so if a resumed run has more epochs than it was planned with: its learning rate jumps."""
    step = run.progress.step
    was = run.optimizer.param_groups[0]["lr"]
    planned, rate = (learning_rate_at(i, run.plan.total_steps, run.config) for i in (step - 1, step))
    if step < run.plan.total_steps and not math.isclose(was, planned):
        run.log(
            f"warning: the run had another --num_epochs before: the learning rate goes from {was:.2e} to {rate:.2e},"
            f" and the result is not that of {run.config.num_epochs} epochs at once"
        )


def train_epoch(run: "Run", on_step: Callable[["Run", dict], None] | None) -> None:
    """The steps of an epoch that are left, with checkpoints every --save_steps."""
    progress = run.progress
    plan = run.plan
    save_steps = run.config.save_steps
    epoch = len(progress.epochs) + 1
    run.log(f"\nEpoch {epoch}/{run.config.num_epochs}\n{'=' * 60}")
    n_done = progress.step - (epoch - 1) * plan.steps_per_epoch
    bar = Progress(plan.steps_per_epoch, "step", done=n_done, scope=" in this epoch")
    with contextlib.closing(bar):
        while progress.step < epoch * plan.steps_per_epoch:
            seconds, metrics = timed(lambda: train_step(run, progress.step))
            progress.add(metrics, seconds)
            run.write_metrics(metrics)
            tokens_per_second = progress.n_tokens / progress.seconds
            bar.advance(f"loss {metrics['loss']:.3f}, {tokens_per_second:,.0f} tokens/s")
            inside_epoch = progress.step % plan.steps_per_epoch
            if save_steps and progress.step % save_steps == 0 and inside_epoch:
                save_checkpoint(run, f"checkpoint_step_{progress.step}")
            if on_step:
                on_step(run, metrics)
            stop_if_asked(run)


def finish(run: "Run") -> None:
    """Keeps the best epoch as final_model, draws the losses and says how the run went."""
    progress = run.progress
    config = run.config
    if run.accelerator.is_main_process:
        progress.kept_epoch = promote_best_epoch(run)
        run.write_stats()
        with optional("loss_curve.png"):
            lines = map(json.loads, (run.output_dir / "metrics.jsonl").read_text().splitlines())
            steps = [values for values in lines if "loss" in values]
            image = draw_losses(steps, run.stats(), run.plan.steps_per_epoch)
            write_atomic(run.output_dir / "loss_curve.png", image)
    if len(progress.epochs) < config.num_epochs:
        run.log(f"\nStopped: {why_it_ended(run)}")
    kept = progress.epochs[progress.kept_epoch - 1]
    name, title, is_more_better = MERITS[config.keep_best]
    is_best = kept[name] == best_first(progress.epochs, config.keep_best)[0][name]
    merit = f"the {'highest' if is_more_better else 'lowest'} {title}{'' if is_best else ' among complete checkpoints'}"
    run.log("\nTraining completed!")
    run.log(
        f"Saved final model to {run.output_dir / 'final_model'} (epoch {kept['epoch']}, {merit}: {kept[name]:.4f})"
    )
    for advice in advise(config, progress):
        run.log(advice)
    is_sharded = config.shard_base and run.accelerator.num_processes > 1
    if run.accelerator.is_main_process and not is_sharded:
        with optional("check whether summaries end"):
            n_ended, n_notes = count_endings(run)
            if 2 * n_ended < n_notes:
                run.log(
                    f"WARNING: {n_notes - n_ended} of {n_notes} summaries of validation notes did not come to an end;"
                    " train longer, or use an instruct model as base"
                )


def dry_run(run: "Run") -> dict:
    """Does the step with the largest forward pass, a typical one and a validation; says and returns what the
    whole run would take. Nothing is written."""
    config = run.config
    n_validations = config.num_epochs + 1

    def largest_pass(step: int) -> int:
        examples = [run.examples[i] for i in run.plan.rows(step)]
        passes = [b for process in range(run.plan.n_processes) for b in run.micro_batches(examples, process)]
        lengths = [[example.n_tokens for example in batch] for batch in passes]
        return max(sum(n) if run.packed else len(n) * max(n, default=0) for n in lengths)

    steps = sorted(range(run.plan.total_steps), key=largest_pass)
    train_step(run, steps[-1])
    step_seconds, metrics = timed(lambda: train_step(run, steps[len(steps) // 2]))

    # A share of the validation rows, of all lengths
    by_length = sorted(run.val_set.examples, key=lambda example: example.n_tokens)
    sample = by_length[:: max(1, len(by_length) // config.batch_size)]
    val_seconds, _ = timed(lambda: retry_on_oom(run, lambda: evaluate(run, sample)))
    val_seconds *= sum(e.n_tokens for e in by_length) / sum(e.n_tokens for e in sample)

    tokens_per_second = metrics["n_tokens"] / step_seconds
    epoch_seconds = sum(example.n_tokens for example in run.examples) / tokens_per_second
    measured = {
        "total_steps": run.plan.total_steps,
        "trainable_parameters": run.model.get_nb_trainable_parameters()[0],
        "micro_batch_size": run.progress.micro_batch_size,
        "largest_forward_pass_tokens": largest_pass(steps[-1]),
        "peak_memory_mb": run.peak_memory_mb(),
        "seconds_per_step": step_seconds,
        "tokens_per_second": tokens_per_second,
        "estimated_seconds": config.num_epochs * epoch_seconds + n_validations * val_seconds,
    }
    run.log(
        "\nDry run passed: the data and the model can be used; nothing was written\n"
        f"  largest forward pass: {measured['largest_forward_pass_tokens']:,} tokens, "
        f"peak memory {measured['peak_memory_mb']:,.0f} MB\n"
        f"  a typical step takes {step_seconds:.1f} s ({tokens_per_second:,.0f} tokens/s)\n"
        f"  the whole run will take about {duration(measured['estimated_seconds'])}: "
        f"{plural(config.num_epochs, 'epoch')}, {n_validations} validations"
    )
    return measured


def main() -> None:
    description = "Trains a LoRA adapter on the factual rows of a CSV (Stage A, supervised fine-tuning)."
    train(parse_options(TrainConfig, description))


if __name__ == "__main__":
    run_script(main)
