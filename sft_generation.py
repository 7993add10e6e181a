"""The decoding loop: token ids of many prompts in, token ids of their continuations out. Knows no note and no file.

Each forward pass takes one row of tokens without padding: the newest token of every sequence being written, then whole
prompts that enter. Keys and values are written once, into one slot a sequence, and never moved about by concatenation; a
sequence that ends frees its slot for the next prompt (continuous batching: Yu et al., Orca, OSDI 2022). The beginning
that all prompts share is computed once. Where few sequences are being written, what they may go on to copy from their notes
is checked in the same pass. A model that cannot work this way is found out by `takes_slots`, and
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
from transformers import AttentionInterface, GenerationConfig, LogitsProcessor, LogitsProcessorList

PROMPT_TOKENS = 1024  # prompts enter a forward pass until they have this many tokens: more only takes more memory
DRAFT_TOKENS = 8  # drafted in one pass, shared out among the running sequences if each gets two or more
CALL_BYTES = 1_500_000  # 75 microseconds at 20 GB/s, both measured on a CPU of two cores
GREEDY_BELOW = 0.01  # a temperature below which division would overflow, and the likeliest token is drawn anyway


@dataclass
class Written:
    """One sequence: its prompt's number and what has been written so far."""

    index: int
    prompt: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)  # with the end token, where it has come
    log_probs: list[float] = field(default_factory=list)  # of each token, at temperature 1
    finish_reason: str = ""  # "stop", "length", or "" while it is being written

    def noise(self, ahead: int, n: int) -> torch.Tensor:
        """Gumbel noise (n,) to draw the token after the next `ahead` ones with: by seed, number and place alone."""
        seed = random.Random(f"{self.seed} {self.index} {len(self.ids) + ahead}").getrandbits(63)
        return -torch.empty(n).exponential_(generator=torch.Generator().manual_seed(seed)).clamp_(min=1e-30).log_()

    def add(self, token: int, log_prob: float, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.finish_reason = "stop" if token in stop_ids else "length" if len(self.ids) == max_new_tokens else ""


def new_sequences(prompts: dict[int, list[int]], seed: int) -> list[Written]:
    """A sequence for each numbered prompt, the longest first: too little memory shows at the start."""
    return sorted((Written(index, prompt, seed) for index, prompt in prompts.items()), key=lambda sequence: -len(sequence.prompt))


def choose(logits: torch.Tensor, temperature: float, places: Sequence[tuple[Written, int]]) -> tuple[list[int], list[float]]:
    """A token for each place (sequence, tokens ahead) and its log-probability at temperature 1; `logits` is (places, vocabulary)."""
    logits = logits.float()
    scores = logits
    if temperature >= GREEDY_BELOW:  # the largest sum with Gumbel noise is a draw from the softmax, which rounding hardly ever changes
        scores = logits / temperature + torch.stack([s.noise(ahead, logits.shape[-1]) for s, ahead in places]).to(logits.device)
    tokens = scores.argmax(-1, keepdim=True)
    log_probs = logits.gather(1, tokens)[:, 0] - logits.logsumexp(-1)
    return tokens[:, 0].tolist(), log_probs.tolist()


def draft(sequence: Written, n: int) -> list[int]:
    """Up to `n` tokens that may come next: those that followed where the newest two tokens (else the newest one) last stood
    before. Summaries copy from notes (prompt lookup decoding: Saxena, github.com/apoorvumang/prompt-lookup-decoding, 2023)."""
    text = sequence.prompt + sequence.ids
    for newest, most in ((text[-2:], n), (text[-1:], min(n, 3))):  # after a single token the same words follow less often
        for end in range(len(text) - 1, len(newest) - 1, -1):
            if text[end - len(newest) : end] == newest:
                return text[end : end + most]
    return []


# ------------------------------------------------------------------------------------------------ keys and values


class Slots:
    """Keys and values of the sequences being written, and the layout of the present forward pass.

    Slots 0 ... running-1 hold the running sequences, whose newest tokens come first in the row; then come the `parts` of
    sequences (slot, first position, number of tokens). Memory is taken layer by layer when the model first shows its shapes.
    """

    def __init__(self, n_slots: int, capacity: int):
        self.n_slots, self.capacity = n_slots, capacity
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # each (n_slots, key-value heads, capacity, head_dim)

    def lay_out(self, positions: list[int], parts: list[tuple[int, int, int]], device) -> None:
        """For the next pass: the position of each running sequence's newest token, and the parts."""
        self.n_running, self.parts = len(positions), parts
        self.runs = alike([position + 1 for position in positions], self.keys_per_call())
        self.positions = torch.tensor(positions, device=device)
        self.rows = torch.arange(len(positions), device=device)
        self._masks = {}

    def keys_per_call(self) -> float:
        """How many keys (with their values) of one layer memory delivers in the time that one more call of attention costs."""
        states = next(iter(self.layers.values()), None)
        if states is None or states[0].device.type != "cpu":  # not measured on GPUs, where many calls are worse
            return math.inf
        return CALL_BYTES / sum(tensor[0, :, 0].nbytes for tensor in states)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self.layers:
            self.layers[index] = tuple(
                zeros((self.n_slots, states.shape[1], self.capacity, states.shape[3]), states) for states in (key, value)
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
            mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)
            self._masks[run, window] = mask[:, None, None]
        return self._masks[run, window]

    def copy(self, source: int, target: int, n: int) -> None:
        """The first `n` positions of one slot to another."""
        for states in (states for layer in self.layers.values() for states in layer):
            states[target, :, :n] = states[source, :, :n]


def alike(lengths: list[int], per_call: float) -> list[tuple[int, int, int]]:
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
        for run in slots.runs:
            first, last, n_keys = run
            seen = (states[first:last, :, :n_keys] for states in (keys, values))
            output = attention(grouped[first:last], *seen, mask=slots.mask(run, sliding_window, query.dtype), **options)
            outputs.append(output.flatten(1, 2)[None])
    for slot, first, n in slots.parts:
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
    if softcap is None and (window is None or n <= window) and n_new > n // 4:
        query = F.pad(query, (0, 0, n - n_new, 0))  # is_causal wants a square; nobody reads the rows added
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)[:, :, n - n_new :]
    place = torch.arange(n, device=query.device)
    distance = place[n - n_new :, None] - place
    unseen = (distance < 0) | (distance >= (window or n))
    mask = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill_(unseen, -torch.inf)
    grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)  # the heads that share a key-value head stand as more queries
    output = attention(grouped, key, value, mask=mask.repeat(groups, 1), scaling=scaling, softcap=softcap)
    return output.unflatten(2, (groups, n_new)).flatten(1, 2)


def attention(query, key, value, *, mask, scaling, softcap):
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap  # Gemma 2, arXiv 2408.00118
    return (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register("slots", slot_attention)


def forward(model, slots: Slots, running: Sequence[Written], parts: Sequence[tuple[int, int, list[int], int]]) -> torch.Tensor:
    """One pass: logits (running + kept, vocabulary) after each running sequence's newest token, and after the last `kept`
    tokens of each part (slot, first position, token ids, kept)."""
    device = model.get_input_embeddings().weight.device
    positions = [len(sequence.prompt) + len(sequence.ids) - 1 for sequence in running]
    slots.lay_out(positions, [(slot, first, len(ids)) for slot, first, ids, _ in parts], device)
    tokens, ends = [sequence.ids[-1] for sequence in running], list(range(len(running)))
    for _, first, ids, kept in parts:
        tokens += ids
        positions += range(first, first + len(ids))
        ends += range(len(tokens) - kept, len(tokens))
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
        forward(model, slots, [], [(n_slots, 0, waiting[0].prompt[:n_shared], 1)])
    while waiting or running:
        share = DRAFT_TOKENS // max(len(running), 1)
        drafts = [draft(s, min(share, max_new_tokens - len(s.ids) - 1)) if share > 1 else [] for s in running]
        newest, parts = running, []
        if any(drafts):  # all running sequences enter the pass as parts of several tokens
            newest, starts = [], [len(s.prompt) + len(s.ids) - 1 for s in running]
            parts = [(i, starts[i], [s.ids[-1], *ids], len(ids) + 1) for i, (s, ids) in enumerate(zip(running, drafts))]
        entering, n_tokens = [], 0
        while waiting and len(running) + len(entering) < n_slots and n_tokens < PROMPT_TOKENS:
            entering.append(waiting.popleft())
            n_tokens += len(entering[-1].prompt) - n_shared
        places = range(len(running), len(running) + len(entering))
        if n_shared:
            for slot in places:
                slots.copy(n_slots, slot, n_shared)
        parts += [(slot, n_shared, sequence.prompt[n_shared:], 1) for slot, sequence in zip(places, entering)]
        logits = forward(model, slots, newest, parts)
        running, drafts = running + entering, drafts + [[]] * len(entering)
        drawn_for = [(sequence, ahead) for sequence, ids in zip(running, drafts) for ahead in range(len(ids) + 1)]
        drawn = zip(*choose(logits, temperature, drawn_for))
        for sequence, ids in zip(running, drafts):
            for expected, (token, log_prob) in zip([*ids, None], [next(drawn) for _ in range(len(ids) + 1)]):
                sequence.add(token, log_prob, stop_ids, max_new_tokens)
                if on_token:
                    on_token(sequence)
                if sequence.finish_reason or token != expected:  # what was computed after another token is worth nothing
                    break
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
                tokens, log_probs = choose(scores, temperature, [(s, 0) for s in batch])  # noqa: B023 (used in this turn of the loop alone)
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
        forward(model, slots, [], [(3, 0, shared, 1)])
        for slot in range(3):
            slots.copy(3, slot, 2)
        found = [forward(model, slots, [], [(slot, 2, s.prompt[2:], 1) for slot, s in enumerate(sequences)])]
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
