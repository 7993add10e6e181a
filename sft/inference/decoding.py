"""The decoding loop: token ids of many prompts in, token ids of their continuations out. Knows no note and no file.

Each forward pass takes one row of tokens without padding: the newest token of every sequence being written, then whole
prompts that enter. Keys and values are written once, into one slot a sequence, and never moved about by concatenation; a
sequence that ends frees its slot for the next prompt (continuous batching: Yu et al., Orca, OSDI 2022). The beginning
that all prompts share is computed once. Where few sequences are being written, what they may go on to copy from their notes
is checked in the same pass. A model that cannot work this way is found out by `supports_kv_cache`, and
transformers' `generate` does it.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sft.model.attention import KVCache

PROMPT_TOKENS = (
    1024  # prompts enter a forward pass until they have this many tokens: more only takes more memory
)
DRAFT_TOKENS = 8  # drafted in one pass, shared out among the running sequences if each gets two or more
GREEDY_BELOW = (
    0.01  # a temperature below which division would overflow, and the likeliest token is drawn anyway
)


@dataclass
class GeneratedSequence:
    """One sequence: its prompt's number and what has been written so far."""

    index: int
    prompt: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)  # with the end token, where it has come
    log_probs: list[float] = field(default_factory=list)  # of each token, at temperature 1
    finish_reason: str = ""  # "stop", "length", or "" while it is being written

    def gumbel_noise(self, ahead: int, n: int) -> torch.Tensor:
        """Gumbel noise (n,) to draw the token after the next `ahead` ones with: by seed, number and place alone."""
        seed = random.Random(f"{self.seed} {self.index} {len(self.ids) + ahead}").getrandbits(63)
        return (
            -torch.empty(n)
            .exponential_(generator=torch.Generator().manual_seed(seed))
            .clamp_(min=1e-30)
            .log_()
        )

    def add(self, token: int, log_prob: float, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.finish_reason = (
            "stop" if token in stop_ids else "length" if len(self.ids) == max_new_tokens else ""
        )


def make_sequences(prompts: dict[int, list[int]], seed: int) -> list[GeneratedSequence]:
    """A sequence for each numbered prompt, the longest first: too little memory shows at the start."""
    return sorted(
        (GeneratedSequence(index, prompt, seed) for index, prompt in prompts.items()),
        key=lambda sequence: -len(sequence.prompt),
    )


def sample(
    logits: torch.Tensor, temperature: float, places: Sequence[tuple[GeneratedSequence, int]]
) -> tuple[list[int], list[float]]:
    """A token for each place (sequence, tokens ahead) and its log-probability at temperature 1; `logits` is (places, vocabulary)."""
    logits = logits.float()
    scores = logits
    if (
        temperature >= GREEDY_BELOW
    ):  # the largest sum with Gumbel noise is a draw from the softmax, which rounding hardly ever changes
        scores = logits / temperature + torch.stack(
            [s.gumbel_noise(ahead, logits.shape[-1]) for s, ahead in places]
        ).to(logits.device)
    tokens = scores.argmax(-1, keepdim=True)
    log_probs = logits.gather(1, tokens)[:, 0] - logits.logsumexp(-1)
    return tokens[:, 0].tolist(), log_probs.tolist()


def draft(sequence: GeneratedSequence, n: int) -> list[int]:
    """Up to `n` tokens that may come next: those that followed where the newest two tokens (else the newest one) last stood
    before. Summaries copy from notes (prompt lookup decoding: Saxena, github.com/apoorvumang/prompt-lookup-decoding, 2023)."""
    text = sequence.prompt + sequence.ids
    for newest, most in (
        (text[-2:], n),
        (text[-1:], min(n, 3)),
    ):  # after a single token the same words follow less often
        for end in range(len(text) - 1, len(newest) - 1, -1):
            if text[end - len(newest) : end] == newest:
                return text[end : end + most]
    return []


# ------------------------------------------------------------------------------------------------ keys and values


def forward(
    model,
    slots: KVCache,
    running: Sequence[GeneratedSequence],
    parts: Sequence[tuple[int, int, list[int], int]],
) -> torch.Tensor:
    """One pass: logits (running + kept, vocabulary) after each running sequence's newest token, and after the last `kept`
    tokens of each part (slot, first position, token ids, kept)."""
    device = model.get_input_embeddings().weight.device
    positions = [len(sequence.prompt) + len(sequence.ids) - 1 for sequence in running]
    slots.plan_pass(positions, [(slot, first, len(ids)) for slot, first, ids, _ in parts], device)
    tokens, ends = [sequence.ids[-1] for sequence in running], list(range(len(running)))
    for _, first, ids, kept in parts:
        tokens += ids
        positions += range(first, first + len(ids))
        ends += range(len(tokens) - kept, len(tokens))
    before = model.config._attn_implementation
    model.config._attn_implementation = "kv_cache"
    try:
        return model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            logits_to_keep=torch.tensor(ends, device=device),
            kv_cache=slots,
            use_cache=False,
        ).logits[0]
    finally:
        model.config._attn_implementation = before


# ------------------------------------------------------------------------------------------------ the loop


def common_prefix_length(prompts: Sequence[list[int]]) -> int:
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
    on_token: Callable[[GeneratedSequence], None] | None = None,
) -> Iterator[GeneratedSequence]:
    """Writes on from each numbered prompt (one token or more) and yields the sequences as they end, at most `batch_size`
    of them at a time. `on_token` is called after each token.

    `model` is a base model (not a PeftModel) for which `supports_kv_cache` is true.
    """
    waiting = deque(make_sequences(prompts, seed))
    n_slots, running = min(batch_size, len(waiting)), []
    n_shared = common_prefix_length(list(prompts.values()))
    slots = KVCache(n_slots + bool(n_shared), max(map(len, prompts.values()), default=0) + max_new_tokens)
    if n_shared:  # in a slot of its own, copied from there
        forward(model, slots, [], [(n_slots, 0, waiting[0].prompt[:n_shared], 1)])
    while waiting or running:
        share = DRAFT_TOKENS // max(len(running), 1)
        drafts = [draft(s, min(share, max_new_tokens - len(s.ids) - 1)) if share > 1 else [] for s in running]
        newest, parts = running, []
        if any(drafts):  # all running sequences enter the pass as parts of several tokens
            newest, starts = [], [len(s.prompt) + len(s.ids) - 1 for s in running]
            parts = [
                (i, starts[i], [s.ids[-1], *ids], len(ids) + 1)
                for i, (s, ids) in enumerate(zip(running, drafts))
            ]
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
        drawn_for = [
            (sequence, ahead) for sequence, ids in zip(running, drafts) for ahead in range(len(ids) + 1)
        ]
        drawn = zip(*sample(logits, temperature, drawn_for))
        for sequence, ids in zip(running, drafts):
            for expected, (token, log_prob) in zip([*ids, None], [next(drawn) for _ in range(len(ids) + 1)]):
                sequence.add(token, log_prob, stop_ids, max_new_tokens)
                if on_token:
                    on_token(sequence)
                if (
                    sequence.finish_reason or token != expected
                ):  # what was computed after another token is worth nothing
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
    on_token: Callable[[GeneratedSequence], None] | None = None,
) -> Iterator[GeneratedSequence]:
    """The same through transformers' `generate`, for models that cannot take slots: batches padded on the left."""
    device = model.get_input_embeddings().weight.device
    sequences = make_sequences(prompts, seed)
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = len(batch[0].prompt)
        input_ids = torch.tensor(
            [[stop_ids[0]] * (longest - len(s.prompt)) + s.prompt for s in batch], device=device
        )
        attention_mask = torch.tensor(
            [[0] * (longest - len(s.prompt)) + [1] * len(s.prompt) for s in batch], device=device
        )

        class Choose(LogitsProcessor):
            def __call__(self, input_ids, scores):
                tokens, log_probs = sample(scores, temperature, [(s, 0) for s in batch])
                for sequence, token, log_prob in zip(batch, tokens, log_probs):
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
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stop_ids),
                pad_token_id=stop_ids[0],
                do_sample=False,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([Choose()]),
        )
        yield from batch


@torch.inference_mode()
def supports_kv_cache(model) -> bool:
    """Whether `forward` gives a base model's own logits: tried with prompts that enter together, share a beginning, and
    have tokens written after them, longer than an attention window of up to 512 tokens."""
    text, device = model.config.get_text_config(), model.get_input_embeddings().weight.device
    if getattr(text, "attention_chunk_size", None):  # Llama 4: the chunks are in transformers' mask alone
        return False
    window = getattr(text, "sliding_window", None) or 0
    shared, lengths = [5, 2], ((window if window <= 512 else 0) + 9, 7, 4)
    sequences = make_sequences(
        {i: shared + [(7 * k + 3 * n) % text.vocab_size for k in range(n)] for i, n in enumerate(lengths)}, 0
    )
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    try:
        slots = KVCache(4, len(sequences[0].prompt) + 2)
        forward(model, slots, [], [(3, 0, shared, 1)])
        for slot in range(3):
            slots.copy(3, slot, 2)
        found = [forward(model, slots, [], [(slot, 2, s.prompt[2:], 1) for slot, s in enumerate(sequences)])]
        for _ in range(2):
            for sequence in sequences:
                sequence.ids.append((sequence.index + 11) % text.vocab_size)
            found.append(forward(model, slots, sequences, []))
        for sequence in sequences:
            own = (
                model(
                    input_ids=torch.tensor([sequence.prompt + sequence.ids], device=device), use_cache=False
                )
                .logits[0, -3:]
                .float()
            )
            ours = torch.stack([logits[sequence.index] for logits in found]).float()
            if (
                ours.shape != own.shape
                or not (ours - own).abs().max() <= (1e-3 if exact else 5e-2) * own.abs().max()
            ):
                return False
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError):
        return False
    return True
