"""A merged folder: base model and adapter as one ordinary model, which other programs prompt as training did.

Besides the weights it holds the tokenizer with a chat template that is the trained prompt, an Ollama
Modelfile, and sft_config.json with the mark "merged", by which inference knows it."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import GenerationConfig

from sft.cli import InputError, as_input_error, log
from sft.files import new_folder, write_atomic, write_checksums, write_json
from sft.model.adapter import unwrap
from sft.model.base import context_window, load_base_model, own_settings
from sft.model.kernels import Int8Linear, replace_linear_layers
from sft.model.probes import logits_problem

# Notes on which the chat template is tried
PROBES = ("Fever of 38.5 and cough.", "BP 120/80\nHR 72\n\nNo pain", "(1) Rash; denies itching.")
_MOST_CONTEXT = 8192  # tokens for which Ollama reserves memory; a model's window may be far larger


def _untie(model: PeftModel) -> None:
    """Gives each layer with an adapter a weight of its own: merged into an output layer that shares the
    embeddings' (tied), the adapter would change these too."""
    base = unwrap(model)
    modules = [module for module in base.modules() if not isinstance(module, LoraLayer)]
    owners = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    for layer in [module for module in base.modules() if isinstance(module, LoraLayer)]:
        own = layer.get_base_layer()
        if owners[id(getattr(own, "weight", None))] > 1:
            own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
            base.config.tie_word_embeddings = False
            base.config.get_text_config().tie_word_embeddings = False


@torch.no_grad()
def _probe_logits(model) -> torch.Tensor:
    ids = torch.arange(24, device=model.device)[None] * 7 % unwrap(model).config.get_text_config().vocab_size
    return model(input_ids=ids, use_cache=False).logits


@own_settings()
def merge(model: PeftModel) -> tuple:
    """(the base model with the adapter in its weights, "") if its logits are those of the adapter as trained;
    else (`model` as it was, how they differ)."""
    _untie(model)
    expected = _probe_logits(model)
    model.merge_adapter()
    problem = logits_problem(_probe_logits(model), expected, unwrap(model))
    if problem:
        model.unmerge_adapter()
        return model, problem
    return model.unload(), ""


@torch.no_grad()
def merge_into_int8(model: PeftModel, dtype: torch.dtype):
    """The base model with the adapter merged into its linear layers and these in 8 bit (Int8Linear), on a
    CPU; the rest in `dtype`. Raises InputError if its logits are not those of the adapter as trained, to
    within what rounding may change."""
    expected = _probe_logits(model)
    base = unwrap(model)
    replace_linear_layers(base, Int8Linear)
    # As transformers marks its own: `save_merged` refuses to write it
    base.is_quantized = True
    base = base.to(dtype)
    difference = (_probe_logits(base).float() - expected.float()).norm() / expected.float().norm()
    # Of 80 tiny models of 40 architectures, and the default specialist: rounding changed less than 0.027 but
    # for one (0.10, its experts were chosen otherwise), an adapter that was missing 0.055 and more
    if not difference <= 0.04:
        problem = f"merged in 8 bit, its logits differ by {difference:.1%}"
        raise InputError(problem, "use --quantization none, or --no_merge")
    return base


def merge_for_inference(model, quantization: str | None, dtype: torch.dtype):
    """The adapter merged into a float32 base, or by "int8" into 8-bit weights; else `model` as it is, since
    fewer bits would round some of the adapter away."""
    if getattr(unwrap(model), "is_quantized", False) or not isinstance(model, PeftModel):
        return model
    if quantization == "int8":
        return merge_into_int8(model, dtype)
    if dtype != torch.float32:
        return model
    model, problem = merge(model)
    if problem:
        log(f"info: the adapter stays beside the base weights: merged, {problem}")
    return model


@torch.no_grad()
def probe_loss(model, encoder) -> float:
    """Cross-entropy in nats per token of the PROBES, each as a summary of itself."""
    losses = []
    for ids in encoder.encode_texts(PROBES):
        prompt = encoder.prompt(ids)
        logits = model(input_ids=torch.tensor([prompt + ids], device=model.device), use_cache=False).logits
        expected = torch.tensor(ids, device=model.device)
        losses.append(F.cross_entropy(logits[0, len(prompt) - 1 : -1].float(), expected, reduction="none"))
    return torch.cat(losses).mean().item()


@own_settings()
def save_merged(
    model: PeftModel,
    tokenizer,
    stop_token_ids: list[int],
    folder: Path,
    sft_config: dict,
    encode: Callable[[str], list[int]],
):
    """Writes the folder and returns its model: transformers alone loads it, and stops where we do. `encode`
    is our own prompt of a note as token ids, with which the chat template is compared.

    Merges `model` itself. Raises InputError for a quantized base (merging into rounded weights would lose the
    adapter), for a model that is merged already, and if the folder cannot be written."""
    if getattr(unwrap(model), "is_quantized", False):
        fix = "use the adapter beside it, or train on the unquantized base model"
        raise InputError("a quantized base model cannot be merged", fix)
    if not isinstance(model, PeftModel):
        raise InputError("the model is merged already", "pass an adapter folder")
    prompt = sft_config["prompt"]
    ours = copy.copy(tokenizer)
    ours.chat_template = chat_template(tokenizer, prompt)
    problem = chat_template_problem(ours, prompt, encode)
    if problem:
        log(f"warning: other programs will not give the merged model exactly the trained prompt: {problem}")
    window = context_window(unwrap(model).config)
    with new_folder(folder) as temporary:
        merged, problem = merge(model)
        if problem:
            problem = f"merged, the model is another: {problem}"
            raise InputError(problem, "use the adapter with its base model")
        merged.config.use_cache = True
        ends = {"eos_token_id": stop_token_ids, "pad_token_id": stop_token_ids[0]}
        merged.generation_config = GenerationConfig(**ends)
        fix = "check the disk and the limit on file sizes (ulimit -f)"
        with as_input_error(f"{folder}: the merged model cannot be written", fix):
            merged.save_pretrained(temporary)
            ours.save_pretrained(temporary)
        check_written(temporary, merged)
        mark = {"merged": {"chat_template": tokenizer.chat_template}}
        write_json(temporary / "sft_config.json", sft_config | mark)
        write_atomic(temporary / "Modelfile", modelfile(tokenizer, prompt, stop_token_ids, window))
        write_checksums(temporary)
    return merged


def check_written(folder: Path, merged) -> None:
    """Raises InputError unless transformers loads from `folder` the weights of `merged`."""
    found = load_base_model(folder, torch.device("cpu"), merged.dtype).state_dict()
    expected = merged.state_dict().items()
    differing = [name for name, weight in expected if not torch.equal(found[name], weight.cpu())]
    if differing:
        problem = f"the merged model would be loaded with other weights, the first {differing[0]}"
        raise InputError(problem, "use the adapter with its base model")


def _adds_bos(tokenizer) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x").input_ids[:1] == [bos]


def chat_template(tokenizer, prompt: dict) -> str:
    """A jinja template that puts the last message, the note, into the trained prompt, whatever its role."""
    prefix = prompt["prefix"]
    # Programs add no BOS to a chat template's text
    if prompt["add_special_tokens"] and _adds_bos(tokenizer):
        prefix = tokenizer.bos_token + prefix
    before, after = (json.dumps(text, ensure_ascii=False) for text in (prefix, prompt["suffix"]))
    return f"{{{{ {before} }}}}{{{{ messages[-1]['content'] }}}}{{{{ {after} }}}}"


def chat_template_problem(tokenizer, prompt: dict, encode: Callable[[str], list[int]]) -> str:
    """In which way the chat template's tokens are not those of training; "" if they are."""
    if prompt["number_sentences"]:
        return "it has the note's sentences numbered; number them first (guide, section 4)"
    for note in PROBES:
        messages = [{"role": "user", "content": note}]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if list(found) != encode(note):
            return "the tokenizer joins the note's end with the text around it"
    if _adds_bos(tokenizer) and found[0] != tokenizer.bos_token_id:
        return f"llama.cpp and Ollama begin it with {tokenizer.bos_token}, as the tokenizer does with other texts"
    return ""


def modelfile(tokenizer, prompt: dict, stop_token_ids: Sequence[int], window: int | None) -> str:
    """An Ollama Modelfile (a Go template around the note), with the stop tokens and greedy decoding."""
    prefix = prompt["prefix"]
    # Ollama adds the BOS itself
    if _adds_bos(tokenizer):
        prefix = prefix.removeprefix(tokenizer.bos_token)
    before, after = (
        # As Go's own string where the text could be read as part of the file or of the template
        f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{{" in text or '"' in text else text
        for text in (prefix, prompt["suffix"])
    )
    stops = "".join(
        f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}\n"
        for token in tokenizer.convert_ids_to_tokens(list(stop_token_ids))
    )
    return (
        f'FROM .\nTEMPLATE """{before}{{{{ .Prompt }}}}{after}"""\n{stops}PARAMETER temperature 0\n'
        f"PARAMETER num_ctx {min(window or _MOST_CONTEXT, _MOST_CONTEXT)}\n"
    )
