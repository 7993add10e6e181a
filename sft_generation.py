"""The decoding loop: token ids of many prompts in, token ids of their continuations out. Knows no note and no file.

Each forward pass takes one row of tokens without padding: the newest token of every sequence being written, then whole
prompts that enter. Keys and values are written once, into one slot a sequence, and never moved about by concatenation; a
sequence that ends frees its slot for the next prompt (continuous batching: Yu et al., Orca, OSDI 2022). The beginning
that all prompts share is computed once. A model that cannot work this way is found out by `takes_slots`, and
transformers' `generate` does it.
"""

import math
import mmap
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, GenerationConfig, LogitsProcessor, LogitsProcessorList

from sft_kernels import has_onednn

PROMPT_TOKENS = 1024  # prompts enter a forward pass until they have this many tokens: more only takes more memory
GREEDY_BELOW = 0.01  # a temperature below which division would overflow, and the likeliest token is drawn anyway


@dataclass
class Written:
    """One sequence: its prompt's number and what has been written so far."""

    index: int
    prompt: list[int]
    random: random.Random
    ids: list[int] = field(default_factory=list)  # with the end token, where it has come
    log_probs: list[float] = field(default_factory=list)  # of each token, at temperature 1
    finish_reason: str = ""  # "stop", "length", or "" while it is being written

    def add(self, token: int, log_prob: float, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.finish_reason = "stop" if token in stop_ids else "length" if len(self.ids) == max_new_tokens else ""


def new_sequences(prompts: dict[int, list[int]], seed: int) -> list[Written]:
    """A sequence for each numbered prompt, the longest first: too little memory shows at the start. What is drawn for a
    sequence depends on the seed and its number alone, not on its neighbours."""
    sequences = [Written(index, prompt, random.Random(f"{seed} {index}")) for index, prompt in prompts.items()]
    return sorted(sequences, key=lambda sequence: -len(sequence.prompt))


def choose(logits: torch.Tensor, temperature: float, sequences: Sequence[Written]) -> tuple[list[int], list[float]]:
    """The next token of each sequence and its log-probability at temperature 1; `logits` is (sequences, vocabulary)."""
    logits = logits.float()
    if temperature < GREEDY_BELOW:
        tokens = logits.argmax(-1, keepdim=True)
    else:  # the token at a random height of the probabilities' running sum
        height = torch.tensor([[sequence.random.random()] for sequence in sequences], device=logits.device)
        running_sum = (logits / temperature).softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(running_sum, height * running_sum[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    log_probs = logits.gather(1, tokens)[:, 0] - logits.logsumexp(-1)
    return tokens[:, 0].tolist(), log_probs.tolist()


# ------------------------------------------------------------------------------------------------ keys and values


class Slots:
    """Keys and values of the sequences being written, and the layout of the present forward pass.

    Slots 0 ... running-1 hold the running sequences, whose newest tokens come first in the row; then come the `entering`
    (slot, first position, number of tokens). Memory is taken layer by layer when the model first shows its shapes.
    """

    def __init__(self, n_slots: int, capacity: int):
        self.n_slots, self.capacity = n_slots, capacity
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # each (n_slots, key-value heads, capacity, head_dim)

    def lay_out(self, positions: list[int], entering: list[tuple[int, int, int]], device) -> None:
        """For the next pass: the position of each running sequence's newest token, and the entering prompts."""
        self.n_running, self.entering = len(positions), entering
        self.n_keys = max(positions, default=-1) + 1
        self.positions = torch.tensor(positions, device=device)
        self.rows = torch.arange(len(positions), device=device)
        self._masks = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self.layers:
            self.layers[index] = tuple(
                zeros((self.n_slots, states.shape[1], self.capacity, states.shape[3]), states) for states in (key, value)
            )
        return self.layers[index]

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(running, 1, 1, n_keys): 0 where a running sequence sees a key, -inf elsewhere. None where all see all."""
        if self.n_running == 1 and (window is None or self.n_keys <= window):
            return None
        if window not in self._masks:
            distance = self.positions[:, None] - torch.arange(self.n_keys, device=self.positions.device)
            unseen = (distance < 0) | (distance >= (window or self.n_keys))
            self._masks[window] = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)[
                :, None, None
            ]
        return self._masks[window]

    def copy(self, source: int, target: int, n: int) -> None:
        """The first `n` positions of one slot to another."""
        for states in (states for layer in self.layers.values() for states in layer):
            states[target, :, :n] = states[source, :, :n]


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros (what is masked is multiplied by 0, and must be finite); on a CPU they take no memory until written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * like.element_size()), dtype=like.dtype).view(shape)


def slot_attention(
    module, query, key, value, attention_mask, *, slots: Slots, scaling=None, sliding_window=None, softcap=None, dropout=0.0, **kwargs
):
    """Attention of one row of tokens laid out by `Slots.lay_out`, each to the keys of its own sequence.

    query (1, heads, tokens, head_dim), key and value (1, key-value heads, tokens, head_dim). Returns
    (1, tokens, heads, head_dim) and None, as transformers' AttentionInterface asks.
    """
    unsupported = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"slot_attention has no {unsupported[0]}")
    keys, values = slots.layer(module.layer_idx, key, value)
    options, outputs, start = {"scaling": scaling, "softcap": softcap}, [], slots.n_running
    if start:
        keys[slots.rows, :, slots.positions] = key[0, :, :start].transpose(0, 1)
        values[slots.rows, :, slots.positions] = value[0, :, :start].transpose(0, 1)
        # The heads that share a key-value head stand as that many queries: (running, key-value heads, groups, head_dim)
        grouped = query[0, :, :start].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        seen = (states[:start, :, : slots.n_keys] for states in (keys, values))
        output = attention(grouped, *seen, mask=slots.mask(sliding_window, query.dtype), **options)
        outputs.append(output.flatten(1, 2)[None])
    for slot, first, n in slots.entering:
        own = slice(start, start + n)
        keys[slot, :, first : first + n] = key[0, :, own]
        values[slot, :, first : first + n] = value[0, :, own]
        seen = (states[slot : slot + 1, :, : first + n] for states in (keys, values))
        outputs.append(causal_attention(query[:, :, own], *seen, window=sliding_window, **options).transpose(1, 2))
        start += n
    return torch.cat(outputs, dim=1), None


def causal_attention(query, key, value, *, window, scaling, softcap):
    """Attention of the last tokens of a sequence (queries) to all its tokens up to themselves (keys)."""
    n_new, n = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    if softcap is None and (window is None or n <= window):
        query = F.pad(query, (0, 0, n - n_new, 0))  # is_causal wants a square; nobody reads the rows added
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)[:, :, n - n_new :]
    place = torch.arange(n, device=query.device)
    distance = place[n - n_new :, None] - place
    unseen = (distance < 0) | (distance >= (window or n))
    mask = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill_(unseen, -torch.inf)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return attention(query, key, value, mask=mask, scaling=scaling, softcap=softcap)


def attention(query, key, value, *, mask, scaling, softcap):
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap  # Gemma 2, arXiv 2408.00118
    return (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register("slots", slot_attention)


def forward(model, slots: Slots, running: Sequence[Written], entering: Sequence[tuple[int, int, list[int]]]) -> torch.Tensor:
    """One pass: logits (running + entering, vocabulary) after each running sequence's newest token and after the last of
    each entering (slot, first position, token ids)."""
    device = model.get_input_embeddings().weight.device
    positions = [len(sequence.prompt) + len(sequence.ids) - 1 for sequence in running]
    slots.lay_out(positions, [(slot, first, len(ids)) for slot, first, ids in entering], device)
    tokens, ends = [sequence.ids[-1] for sequence in running], list(range(len(running)))
    for _, first, ids in entering:
        tokens += ids
        positions += range(first, first + len(ids))
        ends.append(len(tokens) - 1)
    before = model.config._attn_implementation
    model.config._attn_implementation = "slots"
    try:
        return model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            logits_to_keep=torch.tensor(ends, device=device),
            slots=slots,
            use_cache=False,
        ).logits[0]
    finally:
        model.config._attn_implementation = before


# ------------------------------------------------------------------------------------------------ the loop


def shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving each a last one of its own; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # in the order of a dictionary: all others lie between
    n_same = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))
    return min(n_same, *(len(prompt) - 1 for prompt in prompts))


@torch.inference_mode()
def decode(
    model,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    temperature: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
    on_token: Callable[[Written], None] | None = None,
) -> Iterator[Written]:
    """Writes on from each numbered prompt (one token or more) and yields the sequences as they end, at most `batch_size`
    of them at a time. `on_token` is called after each token.

    `model` is a base model (not a PeftModel) for which `takes_slots` is true.
    """
    waiting = deque(new_sequences(prompts, seed))
    n_slots, running = min(batch_size, len(waiting)), []
    n_shared = shared_length(list(prompts.values()))
    slots = Slots(n_slots + bool(n_shared), max(map(len, prompts.values()), default=0) + max_new_tokens)
    if n_shared:  # in a slot of its own, copied from there
        forward(model, slots, [], [(n_slots, 0, waiting[0].prompt[:n_shared])])
    while waiting or running:
        entering, n_tokens = [], 0
        while waiting and len(running) + len(entering) < n_slots and n_tokens < PROMPT_TOKENS:
            entering.append(waiting.popleft())
            n_tokens += len(entering[-1].prompt) - n_shared
        places = range(len(running), len(running) + len(entering))
        if n_shared:
            for slot in places:
                slots.copy(n_slots, slot, n_shared)
        prompt_parts = [(slot, n_shared, sequence.prompt[n_shared:]) for slot, sequence in zip(places, entering)]
        logits = forward(model, slots, running, prompt_parts)
        running += entering
        for sequence, token, log_prob in zip(running, *choose(logits, temperature, running)):
            sequence.add(token, log_prob, stop_ids, max_new_tokens)
            if on_token:
                on_token(sequence)
        for slot in reversed(range(len(running))):  # the last sequence moves into the slot of one that ended
            if running[slot].finish_reason:
                ended, running[slot] = running[slot], running[-1]
                last = running.pop()
                if last is not ended:
                    slots.copy(len(running), slot, len(last.prompt) + len(last.ids) - 1)
                yield ended


@torch.inference_mode()
def decode_with_generate(
    model,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    temperature: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
    on_token: Callable[[Written], None] | None = None,
) -> Iterator[Written]:
    """The same through transformers' `generate`, for models that cannot take slots: batches padded on the left."""
    device = model.get_input_embeddings().weight.device
    sequences = new_sequences(prompts, seed)
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = len(batch[0].prompt)
        input_ids = torch.tensor([[stop_ids[0]] * (longest - len(s.prompt)) + s.prompt for s in batch], device=device)
        attention_mask = torch.tensor([[0] * (longest - len(s.prompt)) + [1] * len(s.prompt) for s in batch], device=device)

        class Choose(LogitsProcessor):
            def __call__(self, input_ids, scores):
                tokens, log_probs = choose(scores, temperature, batch)  # noqa: B023 (used in this turn of the loop alone)
                for sequence, token, log_prob in zip(batch, tokens, log_probs):  # noqa: B023
                    if not sequence.finish_reason:
                        sequence.add(token, log_prob, stop_ids, max_new_tokens)
                        if on_token:
                            on_token(sequence)
                chosen = torch.tensor(tokens, device=scores.device)[:, None]
                return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

        model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], do_sample=False, use_cache=True
            ),
            logits_processor=LogitsProcessorList([Choose()]),
        )
        yield from batch


@torch.inference_mode()
def takes_slots(model) -> bool:
    """Whether `forward` gives a base model's own logits: tried with prompts that enter together, share a beginning, and
    have tokens written after them, longer than an attention window of up to 512 tokens."""
    text, device = model.config.get_text_config(), model.get_input_embeddings().weight.device
    if getattr(text, "attention_chunk_size", None):  # Llama 4: the chunks are in transformers' mask alone
        return False
    window = getattr(text, "sliding_window", None) or 0
    shared, lengths = [5, 2], ((window if window <= 512 else 0) + 9, 7, 4)
    sequences = new_sequences({i: shared + [(7 * k + 3 * n) % text.vocab_size for k in range(n)] for i, n in enumerate(lengths)}, 0)
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    try:
        slots = Slots(4, len(sequences[0].prompt) + 2)
        forward(model, slots, [], [(3, 0, shared)])
        for slot in range(3):
            slots.copy(3, slot, 2)
        found = [forward(model, slots, [], [(slot, 2, s.prompt[2:]) for slot, s in enumerate(sequences)])]
        for _ in range(2):
            for sequence in sequences:
                sequence.ids.append((sequence.index + 11) % text.vocab_size)
            found.append(forward(model, slots, sequences, []))
        for sequence in sequences:
            own = model(input_ids=torch.tensor([sequence.prompt + sequence.ids], device=device), use_cache=False).logits[0, -3:].float()
            ours = torch.stack([logits[sequence.index] for logits in found]).float()
            if ours.shape != own.shape or not (ours - own).abs().max() <= (1e-3 if exact else 5e-2) * own.abs().max():
                return False
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError):
        return False
    return True


# ------------------------------------------------------------------------------------------------ matrices on a CPU


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has brought into its own order once, instead of for each product. For inference
    alone. (The operators are those that torch.compile puts into frozen models.)"""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 32), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linear_layers(model) -> None:
    """Puts PackedLinear in the place of a CPU model's float32 linear layers (oneDNN refuses 16 bits on CPUs without the
    instructions); the model then gives no gradient and cannot be saved."""
    if not has_onednn():
        return
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind not in ("Linear", "Conv1D") or module.weight.dtype != torch.float32:
            continue
        parent, _, own = name.rpartition(".")
        weight = module.weight if kind == "Linear" else module.weight.t()  # GPT-2's Conv1D keeps it transposed
        setattr(model.get_submodule(parent), own, PackedLinear(weight, module.bias))
