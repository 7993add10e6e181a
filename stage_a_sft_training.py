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
from collections.abc import Sequence

from sft.cli import RunError, noted_signals, plural, run_script
from sft.data.dataset import (
    Batch,
    Example,
)
from sft.files import disk_full_as_input_error, write_atomic
from sft.options import TrainConfig, parse_options
from sft.training.checkpoint import promote_best_epoch, save_checkpoint
from sft.training.faults import advice_for_faults, check_finite, retry_on_oom, stop_if_asked
from sft.training.report import ProgressBar, advise, best_epoch, draw_losses, duration
from sft.training.run import Run, set_up, timed

# ------------------------------------------------------------------------------------------------ pure functions


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
    from sft.model.kernels import SummedCrossEntropy

    logits = model(**batch.inputs, use_cache=False).logits  # packed (1, n_target_tokens, vocabulary)
    logits = (
        logits[0] if batch.target_positions is None else logits.flatten(0, 1)[batch.target_positions]
    )  # (n_target_tokens, vocabulary)
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
            for share in run.micro_batches(
                ordered[start : start + size * accelerator.num_processes], accelerator.process_index
            ):
                batch = run.make_batch(share or ordered[:1]).to(
                    accelerator.device
                )  # one with no rows left takes part, weighing nothing
                losses.append(summed_loss(run.model, batch) * bool(share))
            if accelerator.num_processes == 1:  # else all would have to leave at the same place
                stop_if_asked(run)
    run.model.train()
    total = accelerator.reduce(
        torch.tensor(sum(torch.stack(losses).tolist()), device=accelerator.device)
    ).item()
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
            loss = summed_loss(run.wrapped, batch) * bool(
                micro_batch
            )  # a process with no rows left takes part, weighing nothing
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
    loss_sum = retry_on_oom(run, lambda: gradients(run, step, examples, n_target_tokens))
    if any(parameter.grad is None for parameter in run.parameters):
        raise RunError(
            "some LoRA weights get no gradient",
            "use other --target_modules, or leave out --use_4bit and --use_8bit",
        )
    if (
        accelerator.num_processes > 1 and run.wrapped is run.model
    ):  # a split base has no DDP around it to do this
        for parameter in run.parameters:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm or math.inf)
    loss, grad_norm = torch.stack(
        (accelerator.reduce(loss_sum) / n_target_tokens, grad_norm)
    ).tolist()  # the one wait for a GPU
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

    Raises InputError for what the user can fix, RunError where it cannot go on, Stopped after SIGTERM or Ctrl-C.
    """
    run = set_up(config)
    if config.dry_run:
        return dry_run(run)
    progress, plan, say = run.progress, run.plan, run.say
    with noted_signals() as run.signals:
        if progress.untrained_val_loss is None:
            progress.untrained_val_loss = retry_on_oom(run, lambda: evaluate(run, run.val_set.examples))
            say(f"Untrained Val Loss: {progress.untrained_val_loss:.4f}")

        while len(progress.epochs) < config.num_epochs and not progress.out_of_patience(
            config.early_stopping_patience
        ):
            epoch = len(progress.epochs) + 1
            say(f"\nEpoch {epoch}/{config.num_epochs}\n{'=' * 60}")
            bar = ProgressBar(
                plan.steps_per_epoch,
                progress.step - (epoch - 1) * plan.steps_per_epoch,
                not run.accelerator.is_main_process,
            )
            while progress.step < epoch * plan.steps_per_epoch:
                seconds, metrics = timed(lambda: update(run, progress.step))
                progress.add(metrics, seconds)
                run.write_metrics(metrics)
                bar.update(metrics["loss"], progress.n_tokens / progress.seconds)
                if (
                    config.save_steps
                    and progress.step % config.save_steps == 0
                    and progress.step % plan.steps_per_epoch
                ):
                    save_checkpoint(run, f"checkpoint_step_{progress.step}")
                stop_if_asked(run)
            bar.close()
            val_loss = retry_on_oom(run, lambda: evaluate(run, run.val_set.examples))
            progress.end_epoch(
                epoch,
                val_loss,
                learning_rate_at(progress.step - 1, plan.total_steps, config),
                run.peak_memory_mb(),
            )
            say(
                "Train Loss: {train_loss:.4f}\nVal Loss: {val_loss:.4f}\nLearning Rate: {learning_rate:.2e}".format(
                    **progress.epochs[-1]
                )
            )
            folder = save_checkpoint(run, f"checkpoint_epoch_{epoch}")
            say(f"Saved checkpoint to {folder}")
            run.write_stats()
        finish(run)
    return run.stats()


def dry_run(run: "Run") -> dict:
    """Does the update with the largest forward pass, then a usual one and a validation, and says what the whole run would
    take. The weights it changes are thrown away; nothing is written. Returns the numbers it says."""
    config, plan, train_examples, val_examples = (
        run.config,
        run.plan,
        run.train_set.examples,
        run.val_set.examples,
    )

    def largest_pass(step: int) -> int:
        examples = [train_examples[i] for i in plan.rows(step)]
        passes = [
            batch for process in range(plan.n_processes) for batch in run.micro_batches(examples, process)
        ]
        if run.padded:
            return max(
                len(batch) * max((example.n_tokens for example in batch), default=0) for batch in passes
            )
        return max(sum(example.n_tokens for example in batch) for batch in passes)

    steps = sorted(range(plan.total_steps), key=largest_pass)
    update(run, steps[-1])
    update_seconds, metrics = timed(lambda: update(run, steps[len(steps) // 2]))
    some_examples = sorted(val_examples, key=lambda example: example.n_tokens)[
        :: max(1, len(val_examples) // config.batch_size)
    ]
    validation_seconds, _ = timed(lambda: retry_on_oom(run, lambda: evaluate(run, some_examples)))
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
        "  a usual update takes {seconds_per_update:.1f} s ({tokens_per_second:,.0f} tokens/s)".format(
            **measured
        )
    )
    run.say(
        f"  the whole run about {duration(seconds)}: {plural(config.num_epochs, 'epoch')}, {config.num_epochs + 1} validations"
    )
    return measured


# ------------------------------------------------------------------------------------------------ before the loop


# ------------------------------------------------------------------------------------------------ after the loop


def finish(run: Run) -> None:
    """Keeps the best epoch as final_model, draws the losses and says how the run went."""
    if run.accelerator.is_main_process:
        run.progress.kept_epoch = promote_best_epoch(run.output_dir, run.progress.epochs)
        run.write_stats()
        metrics = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
        with disk_full_as_input_error(run.output_dir):
            write_atomic(
                run.output_dir / "loss_curve.png",
                draw_losses(
                    metrics, run.progress.untrained_val_loss, run.progress.epochs, run.plan.steps_per_epoch
                ),
            )
    best = run.progress.epochs[run.progress.kept_epoch - 1]
    lowest = "the lowest" if best is best_epoch(run.progress.epochs) else "the lowest that is whole,"
    run.say("\nTraining completed!")
    run.say(
        f"Saved final model to {run.output_dir / 'final_model'} (epoch {best['epoch']}, {lowest} Val Loss: {best['val_loss']:.4f})"
    )
    for advice in advise(run.progress.untrained_val_loss, run.progress.epochs, run.progress.skipped_updates):
        run.say(advice)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


def main() -> None:
    train(
        parse_options(
            TrainConfig,
            "Trains a LoRA adapter on the factual rows of a CSV (Stage A, supervised fine-tuning).",
        )
    )


if __name__ == "__main__":
    run_script(main)
