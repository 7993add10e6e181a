"""Attention."""

import contextlib
import math
import mmap
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sft.cli import is_out_of_memory


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
    row = {
        "example_lengths": [5, longest],
        "example_starts": torch.tensor([0, 5, 5 + longest], dtype=torch.int32, device=device),
    }
    exact = base.dtype == torch.float32 and not getattr(base, "is_quantized", False)
    base.eval()
    fits = False
    with torch.no_grad(), contextlib.suppress(TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        apart = torch.cat([base(input_ids=ids[None], use_cache=False).logits[0] for ids in examples]).float()[
            keep
        ]
        for attention in ("varlen", "per_example") if device.type == "cuda" else ("per_example",):
            base.set_attn_implementation(attention)
            with contextlib.suppress(
                TypeError, ValueError, RuntimeError, KeyError, AttributeError, ImportError
            ):
                packed = base(
                    input_ids=torch.cat(examples)[None],
                    position_ids=positions[None],
                    logits_to_keep=keep,
                    use_cache=False,
                    **row,
                ).logits[0]
                bound = (1e-3 if exact else 5e-2) * apart.abs().max()
                fits = packed.shape == apart.shape and bool((packed.float() - apart).abs().max() <= bound)
            if fits:
                break
    if not fits:
        base.set_attn_implementation(before)
    base.train(training)
    return fits


def per_example_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    example_lengths,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    **kwargs,
):
    """Causal attention inside each example of a packed row, no example seeing another, no dense mask.

    query (1, heads, tokens, head_dim), key and value (1, key-value heads, tokens, head_dim); `example_lengths` are
    Python integers that add up to `tokens`. Returns (1, tokens, heads, head_dim) and None, as transformers'
    AttentionInterface asks (https://huggingface.co/docs/transformers/attention_interface).
    """
    _refuse_what_is_not_computed(kwargs)
    dtype = query.dtype
    if query.device.type == "cpu":  # whose 16-bit attention is slower than that in float32
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    for q, k, v in zip(*(states.split(example_lengths, dim=2) for states in (query, key, value))):
        n, seen = q.shape[2], None
        if sliding_window is not None and n > sliding_window:
            position = torch.arange(n, device=q.device)
            distance = position[:, None] - position[None, :]
            seen = (distance >= 0) & (distance < sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=seen,
                dropout_p=dropout,
                is_causal=seen is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).to(dtype).transpose(1, 2).contiguous(), None


def varlen_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    example_starts,
    example_lengths,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    **kwargs,
):
    """The same in one FlashAttention call on a CUDA GPU, in 16 bit; `example_starts` (examples + 1,) is an int32 tensor there."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_what_is_not_computed(kwargs)
    if dropout:
        raise ValueError("varlen_attention has no dropout")
    longest = max(example_lengths)
    q, k, v = (
        states[0].transpose(0, 1).contiguous() for states in (query, key, value)
    )  # (tokens, heads, head_dim)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # keys to the left and to the right
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(
        q,
        k,
        v,
        example_starts,
        example_starts,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        enable_gqa=grouped,
    )[None], None


def _refuse_what_is_not_computed(kwargs: dict) -> None:
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"packed attention has no {unsupported[0]}")


class KVCache:
    """Keys and values of the sequences being written, and the layout of the present forward pass.

    KVCache 0 ... running-1 hold the running sequences, whose newest tokens come first in the row; then come the `chunks` of
    sequences (slot, first position, number of tokens). Memory is taken layer by layer when the model first shows its shapes.
    """

    def __init__(self, n_slots: int, capacity: int):
        self.n_slots, self.capacity = n_slots, capacity
        self.layers: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # each (n_slots, key-value heads, capacity, head_dim)

    def plan_pass(self, positions: list[int], chunks: list[tuple[int, int, int]], device) -> None:
        """For the next pass: the position of each running sequence's newest token, and the chunks."""
        self.n_running, self.chunks = len(positions), chunks
        self.runs = group_by_length([position + 1 for position in positions], self.keys_per_call())
        self.positions = torch.tensor(positions, device=device)
        self.rows = torch.arange(len(positions), device=device)
        self._masks = {}

    def keys_per_call(self) -> float:
        """How many keys (with their values) of one layer memory delivers in the time that one more call of attention costs."""
        states = next(iter(self.layers.values()), None)
        if (
            states is None or states[0].device.type != "cpu"
        ):  # not measured on GPUs, where many calls are worse
            return math.inf
        return CALL_BYTES / sum(tensor[0, :, 0].nbytes for tensor in states)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self.layers:
            self.layers[index] = tuple(
                lazy_zeros((self.n_slots, states.shape[1], self.capacity, states.shape[3]), states)
                for states in (key, value)
            )
        return self.layers[index]

    def mask(self, run: tuple[int, int, int], window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(sequences of the run, 1, 1, keys): 0 where a sequence sees a key, -inf elsewhere. None where all see all."""
        first, last, n_keys = run
        if last - first == 1 and (window is None or n_keys <= window):
            return None
        if (run, window) not in self._masks:
            distance = self.positions[first:last, None] - torch.arange(n_keys, device=self.positions.device)
            unseen = (distance < 0) | (distance >= (window or n_keys))
            mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(
                unseen, -torch.inf
            )
            self._masks[run, window] = mask[:, None, None]
        return self._masks[run, window]

    def copy(self, source: int, target: int, n: int) -> None:
        """The first `n` positions of one slot to another."""
        for states in (states for layer in self.layers.values() for states in layer):
            states[target, :, :n] = states[source, :, :n]


def group_by_length(lengths: list[int], per_call: float) -> list[tuple[int, int, int]]:
    """The slots split into runs (first, last + 1, longest) of sequences of like length, since attention over a run reads as many
    keys of each sequence as of the longest: the cheapest split where a call costs as much as reading `per_call` keys."""
    if math.isinf(per_call):
        return [(0, len(lengths), max(lengths))] if lengths else []
    cheapest = [(0, [])]  # for the first 0, 1, 2, ... slots: keys read, runs
    for last in range(1, len(lengths) + 1):
        longest, found = 0, []
        for first in range(last - 1, -1, -1):
            longest = max(longest, lengths[first])
            found.append((cheapest[first][0] + longest * (last - first) + per_call, first, longest))
        cost, first, longest = min(found)
        cheapest.append((cost, [*cheapest[first][1], (first, last, longest)]))
    return cheapest[-1][1]


def lazy_zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros (what is masked is multiplied by 0, and must be finite); on a CPU they take no memory until written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * like.element_size()), dtype=like.dtype).view(
        shape
    )


def kv_cache_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    kv_cache: KVCache | None = None,
    scaling=None,
    sliding_window=None,
    softcap=None,
    dropout=0.0,
    **kwargs,
):
    """Attention of one row of tokens laid out by `KVCache.plan_pass`, each to the keys of its own sequence.

    query (1, heads, tokens, head_dim), key and value (1, key-value heads, tokens, head_dim). Returns
    (1, tokens, heads, head_dim) and None, as transformers' AttentionInterface asks.
    """
    unsupported = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"kv_cache_attention has no {unsupported[0]}")
    if kv_cache is None:
        return ordinary_attention(query, key, value, attention_mask, sliding_window, scaling, softcap), None
    keys, values = kv_cache.layer(module.layer_idx, key, value)
    options, outputs, start = {"scaling": scaling, "softcap": softcap}, [], kv_cache.n_running
    if start:
        keys[kv_cache.rows, :, kv_cache.positions] = key[0, :, :start].transpose(0, 1)
        values[kv_cache.rows, :, kv_cache.positions] = value[0, :, :start].transpose(0, 1)
        # The heads that share a key-value head stand as that many queries: (running, key-value heads, groups, head_dim)
        grouped = query[0, :, :start].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        for run in kv_cache.runs:
            first, last, n_keys = run
            seen = (states[first:last, :, :n_keys] for states in (keys, values))
            output = attention(
                grouped[first:last], *seen, mask=kv_cache.mask(run, sliding_window, query.dtype), **options
            )
            outputs.append(output.flatten(1, 2)[None])
    for slot, first, n in kv_cache.chunks:
        own = slice(start, start + n)
        keys[slot, :, first : first + n] = key[0, :, own]
        values[slot, :, first : first + n] = value[0, :, own]
        seen = (states[slot : slot + 1, :, : first + n] for states in (keys, values))
        outputs.append(
            causal_attention(query[:, :, own], *seen, window=sliding_window, **options).transpose(1, 2)
        )
        start += n
    return torch.cat(outputs, dim=1), None


def ordinary_attention(query, key, value, attention_mask, window, scaling, softcap):
    """What a plain forward pass or `generate` computes: causal attention, with transformers' 2-D mask of padding."""
    n_new, n = query.shape[2], key.shape[2]
    place = torch.arange(n, device=query.device)
    distance = place[n - n_new :, None] - place
    seen = (distance >= 0) & (distance < (window or n))
    if attention_mask is not None and attention_mask.ndim == 2:
        seen = seen & attention_mask[:, None, None, -n:].bool()
        seen = seen | (distance == 0)  # padding sees itself: no row without a key
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    return attention(query, key, value, mask=mask, scaling=scaling, softcap=softcap).transpose(1, 2)


def causal_attention(query, key, value, *, window, scaling, softcap):
    """Attention of the last tokens of a sequence (queries) to all its tokens up to themselves (keys)."""
    n_new, n = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    if softcap is None and (window is None or n <= window) and n_new > n // 4:
        query = F.pad(query, (0, 0, n - n_new, 0))  # is_causal wants a square; nobody reads the rows added
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )[:, :, n - n_new :]
    place = torch.arange(n, device=query.device)
    distance = place[n - n_new :, None] - place
    unseen = (distance < 0) | (distance >= (window or n))
    mask = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill_(unseen, -torch.inf)
    grouped = query.unflatten(1, (-1, groups)).flatten(
        2, 3
    )  # the heads that share a key-value head stand as more queries
    output = attention(grouped, key, value, mask=mask.repeat(groups, 1), scaling=scaling, softcap=softcap)
    return output.unflatten(2, (groups, n_new)).flatten(1, 2)


def attention(query, key, value, *, mask, scaling, softcap):
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap  # Gemma 2, arXiv 2408.00118
    return (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(
        value.dtype
    ) @ value


CALL_BYTES = 1_500_000  # 75 microseconds at 20 GB/s, both measured on a CPU of two cores


def logits_problem(found, expected, model) -> str:
    """How `found` differs from `expected`, in words; "" if they are equal up to rounding."""
    if found.shape != expected.shape:
        return f"logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    bound = 1e-3 if exact else 5e-2
    largest = expected.float().abs().max()
    difference = (found.float() - expected.float()).abs().max()
    return (
        "" if difference <= bound * largest else f"logits differ by {difference / largest:.2g} of the largest"
    )


def probe_failure(error: Exception) -> str:
    """A probe's exception in words. Raises it again if it is out of memory or a programming error of ours."""
    if is_out_of_memory(error):
        raise error
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(innermost).is_relative_to(Path(__file__).resolve().parent.parent)
    if ours and isinstance(error, (AttributeError, NameError, TypeError, KeyError, IndexError)):
        raise error
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


AttentionMaskInterface.register("kv_cache", flash_attention_mask)
AttentionInterface.register("per_example", per_example_attention)
AttentionInterface.register("varlen", varlen_attention)
AttentionInterface.register("kv_cache", kv_cache_attention)
