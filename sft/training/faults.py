"""Interruptions of a run: signals, out of memory, non-finite losses. torch is imported inside functions."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sft.cli import InputError, RunError, Stopped, is_out_of_memory, plural, preview_list
from sft.data.dataset import Example
from sft.training.checkpoint import newest_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from sft.training.run import Run


def stop_if_asked(run: "Run") -> None:
    """Saves and leaves once one of the processes has received SIGTERM, SIGHUP or Ctrl-C. Raises Stopped."""
    import torch

    number = max(run.signals, default=0)
    if run.accelerator.num_processes > 1:
        mine = torch.tensor([number], device=run.accelerator.device)
        number = int(run.accelerator.gather(mine).max())
    if not number:
        return
    step = run.progress.step
    message = f"stopped after step {step:,} of {run.plan.total_steps:,}"
    if step:
        folder = save_checkpoint(run, f"checkpoint_step_{step}")
        message += f"; saved to {folder}"
    raise Stopped(
        number, f"{message}\nrun the same command with --resume to continue (and without --overwrite)"
    )


def retry_on_oom(run: "Run", work: Callable):
    """`work()`; if memory runs out, again with half as many rows in a forward pass: the same step but for
    dropout's random numbers. Raises RunError if that does not help."""
    from accelerate.utils.memory import clear_device_cache

    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except clause, where the failed pass and its activations are freed
        n_rows = run.progress.micro_batch_size
        if n_rows == 1 or run.accelerator.num_processes > 1:
            rows = f"{plural(n_rows, 'row')} of up to {run.config.max_length} tokens in a forward pass"
            fix = "use --gradient_checkpointing, --quantization 4bit or a smaller --max_length"
            if run.accelerator.num_processes > 1:
                fix = f"start again with half the --batch_size and twice the --gradient_accumulation_steps; or {fix}"
            raise RunError(f"out of memory with {rows}", fix)
        run.optimizer.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        run.progress.micro_batch_size = math.ceil(n_rows / 2)
        smaller = plural(run.progress.micro_batch_size, "row")
        run.log(f"out of memory with up to {n_rows} rows in a forward pass: retrying with {smaller} per pass")


def check_finite(run: "Run", step: int, loss: float, grad_norm: float, examples: Sequence[Example]) -> None:
    """Raises RunError before a loss or gradient that is not finite spoils the weights; counts float16
    overflows."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if math.isfinite(loss) and run.scaler.is_enabled() and run.scaler.get_scale() > 1:
        # The scaler skips the step and halves its scale, until the gradients fit
        run.progress.skipped_steps += 1
        return
    ids = preview_list((example.row_id for example in examples), 16)
    values = f"(loss {loss}, gradient norm {grad_norm})"
    problem = f"step {step + 1}: the loss or gradient is not finite {values}; row ids: {ids}"
    raise RunError(problem, advice_for_faults(run))


def advice_for_faults(run: "Run") -> str:
    """What to do about a loss that is not finite, and what is saved."""
    checkpoint = None
    with contextlib.suppress(InputError):
        checkpoint = newest_checkpoint(run.config)
    saved = f"{checkpoint.name} is complete" if checkpoint else "nothing is saved yet"
    advice = f"start again with a lower --learning_rate (now {run.config.learning_rate:g}) or --dtype float32"
    return f"{advice}, in another --output_dir or with --overwrite; {saved}"
