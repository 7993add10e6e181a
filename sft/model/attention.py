"""Everything that touches transformers' attention: three implementations and their masks.

    per_example    training: packed rows, one call of PyTorch's attention per example
    varlen         training on a CUDA GPU in 16 bit: packed rows in one FlashAttention call
    kv_cache       inference: a row of tokens of many sequences, each with its own slot in a KVCache

A model gets one of them once, when it is loaded and after a probe (`enable_packing`; `enable_kv_cache` in
sft/inference/decoding.py); nothing switches it during a call. All have the signature of transformers'
AttentionInterface (https://huggingface.co/docs/transformers/attention_interface): query (batch, heads,
tokens, head_dim), key and value (batch, key-value heads, keys, head_dim) -> (batch, tokens, heads, head_dim)
and None; they raise ValueError for what they do not compute.

transformers builds no mask for an attention without a mask function of that name, and then drops the caller's
padding mask too (masking_utils.py). Packed rows need no mask; kv_cache registers a mask function for passes
without a KVCache."""

import math
import mmap

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

# In order of preference
PACKED_ATTENTION = ("varlen", "per_example")
OWN_ATTENTION = (*PACKED_ATTENTION, "kv_cache")

# How many bytes a CPU of two cores reads in the time of one more attention call: 75 microseconds at 20 GB/s,
# both measured
BYTES_PER_CALL = 1_500_000


# ------------------------------------------------------------------------------- masks and grouped heads


def causal_mask(positions: torch.Tensor, n_keys: int, window: int | None) -> torch.Tensor:
    """(*positions.shape, n_keys): True if a query at that position sees the key: none after it, and with a
    sliding `window` only the newest `window` keys."""
    distance = positions[..., None] - torch.arange(n_keys, device=positions.device)
    return ~((distance < 0) | (distance >= (window or n_keys)))


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A Boolean mask as one to add to scores. Not -inf, which makes a row that sees nothing (padding) NaN."""
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min)


def _attention(query, key, value, mask, *, scaling, softcap=None, dropout=0.0):
    """Attention with a mask (batch or 1, 1, queries or 1, keys), Boolean or additive, or None if all queries
    see all keys."""
    # The query heads that share a key-value head become that many more queries, so that no key is copied
    n_queries = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    query = query.unflatten(1, (-1, groups)).flatten(2, 3)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, groups, 1)
    if softcap is None:
        options = {"attn_mask": mask, "scale": scaling, "dropout_p": dropout}
        output = F.scaled_dot_product_attention(query, key, value, **options)
    else:
        # Soft-capped scores: Gemma 2, arXiv 2408.00118
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = (scores / softcap).tanh() * softcap
        if mask is not None:
            scores = scores + (_additive(mask, scores.dtype) if mask.dtype == torch.bool else mask)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        output = F.dropout(weights, dropout) @ value
    return output.unflatten(2, (groups, n_queries)).flatten(1, 2)


def _causal_attention(query, key, value, *, window, scaling, softcap=None, dropout=0.0):
    """Attention of the last tokens of a sequence (queries) to all of its tokens up to themselves (keys)."""
    n_queries = query.shape[2]
    n_keys = key.shape[2]
    n_before = n_keys - n_queries
    fits_window = window is None or n_keys <= window
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is None and fits_window and n_queries > n_keys // 4:
        # is_causal, the fastest, needs as many queries as keys: those added are dropped again
        padded = F.pad(query, (0, 0, n_before, 0)) if n_before else query
        return F.scaled_dot_product_attention(padded, key, value, is_causal=True, **options)[:, :, n_before:]
    mask = None
    if n_queries > 1 or not fits_window:
        positions = torch.arange(n_before, n_keys, device=query.device)
        mask = causal_mask(positions, n_keys, window)[None, None]
    return _attention(query, key, value, mask, scaling=scaling, softcap=softcap, dropout=dropout)


def _options(arguments: dict, *more: str) -> dict:
    """The options of `_causal_attention` from what a model hands its attention. Raises ValueError for what
    is not computed; `more` is."""
    for name in {"softcap", "s_aux", "position_bias", "cache"}.difference(more):
        if arguments.get(name) is not None:
            raise ValueError(f"this attention does not compute {name}")
    options = {"window": arguments.get("sliding_window"), "dropout": arguments.get("dropout", 0.0)}
    return options | {name: arguments.get(name) for name in ("scaling", *more)}


# ------------------------------------------------------------------------------- packed rows


def per_example_attention(module, query, key, value, mask, *, example_lengths: list[int], **arguments):
    """Causal attention inside each example of one packed row, no example seeing another, without a dense
    mask. `example_lengths` add up to the row's tokens."""
    options = _options(arguments)
    dtype = query.dtype
    # A CPU's 16-bit attention is slower than that in float32
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    examples = zip(*(states.split(example_lengths, dim=2) for states in (query, key, value)))
    outputs = [_causal_attention(*states, **options) for states in examples]
    return torch.cat(outputs, dim=2).to(dtype).transpose(1, 2).contiguous(), None


def varlen_attention(module, query, key, value, mask, *, example_starts, example_lengths, **arguments):
    """per_example_attention in one FlashAttention call, on a CUDA GPU in 16 bit, without dropout.

    `example_starts` (examples + 1,) is an int32 tensor on the GPU."""
    from torch.nn.attention.varlen import varlen_attn

    options = _options(arguments)
    if options["dropout"]:
        raise ValueError("varlen_attention has no dropout")
    # (tokens, heads, head_dim)
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    longest = max(example_lengths)
    keys_before = -1 if options["window"] is None else options["window"] - 1  # -1: all
    ends = (example_starts, example_starts, longest, longest)  # of the queries, of the keys
    grouped = q.shape[1] != k.shape[1]
    sees = (keys_before, 0)
    output = varlen_attn(q, k, v, *ends, scale=options["scaling"], window_size=sees, enable_gqa=grouped)
    return output[None], None


# ------------------------------------------------------------------------------- the KV cache


class KVCache:
    """Keys and values of the sequences being written, one slot each, and the layout of the current forward
    pass.

    Four invariants, kept by the decoding loop:
    - `plan_pass` is called before each forward pass, with the row's layout: the newest token of each running
      sequence, then chunks (prompts, or tokens with their drafts).
    - The masks belong to one pass: `plan_pass` resets them, and the layers of the pass share them.
    - Memory is taken layer by layer, when the first pass shows the shapes of each.
    - Slot i belongs to running[i]: when a sequence ends, `copy` moves another into its slot."""

    def __init__(self, n_slots: int, capacity: int):
        self.n_slots = n_slots
        self.capacity = capacity  # tokens per slot
        # By layer index: keys and values, each (n_slots, key-value heads, capacity, head_dim)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.windows: set[int | None] = set()  # that layers have handed to their attention

    def plan_pass(self, positions: list[int], chunks: list[tuple[int, int, int]], device) -> None:
        """The layout of the next pass: the position of each running sequence's newest token, then prefill
        chunks (slot, first position, number of tokens)."""
        self.n_running = len(positions)
        self.chunks = chunks
        self.runs = group_by_length([position + 1 for position in positions], self._keys_per_call())
        self.positions = torch.tensor(positions, device=device)
        self.slots = torch.arange(len(positions), device=device)
        self._masks = {}

    def _keys_per_call(self) -> float:
        """How many keys (with their values) of one layer memory delivers in the time that one more attention
        call costs."""
        states = next(iter(self.layers.values()), None)
        # Not measured on GPUs, where many calls are worse
        if states is None or states[0].device.type != "cpu":
            return math.inf
        return BYTES_PER_CALL / sum(tensor[0, :, 0].nbytes for tensor in states)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer, whose tokens' `key` and `value` show the shapes."""
        if index not in self.layers:
            self.layers[index] = tuple(
                lazy_zeros((self.n_slots, states.shape[1], self.capacity, states.shape[3]), states)
                for states in (key, value)
            )
        return self.layers[index]

    def mask(self, run: tuple[int, int, int], window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask to add for a run of `runs`, (sequences, 1, 1, keys); None if all see all keys."""
        first, last, n_keys = run
        if last - first == 1 and (window is None or n_keys <= window):
            return None
        if (run, window) not in self._masks:
            mask = causal_mask(self.positions[first:last], n_keys, window)
            self._masks[run, window] = _additive(mask, dtype)[:, None, None]
        return self._masks[run, window]

    def copy(self, source: int, target: int, n: int) -> None:
        """Copies the first `n` positions of one slot to another."""
        for layer in self.layers.values():
            for states in layer:
                states[target, :, :n] = states[source, :, :n]


def group_by_length(lengths: list[int], keys_per_call: float) -> list[tuple[int, int, int]]:
    """The slots split into runs (first, last + 1, longest) of sequences of similar length.

    Attention over a run reads as many keys of each sequence as of the longest. This is the cheapest split if
    a call costs as much as reading `keys_per_call` keys."""
    # For the first 0, 1, 2, ... slots: the cost in keys, and the runs
    cheapest = [(0, [])]
    for last in range(1, len(lengths) + 1):
        longest = 0
        choices = []
        for first in range(last - 1, -1, -1):
            longest = max(longest, lengths[first])
            cost = cheapest[first][0] + longest * (last - first) + keys_per_call
            choices.append((cost, first, longest))
        cost, first, longest = min(choices)
        cheapest.append((cost, [*cheapest[first][1], (first, last, longest)]))
    return cheapest[-1][1]


def lazy_zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of `like`'s dtype and device; on a CPU they take no memory until written. (Zeros, since masked
    values are multiplied by 0 and must be finite.)"""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def kv_cache_attention(module, query, key, value, mask, *, kv_cache: KVCache | None = None, **arguments):
    """Attention of one row of tokens as laid out by `KVCache.plan_pass`, each to the keys of its own
    sequence.

    Without `kv_cache`, as in a plain forward pass or `generate`, the model's ordinary attention, by the mask
    that transformers makes for its "sdpa"; None lets each query see the keys up to its own place, or a single
    one all keys."""
    options = _options(arguments, "softcap")
    window = options.pop("window")
    if kv_cache is None:
        n_queries = query.shape[2]
        if mask is not None and mask.numel() == 0:
            raise ValueError("kv_cache attention takes packed rows only with a KVCache")
        if mask is None and n_queries > 1:
            key, value = key[:, :, :n_queries], value[:, :, :n_queries]
            output = _causal_attention(query, key, value, window=None, **options)
        else:
            output = _attention(query, key, value, mask, **options)
        return output.transpose(1, 2).contiguous(), None
    outputs = []
    kv_cache.windows.add(window)
    keys, values = kv_cache.layer(module.layer_idx, key, value)
    start = kv_cache.n_running
    if start:
        keys[kv_cache.slots, :, kv_cache.positions] = key[0, :, :start].transpose(0, 1)
        values[kv_cache.slots, :, kv_cache.positions] = value[0, :, :start].transpose(0, 1)
        newest = query[0, :, :start].transpose(0, 1)[:, :, None]  # (running, heads, 1, head_dim)
        for run in kv_cache.runs:
            first, last, n_keys = run
            seen = (states[first:last, :, :n_keys] for states in (keys, values))
            run_mask = kv_cache.mask(run, window, query.dtype)
            output = _attention(newest[first:last], *seen, run_mask, **options)
            outputs.append(output[:, :, 0][None])
    for slot, position, n_tokens in kv_cache.chunks:
        tokens = slice(start, start + n_tokens)
        end = position + n_tokens
        keys[slot, :, position:end] = key[0, :, tokens]
        values[slot, :, position:end] = value[0, :, tokens]
        seen = (states[slot : slot + 1, :, :end] for states in (keys, values))
        output = _causal_attention(query[:, :, tokens], *seen, window=window, **options)
        outputs.append(output.transpose(1, 2))
        start += n_tokens
    return torch.cat(outputs, dim=1), None


# Placeholder for the mask of a packed row, which a pass with a KVCache does not need
_PACKED_POSITIONS = torch.empty(1, 1, 1, 0)


def _kv_cache_mask(*, attention_mask=None, allow_is_causal_skip=True, **pattern) -> torch.Tensor | None:
    """`sdpa_mask`, which is called like this, but for positions that are not one sequence's."""
    if attention_mask is None and not allow_is_causal_skip and pattern["q_length"] > 1:
        return _PACKED_POSITIONS
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **pattern)


AttentionInterface.register("per_example", per_example_attention)
AttentionInterface.register("varlen", varlen_attention)
AttentionInterface.register("kv_cache", kv_cache_attention)
AttentionMaskInterface.register("kv_cache", _kv_cache_mask)
