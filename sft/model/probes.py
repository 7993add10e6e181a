"""Can this model take packed rows, and are its logits right? Tried on the model itself when it is loaded.

A probe that fails says why. A programming error of ours is raised, and never becomes a silent slower path."""

import contextlib
import math
import re
import traceback
from pathlib import Path

import torch

import sft
from sft.cli import first_line, is_out_of_memory
from sft.model.adapter import unwrap
from sft.model.attention import OWN_ATTENTION, PACKED_ATTENTION


def logits_problem(found: torch.Tensor, expected: torch.Tensor, model) -> str:
    """ "" if `found` are `expected` to within rounding, else how they differ. They may differ by 1e-3 of the
    largest logit for a model in float32, by 5e-2 in fewer bits or quantized."""
    if found.shape != expected.shape:
        return f"its logits have shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    is_exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    bound = 1e-3 if is_exact else 5e-2
    difference = (found.float() - expected.float()).abs().max().item()
    largest = expected.float().abs().max().item()
    # "not <=" is true for NaN too
    if not difference <= bound * largest:
        return f"its logits differ by {difference:.2g} (largest logit {largest:.2g}, bound {bound:g} of it)"
    return ""


def probe_failure(error: Exception) -> str:
    """Why a model cannot work in some way, from the exception that a probe met.

    Raises the exception again if memory ran out, or if it is a programming error in code of this package: a
    mistake of ours must not become a silent slower path."""
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = bool(frames) and Path(sft.__file__).parent in Path(frames[-1].filename).parents
    programming_errors = (AttributeError, NameError, TypeError, KeyError, IndexError)
    if is_out_of_memory(error) or (is_ours and isinstance(error, programming_errors)):
        raise error
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def reference_attention(base):
    """Inside, the model has an attention of transformers' own, for the pass that a probe compares with."""
    before = base.config._attn_implementation
    if before in OWN_ATTENTION:
        base.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before in OWN_ATTENTION:
            base.set_attn_implementation(before)


def enable_packing(model, max_length: int) -> tuple[bool, str]:
    """Sets the model up for packed rows (`sft.data.dataset.packed_batch`) if it can take them; it then takes
    no others.

    The probe: two examples, the second longer than any attention window that matters at `max_length` tokens,
    must come out of one packed row as they do one by one, and a row must pass in training mode. Returns
    (whether they do, the reason if not; or, on a GPU, why varlen_attention does not fit and the slower
    per_example_attention was taken). A model that cannot is left as it was."""
    base = unwrap(model)
    before = base.config._attn_implementation
    device = base.get_input_embeddings().weight.device
    if before in PACKED_ATTENTION:
        return True, ""
    if device.type == "mps":
        return False, "packed rows have not been tested on Apple GPUs"
    problems = []
    fits = False
    try:
        for attention in PACKED_ATTENTION if device.type == "cuda" else ("per_example",):
            with _evaluating(base):
                try:
                    problem = _packing_problem(base, attention, max_length)
                except Exception as error:
                    problem = probe_failure(error)
            fits = not problem
            if fits:
                break
            problems.append(f"{attention}: {problem}")
    finally:
        if not fits:
            base.set_attn_implementation(before)
    return fits, "; ".join(problems)


@contextlib.contextmanager
def _evaluating(base):
    """Inside, the model is in evaluation mode and computes no gradients."""
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        base.train(was_training)


def _packing_problem(base, attention: str, max_length: int) -> str:
    """ "" if the model, which is left with `attention` set, computes a packed row right, else what is
    wrong."""
    text = base.config.get_text_config()
    device = base.get_input_embeddings().weight.device
    names = ("sliding_window", "attention_chunk_size", "attention_window_size")
    windows = [getattr(text, name, None) or 0 for name in names]
    lengths = [5, 9 + max((window for window in windows if window < max_length), default=0)]
    examples = [torch.arange(n, device=device) * 7 % text.vocab_size for n in lengths]
    kept = torch.arange(1, sum(lengths), 2, device=device)
    with reference_attention(base):
        logits = [base(input_ids=ids[None], use_cache=False).logits[0] for ids in examples]
    base.set_attn_implementation(attention)
    if base.config._attn_implementation != attention:
        return "transformers cannot replace this model's attention"
    row = {
        "input_ids": torch.cat(examples)[None],
        "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
        "logits_to_keep": kept,
        "use_cache": False,
        "example_lengths": lengths,
        "example_starts": torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device),
    }
    problem = logits_problem(base(**row).logits[0], torch.cat(logits)[kept], base)
    if not problem:
        # What a kernel refuses in training alone, as dropout
        base.train()
        base(**row)
    return problem


# ------------------------------------------------------------------------------- what shares a pass


def longest_shared(model, max_length: float) -> float:
    """Sequences of more tokens than this need forward passes of their own; infinite if any may share one.

    Some models compute a whole pass by its longest position (rope types "longrope" and "dynamic" of
    transformers), so that a note would get another summary beside a long one. Tried at each length at which
    the configuration changes something: a few tokens, beside others at positions beyond it."""
    base = unwrap(model)
    text = base.config.get_text_config()
    lengths = re.findall(r'"original_max_position_embeddings": (\d+)', text.to_json_string(use_diff=False))
    positions = torch.arange(6, device=base.get_input_embeddings().weight.device)[None]
    ids = positions * 7 % text.vocab_size
    with _evaluating(base), reference_attention(base):
        for limit in sorted({int(length) for length in lengths if int(length) < max_length}):
            alone = base(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
            both = torch.cat([positions, positions + limit])
            beside = base(input_ids=ids.repeat(2, 1), position_ids=both, use_cache=False).logits[0]
            if logits_problem(beside, alone, base):
                return limit
    return math.inf


@torch.no_grad()
def is_untrained(model, token_id: int) -> bool:
    """Whether nobody trained the output of a token: its row in the output layer is also that of others, as at
    the start of pretraining, or zero."""
    base = unwrap(model)
    table = (base.get_output_embeddings() or base.get_input_embeddings()).weight
    row = table[token_id].float()
    bound = 1e-3 * table[:1024].float().abs().mean()
    n_alike = sum(((part.float() - row).abs().amax(1) <= bound).sum().item() for part in table.split(8192))
    return n_alike > 1 or bool((row.abs() <= bound).all())
