"""Adapter."""

import io
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from sft.cli import InputError, log, preview_list
from sft.files import ROOT, make_private_dir, sha256, sync_dir, write_atomic, write_checksums, write_json
from sft.model.base import (
    BASE_FOLDER,
    Placement,
    _first_line,
    base_weights_sha256,
    bundled_model,
    load_base_model,
    load_tokenizer,
    resolve_model,
)
from sft.model.kernels import FastDropout, Int8Linear, convert_linear, replace_linear_layers
from sft.options import BUNDLED_MODEL


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
            log(
                f"This model has no q_proj and v_proj: LoRA goes on {targets if isinstance(targets, str) else ', '.join(targets)}"
            )
    absent = [name for name in targets if name not in linear] if isinstance(targets, list) else []
    if absent:
        raise InputError(
            f"--target_modules: the model has no {preview_list(absent)}",
            f"choose from {preview_list(sorted(linear), 12)}, or all-linear",
        )
    # A multimodal model's towers for images and sound see no token here
    towers = "|".join(
        sorted(
            {
                name
                for name, _ in model.named_modules()
                if re.search(r"(vision|visual|image|audio)[^.]*$", name)
            }
        )
    )
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
            module.lora_dropout["default"] = FastDropout(dropout)
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
        fully_shard(
            module, mesh=mesh, ignored_params=adapter, reshard_after_forward=True
        )  # saving finds all processes alike


def unwrap(model):
    """The base model of a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def set_gradient_checkpointing(model, on: bool) -> None:
    """Trades time for memory in training; must be off for generation, which needs the key-value cache."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if on:
        try:
            base.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            raise InputError(
                "--gradient_checkpointing: this model does not support it", "leave it out"
            ) from None
        base.enable_input_require_grads()  # the embeddings are frozen; without this no gradient would flow
    else:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
    base.config.use_cache = not on


def save_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer,
    base_name: str,
    sft_config: dict,
    card: str,
    state: dict | None = None,
) -> None:
    """Writes an adapter folder that appears whole or not at all, readable by the user alone; `state` is what training
    needs to go on from here (tensors and plain values)."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    make_private_dir(aside)
    try:
        model.peft_config["default"].base_model_name_or_path = base_name
        # Without False PEFT would ask the hub whether the base model's vocabulary has been resized
        model.save_pretrained(aside, save_embedding_layers=False)
        tokenizer.save_pretrained(aside)
        written = {
            "adapter": "adapter_model.safetensors",
            "adapter_config": "adapter_config.json",
            "tokenizer": "tokenizer.json",
        }
        hashes = sft_config["sha256"] | {
            name: sha256(aside / file) for name, file in written.items() if (aside / file).is_file()
        }
        write_json(aside / "sft_config.json", {**sft_config, "sha256": hashes})
        write_atomic(aside / "README.md", card)
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomic(aside / "training_state.pt", buffer.getvalue())
        write_checksums(aside)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Moves the finished folder `new` to `folder`, in the place of what was there."""
    sync_dir(new)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old)
    else:
        new.rename(folder)
    sync_dir(folder.parent, with_files=False)


def read_state(folder: Path) -> dict:
    """The training state that `save_adapter` wrote; nothing but tensors and plain values is unpickled. Raises InputError
    if it cannot be read."""
    try:
        return torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{folder}: its training state cannot be read ({type(error).__name__})",
            "delete this folder to go on from the one before",
        ) from None


def load_adapter_weights(model: PeftModel, folder: Path, *, may_be_zero: bool = False) -> None:
    """Copies an adapter folder's weights into `model`. Raises InputError if a weight is missing, extra, of another shape,
    or not finite, or if the adapter as a whole is zero and so does nothing (a checkpoint of a run just begun may be)."""
    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as weights:
            saved = {key: weights.get_tensor(key) for key in weights.keys()}
    except Exception as error:  # safetensors raises a type of its own
        raise InputError(
            f"{file}: not a readable safetensors file: {_first_line(error)}", "restore it or train again"
        ) from None
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
        raise InputError(
            f"{file}: all weights are zero, so the adapter does nothing", "restore it or train again"
        )
    if not all(torch.isfinite(tensor).all() for tensor in saved.values()):
        raise InputError(
            f"{file}: some weights are NaN or infinite",
            "restore it or train again with a lower --learning_rate",
        )
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
            f"{folder}: its LoRA configuration does not fit the base model: {_first_line(error)}",
            "name the right one with --base_model",
        ) from None
    load_adapter_weights(model, folder)
    _check_written(folder, sft_config, "adapter", "adapter_model.safetensors")
    _check_written(folder, sft_config, "adapter_config", "adapter_config.json")
    return model.eval().requires_grad_(False), tokenizer


def _check_written(folder: Path, sft_config: dict, name: str, file: str) -> None:
    """Raises InputError if a file is not the one whose SHA-256 training wrote down (if it did) under `name`."""
    recorded = sft_config["sha256"].get(name)
    if recorded and not ((folder / file).is_file() and sha256(folder / file) == recorded):
        raise InputError(
            f"{folder}: {file} is not the file that training wrote (SHA-256 differs)",
            "restore it or train again",
        )


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
        raise InputError(
            f"the adapter's base model: {error.problem}", f"{error.fix}; or --base_model FOLDER"
        ) from None


def merge_into_int8(model: PeftModel, dtype: torch.dtype):
    """The base model with the adapter merged into its linear layers and these in 8 bit (Int8Linear), on a CPU, the
    rest in `dtype`. Layer by layer in float32, so that each weight is rounded once and memory holds one such copy."""
    base = model.get_base_model()
    for name in [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]:
        module = base.get_submodule(name)
        linear = module.get_base_layer().float()
        module.merge(safe_merge=True)
        base.set_submodule(name, convert_linear(linear, Int8Linear))
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
    make_private_dir(aside)
    try:
        merged = model.merge_and_unload(safe_merge=True)
        merged.config.use_cache = True
        merged.generation_config = GenerationConfig(
            eos_token_id=stop_token_ids, pad_token_id=stop_token_ids[0]
        )
        merged.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        replace_folder(aside, folder)
    except SafetensorError as error:
        raise InputError(
            f"{folder}: the merged model cannot be written: {_first_line(error)}",
            "free some space, or name another disk",
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
