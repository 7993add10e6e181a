"""What a run checks before the slow imports, so that a wrong option or file is refused at once. Writes
nothing."""

import os
from importlib.util import find_spec
from pathlib import Path

from sft.cli import InputError
from sft.data.dataset import read_data
from sft.data.rows import Row
from sft.options import TrainConfig, check_config, quantization_of
from sft.training.checkpoint import check_output_dir


def check_inputs(config: TrainConfig) -> tuple[tuple[list[Row], list[Row]], Path | None]:
    """((training rows, validation rows), the checkpoint to resume from, if any). Raises InputError."""
    check_config(config)
    checkpoint = None if config.dry_run else check_output_dir(config)
    check_options(config)
    return read_data(config), checkpoint


def check_options(config: TrainConfig) -> None:
    """Raises InputError for options that exclude each other, or that this environment cannot serve."""
    if config.report_to != "none" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problem = "--report_to tensorboard: tensorboardX is not installed"
        raise InputError(problem, "run: pip install tensorboardX")
    if quantization_of(config.use_8bit, config.use_4bit) and config.shard_base:
        raise InputError("--shard_base cannot be combined with --use_8bit or --use_4bit", "choose one")
    # accelerate sets these for a configuration that would take over division, clipping and optimizer of the
    # loop
    if "true" in (os.environ.get("ACCELERATE_USE_DEEPSPEED"), os.environ.get("ACCELERATE_USE_FSDP")):
        fix = "use accelerate launch --multi_gpu, and --shard_base"
        raise InputError("accelerate's FSDP and DeepSpeed do not fit this training loop", fix)
