"""What a run checks before the slow imports, so that a wrong option or file is refused at once. Writes
nothing."""

import os
import re
from importlib.util import find_spec

from sft.cli import InputError, log, on_main_process
from sft.options import TrainConfig, quantization_of


def check_options(config: TrainConfig) -> None:
    """Raises InputError for options that exclude each other, or that this environment cannot serve."""
    if config.report_to != "none" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problem = "--report_to tensorboard: tensorboardX is not installed"
        raise InputError(problem, "run: pip install tensorboardX")
    if config.keep_best != "loss" and not config.n_sample_notes:
        problem = f"--keep_best {config.keep_best} needs the summaries of --n_sample_notes"
        raise InputError(problem, "add --n_sample_notes 8, say")
    quantization = quantization_of(vars(config))
    other = "--n_sample_notes" if config.n_sample_notes else f"--quantization {quantization}"
    if config.shard_base and (quantization or config.n_sample_notes):
        raise InputError(f"--shard_base cannot be combined with {other}", "choose one")
    # What checkpoints record, and a resumed run is compared with
    config.use_8bit = quantization == "8bit"
    config.use_4bit = quantization == "4bit"
    if config.dry_run and config.resume and on_main_process():
        log("info: --dry_run measures the whole run: --resume has no effect")
    check_accelerate()


# What accelerate's launcher and configuration may hand down: nothing that asks for another loop than this
# one, and nothing that accelerate cannot read
_FLAG = "y|yes|t|true|on|1|n|no|f|false|off|0"
_TAKEN = {
    "ACCELERATE_USE_CPU": _FLAG,
    "ACCELERATE_DEBUG_MODE": _FLAG,
    "ACCELERATE_CPU_AFFINITY": _FLAG,
    "ACCELERATE_ENABLE_RICH": _FLAG,
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_LOG_LEVEL": "debug|info|warning|error|critical",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "[0-9]{1,9}",  # the loop's own counts
}
_TAKEN_OF_OTHERS = "0|no|false"


def check_accelerate() -> None:
    """Raises InputError for a setting of accelerate's that this loop does not take: it has its own loss
    division, clipping, optimizer, dtype and device."""
    for name, value in sorted(os.environ.items()):
        is_theirs = re.match("ACCELERATE_|FSDP_|PARALLELISM_CONFIG_", name)
        if is_theirs and not re.fullmatch(_TAKEN.get(name, _TAKEN_OF_OTHERS), value, re.IGNORECASE):
            problem = f"accelerate's setting does not fit this training loop ({name}={value})"
            fix = f"unset {name}; start with torchrun, or accelerate launch --multi_gpu --mixed_precision no"
            raise InputError(problem, f"{fix} --dynamo_backend no; --dtype, --device and --shard_base decide")
