"""The LoRA adapter: on the model, in its folder, merged into the base weights.

An adapter folder holds what inference needs besides the base model: adapter_config.json and
adapter_model.safetensors (as PEFT writes them), the tokenizer, sft_config.json (prompt template, training
configuration, SHA-256s), a model card, SHA256SUMS over all of them and, in a checkpoint, training_state.pt.
"""

import io
import os
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file
from torch import nn

from sft.cli import (
    InputError,
    as_input_error,
    first_line,
    log,
    on_main_process,
    preview_list,
    safe_id,
)
from sft.files import ROOT, new_folder, sha256, write_atomic, write_checksums, write_json
from sft.model.base import (
    BASE_FOLDER,
    Placement,
    base_config_problem,
    base_weights_sha256,
    bundled_model,
    load_base_model,
    load_tokenizer,
    own_settings,
    resolve_model,
)
from sft.model.folder import read_sft_config
from sft.options import BUNDLED_MODEL

_FIX_WEIGHTS = "restore it from a backup, or train again"
_FIX_BASE_MODEL = "pass --base_model with the model this adapter was trained on (a folder or Hub id)"

# ------------------------------------------------------------------------------- on the model


def unwrap(model):
    """The base model of a PeftModel (its LoRA layers still in it), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@own_settings()
def add_lora(
    model,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    seed: int,
    use_rslora: bool = False,
) -> PeftModel:
    """The model with LoRA adapters (float32, B zero) on `target_modules`, or on all linear layers with
    ["all-linear"].

    If a model has no q_proj and v_proj, the default, PEFT's choice for its architecture is taken (GPT-2's
    c_attn), or all linear layers if PEFT has none. Raises InputError for any other layers that the model does
    not have."""
    # An image or sound encoder of a multimodal model sees no token here
    encoders = r".*(vision|visual|image|audio).*"
    has_encoders = any(re.fullmatch(encoders, name) for name, _ in model.named_modules())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        target_modules=_lora_targets(model, target_modules),
        exclude_modules=encoders if has_encoders else None,
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=True)  # float32, also on a 16-bit base
    except ValueError as error:
        if "lora_dropout" in str(error):
            problem = f"--lora_dropout {dropout:g}: PEFT has no dropout for a mixture of experts"
            raise InputError(problem, "use --lora_dropout 0") from None
        problem = f"LoRA does not fit these layers: {first_line(error)}"
        raise InputError(problem, "name other layers with --target_modules") from None


# Layers of state-space models whose weights are read beside them, so that an adapter there would be missed.
# PEFT refuses the first two in these families
_NOT_CALLED = ("out_proj", "conv1d")
_NOT_CALLED_IN = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def _lora_targets(model, wanted: list[str]) -> list[str] | str:
    """The layers that get an adapter: their names, or "all-linear"."""
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__ or "Conv1D" in type(module).__name__
    }
    not_called = {"dt_proj", *(_NOT_CALLED if model.config.model_type in _NOT_CALLED_IN else ())}
    # Routers of experts, as an example, return more than a product, which PEFT does not expect
    kinds = {type(module).__name__ for _, module in model.named_modules() if isinstance(module, nn.Linear)}
    is_plain = not linear & not_called and all("Linear" in kind for kind in kinds)
    all_linear = "all-linear" if is_plain else sorted(linear - not_called - {"lm_head"})
    if "all-linear" in wanted:
        return all_linear
    if wanted == ["q_proj", "v_proj"] and not linear.intersection(wanted):
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
        wanted = [] if not_called.intersection(known) else list(known)
        if on_main_process():
            log(f"This model has no q_proj and v_proj: LoRA on {', '.join(wanted) or 'all linear layers'}")
        if not wanted:
            return all_linear
    absent = [name for name in wanted if name not in linear]
    if absent:
        fix = f"choose from {preview_list(sorted(linear), 12)}, or all-linear"
        raise InputError(f"--target_modules: the model has no {preview_list(map(safe_id, absent))}", fix)
    return wanted


def shard_base(model: PeftModel, device: torch.device, n_processes: int) -> None:
    """Splits the frozen base weights over the processes (FSDP2: torch.distributed.fsdp.fully_shard). Each
    process gathers a layer while it computes it; every process keeps the whole adapter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = unwrap(model)
    mesh = init_device_mesh(device.type, (n_processes,))
    adapter = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    for module in (*layers, base):
        # Resharded after each forward pass, so that saving finds all processes in the same state
        fully_shard(module, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)


def set_gradient_checkpointing(model) -> None:
    """Trades time for memory in training. Raises InputError if the model does not support it."""
    base = unwrap(model)
    base.config.use_cache = False
    try:
        base.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        problem = "--gradient_checkpointing: this model does not support it"
        raise InputError(problem, "leave it out") from None
    # The embeddings are frozen; without this no gradient would flow
    base.enable_input_require_grads()


# ------------------------------------------------------------------------------- saving


def save_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer,
    base_name: str,
    sft_config: dict,
    card: str,
    state: dict | None = None,
) -> None:
    """Writes an adapter folder that appears whole or not at all, readable by the user alone.

    `state` is what training needs to resume from here (tensors and plain values). Raises InputError if the
    disk is full."""
    with new_folder(folder) as temporary:
        model.peft_config["default"].base_model_name_or_path = base_name
        # Without False PEFT would ask the Hub whether the base model's vocabulary has been resized
        model.save_pretrained(temporary, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)
        hashes = sft_config["sha256"] | {"adapter": sha256(temporary / "adapter_model.safetensors")}
        write_json(temporary / "sft_config.json", {**sft_config, "sha256": hashes})
        write_atomic(temporary / "README.md", card)
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_atomic(temporary / "training_state.pt", buffer.getvalue())
        write_checksums(temporary)


# ------------------------------------------------------------------------------- loading


def read_state(folder: Path) -> dict:
    """The training state that `save_adapter` wrote; nothing but tensors and plain values is unpickled. Raises
    InputError if it cannot be read or a newer version of this toolkit wrote it."""
    read_sft_config(folder)
    fix = "delete this folder to resume from the checkpoint before it"
    with as_input_error(f"{folder}: its training state cannot be read", fix):
        return torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)


def load_adapter_weights(model: PeftModel, folder: Path, *, may_be_zero: bool = False) -> None:
    """Copies an adapter folder's weights into `model`.

    Raises InputError if a weight is missing, extra, of another shape or not finite, or if the adapter as a
    whole is zero and so does nothing (unless it `may_be_zero`, as in a checkpoint of a run that has just
    begun)."""
    file = folder / "adapter_model.safetensors"
    with as_input_error(f"{file}: not a readable safetensors file", _FIX_WEIGHTS):
        saved = load_file(file)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problem, fix = _weights_problem(saved, expected, may_be_zero)
    if problem:
        raise InputError(f"{file}: {problem}", fix)
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(saved[key])


def _weights_problem(saved: dict, expected: dict, may_be_zero: bool) -> tuple[str, str]:
    """(what is wrong with an adapter's weights, "" if nothing is; the fix)."""
    missing = sorted(expected.keys() - saved.keys())
    extra = sorted(saved.keys() - expected.keys())
    if missing or extra:
        problem = f"lacks {len(missing)} of the {len(expected)} weights its configuration names"
        return f"{problem} and holds {len(extra)} others, the first {(missing + extra)[0]}", _FIX_WEIGHTS
    for key, tensor in expected.items():
        if saved[key].shape != tensor.shape:
            problem = f"{key} has shape {tuple(saved[key].shape)}, not {tuple(tensor.shape)}"
            fix = "check that the base model is the one this adapter was trained on (--base_model)"
            return problem, fix
    if not may_be_zero and not any(tensor.any() for key, tensor in saved.items() if "lora_B" in key):
        return "all weights are zero, so the adapter does nothing", _FIX_WEIGHTS
    if not all(torch.isfinite(tensor).all() for tensor in saved.values()):
        return "some weights are NaN or infinite", f"{_FIX_WEIGHTS} with a lower --learning_rate"
    return "", ""


@own_settings()
def load_specialist(
    folder: Path,
    sft_config: dict,
    adapter_config: dict,
    placement: Placement,
    *,
    quantization: str | None = None,
    base_model: str | None = None,
    tokenizer_folder: Path | None = None,
    verify: bool = False,
):
    """(model, tokenizer) of what `read_adapter_folder` returned, in evaluation mode; the tokenizer of
    `tokenizer_folder` if it is another. Raises InputError if adapter and base model do not belong together.

    A merged folder needs no base model, and its tokenizer gets back the chat template of the adapter's, from
    which the control tokens in a note are known."""
    if "merged" in sft_config:
        if base_model is not None:
            raise InputError(f"{folder} is a merged model", "leave out --base_model")
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = sft_config["merged"]["chat_template"]
        model = load_base_model(folder, placement.device, placement.dtype, quantization)
        return model.eval(), tokenizer
    base_folder = _find_base_model(folder, sft_config, adapter_config, base_model)
    _check_base(folder, base_folder, sft_config, verify, base_model is not None)
    tokenizer = load_tokenizer(tokenizer_folder or folder)
    base = load_base_model(base_folder, placement.device, placement.dtype, quantization)
    with as_input_error(f"{folder}: its LoRA configuration does not fit the base model", _FIX_BASE_MODEL):
        config = LoraConfig.from_pretrained(str(folder), local_files_only=True)
        config.base_model_name_or_path = base.name_or_path
        model = get_peft_model(base, config)
    load_adapter_weights(model, folder)
    return model.eval().requires_grad_(False), tokenizer


def _check_base(folder: Path, base_folder: Path, sft_config: dict, verify: bool, was_typed: bool) -> None:
    """Raises InputError if the base model is not the one that training recorded."""
    if "prompt_from" in sft_config and was_typed:
        log(f"info: the base model of {folder} is taken as typed: not verified")
        return
    problem = ""
    if base_weights_sha256(base_folder, again=verify) != sft_config["sha256"]["base_weights"]:
        problem = "does not have the weights this adapter was trained on"
    elif differing := base_config_problem(base_folder, sft_config.get("base_config")):
        problem = f"is not as in training: {differing} differs"
    if problem:
        raise InputError(f"{folder}: the base model in {base_folder.name} {problem}", _FIX_BASE_MODEL)


def _find_base_model(folder: Path, sft_config: dict, adapter_config: dict, base_model: str | None) -> Path:
    """The folder of an adapter's base model: `base_model` if given, else as the adapter names it. Only what
    the user typed is asked of the Hub."""
    try:
        if base_model is not None:
            return resolve_model(base_model, _FIX_BASE_MODEL)
        if "other_base" in adapter_config:
            other = adapter_config["other_base"]
            problem = f"{folder} was trained on {other}, the prompt's adapter on another"
            raise InputError(problem, "pass --base_model with the model it was trained on")
        name = adapter_config["base_model_name_or_path"]
        if name == os.path.relpath(BASE_FOLDER / BUNDLED_MODEL, ROOT):
            return bundled_model()
        if (ROOT / name).is_dir() or sft_config.get("base_model_is_local"):
            return resolve_model(str(ROOT / name), _FIX_BASE_MODEL)  # never looked up on the Hub
        return resolve_model(name, _FIX_BASE_MODEL, to_type="--base_model")
    except InputError as error:
        problem = f"the adapter's base model is not available: {error.problem}"
        raise InputError(problem, error.fix) from None
