"""What may come between a run and its end: signals, too little memory, numbers that are not finite."""

import math
from collections.abc import Callable, Sequence

from sft.cli import InputError, RunError, Stopped, preview_list, safe_id
from sft.training.checkpoint import newest_checkpoint, save_checkpoint


def stop_if_asked(run) -> None:
    """Saves and leaves once one of the processes has had SIGTERM or Ctrl-C. Raises Stopped."""
    import torch

    number = max(run.signals, default=0)
    if run.accelerator.num_processes > 1:
        number = int(run.accelerator.gather(torch.tensor([number], device=run.accelerator.device)).max())
    if not number:
        return
    where = f"stopped after update {run.progress.step:,} of {run.plan.total_steps:,}"
    if run.progress.step:
        folder = save_checkpoint(run, f"checkpoint_step_{run.progress.step}")
        where += f"; saved to {folder}"
    raise Stopped(
        number, f"{where}\nThe same command with --resume (and without --overwrite) goes on from there"
    )


def retry_on_oom(run, work: Callable):
    """`work()`; where memory runs out, again with half as many rows in a forward pass and twice as many passes: the same
    rows make an update, so the mathematics stays. Raises RunError where that does not help."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not (should_reduce_batch_size(error) or isinstance(error, MemoryError)):
                raise
        # Here, after the except clause, the failed pass and its activations are gone
        rows = run.progress.micro_batch_size
        if rows == 1 or run.accelerator.num_processes > 1:
            rows = f"{rows} row{'s' * (rows > 1)} of up to {run.config.max_length} tokens in a forward pass"
            fix = "--gradient_checkpointing, --use_4bit or a smaller --max_length"
            if run.accelerator.num_processes > 1:
                fix = f"start anew with half the --batch_size and twice the --gradient_accumulation_steps; or {fix}"
            raise RunError(f"out of memory with {rows}", fix)
        run.optimizer.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        run.progress.micro_batch_size = math.ceil(rows / 2)
        run.say(
            f"out of memory with up to {rows} rows in a forward pass: going on with {run.progress.micro_batch_size}, and more passes"
        )


def check_finite(run, step: int, loss: float, grad_norm: float, examples: Sequence) -> None:
    """Stops a run whose loss or gradient is not finite, before it spoils the weights; float16 overflow is only counted."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if math.isfinite(loss) and run.scaler.is_enabled() and run.scaler.get_scale() > 1:
        run.progress.skipped_updates += 1  # the scale is halved, until it fits
        return
    ids = preview_list((safe_id(example.row_id) for example in examples), 16)
    raise RunError(
        f"update {step + 1}: loss {loss}, gradient norm {grad_norm}; its rows have the ids {ids}",
        advice_for_faults(run),
    )


def advice_for_faults(run) -> str:
    try:
        saved = f"{newest_checkpoint(run.output_dir).name} is whole"
    except (InputError, AttributeError):  # torn, or none
        saved = "nothing is saved yet"
    advice = f"start anew with a lower --learning_rate (now {run.config.learning_rate:g}) or --dtype float32"
    return f"{advice}, in another --output_dir or with --overwrite; {saved}"
