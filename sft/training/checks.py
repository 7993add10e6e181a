"""What a run checks before the slow imports, so that a wrong option or file is refused at once. Writes
nothing."""

import os
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


# What accelerate's launcher and configuration hand down that would take over division, clipping, optimizer,
# dtype or device of the loop; the value that asks for nothing; what to do instead. Harmless, and so not here:
# gradient accumulation (the loop's own counts), CPU affinity, debug mode, USE_CPU, and the settings of FSDP,
# DeepSpeed, Megatron and fp8, which are read only with those.
_ACCELERATE = {
    "USE_FSDP": ("FSDP", "false", "use accelerate launch --multi_gpu, and --shard_base"),
    "USE_DEEPSPEED": ("DeepSpeed", "false", "use accelerate launch --multi_gpu, and --shard_base"),
    "USE_MEGATRON_LM": ("Megatron-LM", "false", "use accelerate launch --multi_gpu, and --shard_base"),
    "USE_PARALLELISM_CONFIG": ("parallelism_config", "false", "use accelerate launch --multi_gpu"),
    "DYNAMO_BACKEND": ("dynamo backend", "no", "use accelerate launch --dynamo_backend no"),
    "MIXED_PRECISION": (
        "mixed precision",
        "no",
        "use accelerate launch --mixed_precision no; --dtype decides",
    ),
    "IN_TPU_POD": ("TPU mode", "0", "use a GPU or a CPU"),
    "SAGEMAKER_DISTRIBUTED_TYPE": ("SageMaker mode", "no", "use torchrun"),
    "TORCH_DEVICE": ("device", "", "unset it; --device decides"),
}


def check_accelerate() -> None:
    """Raises InputError for a setting of accelerate's that this loop does not take."""
    for name, (what, off, fix) in _ACCELERATE.items():
        value = os.environ.get(f"ACCELERATE_{name}", off)
        if value.lower() not in (off, ""):
            problem = f"accelerate's {what} does not fit this training loop (ACCELERATE_{name}={value})"
            raise InputError(problem, fix)
