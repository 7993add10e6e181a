"""What a run checks before the slow imports, so that a wrong option or file is refused at once. Writes
nothing."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from sft.cli import InputError, log, on_main_process
from sft.data.dataset import read_data
from sft.data.rows import Row
from sft.options import TrainConfig, quantization_of
from sft.training.checkpoint import check_output_dir


def check_inputs(config: TrainConfig) -> tuple[tuple[list[Row], list[Row]], Path | None]:
    """((training rows, validation rows), the checkpoint to resume from, if any). Raises InputError."""
    checkpoint = None if config.dry_run else check_output_dir(config)
    check_options(config)
    return read_data(config), checkpoint


def check_options(config: TrainConfig) -> None:
    """Raises InputError for options that exclude each other, or that this environment cannot serve."""
    if config.report_to != "none" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problem = "--report_to tensorboard: tensorboardX is not installed"
        raise InputError(problem, "run: pip install tensorboardX")
    quantization = quantization_of(vars(config))
    if quantization and config.shard_base:
        raise InputError(f"--shard_base cannot be combined with --quantization {quantization}", "choose one")
    # What checkpoints record, and a resumed run is compared with
    config.use_8bit = quantization == "8bit"
    config.use_4bit = quantization == "4bit"
    if config.dry_run and config.resume and on_main_process():
        log("info: --dry_run measures the whole run: --resume has no effect")
    check_accelerate()


# What accelerate's launcher and configuration hand down is not taken by this loop, which has its own
# division, clipping, optimizer, dtype and device; what to do instead
_USE_MULTI_GPU = "use accelerate launch --multi_gpu, and --shard_base"
_ACCELERATE_FIXES = {
    "ACCELERATE_USE_FSDP": _USE_MULTI_GPU,
    "ACCELERATE_USE_DEEPSPEED": _USE_MULTI_GPU,
    "ACCELERATE_USE_MEGATRON_LM": _USE_MULTI_GPU,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use accelerate launch --multi_gpu",
    "ACCELERATE_DYNAMO_BACKEND": "use accelerate launch --dynamo_backend no",
    "ACCELERATE_MIXED_PRECISION": "use accelerate launch --mixed_precision no; --dtype decides",
    "ACCELERATE_TORCH_DEVICE": "unset it; --device decides",
    "ACCELERATE_IN_TPU_POD": "use a GPU or a CPU",
    "ACCELERATE_USE_SAGEMAKER": "use torchrun",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "use torchrun",
}
# Names that are taken, with the values that accelerate can read
_FLAG = "y|yes|t|true|on|1|n|no|f|false|off|0"
_ACCELERATE_TAKEN = {
    "ACCELERATE_USE_CPU": _FLAG,
    "ACCELERATE_DEBUG_MODE": _FLAG,
    "ACCELERATE_CPU_AFFINITY": _FLAG,
    "ACCELERATE_ENABLE_RICH": _FLAG,
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_FP8_BACKEND": "(?!)",  # nothing: no value of these two is harmless
    "ACCELERATE_TORCH_DEVICE": "(?!)",
    "ACCELERATE_LOG_LEVEL": "debug|info|warning|error|critical",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "[0-9]{1,9}",  # the loop's own counts
}
_ASKS_FOR_NOTHING = "0|no|false"  # of the others; on an empty one accelerate fails


def check_accelerate() -> None:
    """Raises InputError for a setting of accelerate's that this loop does not take."""
    names = [name for name in os.environ if re.match("ACCELERATE_|FSDP_|PARALLELISM_CONFIG_", name)]
    # First what the others belong to
    for name in sorted(names, key=lambda name: (name not in _ACCELERATE_FIXES, name)):
        value = os.environ[name]
        allowed = _ACCELERATE_TAKEN.get(name, _ASKS_FOR_NOTHING)
        if not re.fullmatch(allowed, value, re.IGNORECASE):
            problem = f"accelerate's setting does not fit this training loop ({name}={value})"
            raise InputError(
                problem, _ACCELERATE_FIXES.get(name, f"unset {name}") if value else f"unset {name}"
            )
