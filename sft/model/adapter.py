"""The LoRA adapter: on the model, in its folder, merged into the base weights.

An adapter folder holds what inference needs besides the base model: adapter_config.json and
adapter_model.safetensors (as PEFT writes them), the tokenizer, sft_config.json (prompt template, training
configuration, SHA-256s), a model card, SHA256SUMS over all of them and, in a checkpoint, training_state.pt.
"""

import io
import os
import re
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import safe_open

from sft.cli import (
    InputError,
    as_input_error,
    first_line,
    log,
    on_main_process,
    plural,
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
from sft.model.kernels import FastDropout, Int8Linear, convert_linear, replace_linear_layers
from sft.options import BUNDLED_MODEL

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
    encoders = {
        name for name, _ in model.named_modules() if re.search(r"(vision|visual|image|audio)[^.]*$", name)
    }
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        target_modules=_lora_targets(model, target_modules),
        exclude_modules=rf"({'|'.join(sorted(encoders))})(\..*)?" if encoders else None,
        bias="none",
    )
    torch.manual_seed(seed)
    try:
        model = get_peft_model(model, config, autocast_adapter_dtype=True)  # float32, also on a 16-bit base
    except ValueError as error:
        raise _refusal(error, dropout) from None
    for module in model.modules():
        if isinstance(module, LoraLayer) and dropout:
            module.lora_dropout["default"] = FastDropout(dropout)
    return model


def _refusal(error: ValueError, dropout: float) -> InputError:
    """What PEFT refuses, and what works instead."""
    if "lora_dropout" in str(error):
        problem = f"--lora_dropout {dropout:g}: PEFT has no dropout for a mixture of experts"
        return InputError(problem, "use --lora_dropout 0")
    fix = "name other layers with --target_modules"
    return InputError(f"LoRA does not fit these layers: {first_line(error)}", fix)


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
    all_linear = sorted(linear - not_called - {"lm_head"}) if linear & not_called else "all-linear"
    if "all-linear" in wanted:
        return all_linear
    if wanted == ["q_proj", "v_proj"] and not linear.intersection(wanted):
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
        known = () if not_called.intersection(known) else known
        if on_main_process():
            log(
                f"This model has no q_proj and v_proj: LoRA on {', '.join(known) if known else 'all linear layers'}"
            )
        if not known:
            return all_linear
        wanted = list(known)
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
    fix = "restore it from a backup, or train again"
    with as_input_error(f"{file}: not a readable safetensors file", fix), safe_open(file, "pt") as weights:
        saved = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118 (no mapping)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_weights(file, saved, expected, may_be_zero)
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(saved[key])


def _check_weights(file: Path, saved: dict, expected: dict, may_be_zero: bool) -> None:
    fix = "restore it from a backup, or train again"
    missing = sorted(expected.keys() - saved.keys())
    if missing:
        problem = f"{file}: lacks {len(missing)} of the {len(expected)} weights its configuration names"
        raise InputError(f"{problem}, the first {missing[0]}", fix)
    extra = sorted(saved.keys() - expected.keys())
    if extra:
        problem = f"{file}: holds {plural(len(extra), 'unexpected weight')}, the first {extra[0]}"
        raise InputError(problem, fix)
    for key, tensor in expected.items():
        found = tuple(saved[key].shape)
        if found != tuple(tensor.shape):
            problem = f"{file}: {key} has shape {found}, not {tuple(tensor.shape)}"
            fix = "check that the base model is the one this adapter was trained on (--base_model)"
            raise InputError(problem, fix)
    if not may_be_zero and not any(tensor.any() for key, tensor in saved.items() if "lora_B" in key):
        raise InputError(f"{file}: all weights are zero, so the adapter does nothing", fix)
    if not all(torch.isfinite(tensor).all() for tensor in saved.values()):
        problem = f"{file}: some weights are NaN or infinite"
        raise InputError(problem, f"{fix} with a lower --learning_rate")


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
    elif "base_config" in sft_config:
        differing = base_config_problem(base_folder, sft_config["base_config"])
        problem = differing and f"is not as in training: {differing} differs"
    if problem:
        raise InputError(f"{folder}: the base model in {base_folder.name} {problem}", _FIX_BASE_MODEL)


def _find_base_model(folder: Path, sft_config: dict, adapter_config: dict, base_model: str | None) -> Path:
    """The folder of an adapter's base model: `base_model` if given, else as the adapter names it. Only what
    the user typed is asked of the Hub."""
    try:
        if base_model is not None:
            return resolve_model(base_model, _FIX_BASE_MODEL)
        if "other_base" in adapter_config:
            problem = (
                f"{folder} was trained on {adapter_config['other_base']}, the prompt's adapter on another"
            )
            raise InputError(problem, "pass --base_model with the model it was trained on")
        name = adapter_config["base_model_name_or_path"]
        if name == os.path.relpath(BASE_FOLDER / BUNDLED_MODEL, ROOT):
            return bundled_model()
        if (ROOT / name).is_dir() or sft_config.get("base_model_is_local"):
            return resolve_model(str(ROOT / name), _FIX_BASE_MODEL)  # never looked up on the Hub
        return resolve_model(name, _FIX_BASE_MODEL, may_download=False)
    except InputError as error:
        problem = f"the adapter's base model is not available: {error.problem}"
        raise InputError(problem, error.fix) from None


# ------------------------------------------------------------------------------- merging


def untie(model: PeftModel) -> None:
    """Gives each layer with an adapter a weight of its own: merged into an output layer that shares the
    embeddings' (tied), the adapter would change these too."""
    base = unwrap(model)
    owners = Counter(
        id(weight)
        for module in base.modules()
        if not isinstance(module, LoraLayer)
        for weight in module.parameters(recurse=False)
    )
    for layer in [module for module in base.modules() if isinstance(module, LoraLayer)]:
        own = layer.get_base_layer()
        if owners[id(getattr(own, "weight", None))] > 1:
            own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
            base.config.tie_word_embeddings = False
            base.config.get_text_config().tie_word_embeddings = False


def merge_into_int8(model: PeftModel, dtype: torch.dtype):
    """The base model with the adapter merged into its linear layers and these in 8 bit (Int8Linear), on a
    CPU; the rest in `dtype`. Layer by layer in float32, so that each weight is rounded once and memory holds
    one such copy."""
    untie(model)
    base = unwrap(model)
    # Names alone are kept, so that the old weights are freed one by one
    names = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    for name in names:
        module = base.get_submodule(name)
        linear = module.get_base_layer().float()
        module.merge(safe_merge=True)
        base.set_submodule(name, convert_linear(linear, Int8Linear))
    replace_linear_layers(base, Int8Linear)
    # transformers sets this for its own quantized models. Ours must count as one too: `logits_problem` then
    # allows for rounded weights, and `save_merged` refuses to write them
    base.is_quantized = True
    return base.to(dtype)
