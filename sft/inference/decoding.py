"""The decoding loop: token ids of many prompts in, token ids of their continuations out. Knows no note and no
file.

`decode` is continuous batching (Yu et al., Orca, OSDI 2022) over a KV cache with one slot per sequence: keys
and values are written once and never concatenated, and a sequence that ends frees its slot for the next
prompt. The prefix that all prompts share is computed once. When few sequences are running, each forward pass
also verifies drafts copied from their prompts. `enable_kv_cache` finds out whether a model can work this way;
sft/inference/generate.py is for the rest."""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import torch

from sft.cli import RunError, first_line, is_out_of_memory
from sft.inference.endings import repeated_from
from sft.model.attention import KVCache
from sft.model.probes import logits_problem, probe_failure, reference_attention
from sft.options import DEFAULT_GENERATION_BATCH_SIZE

# Prompts enter a forward pass until they have this many tokens: more would only take more memory
PREFILL_TOKENS = 1024

# Drafted in one pass, shared among the running sequences if each gets two or more
DRAFT_TOKENS = 8

# Below this temperature sampling would give the likeliest token anyway, and the division could overflow
GREEDY_BELOW = 0.01


# ------------------------------------------------------------------------------- sequences


@dataclass(frozen=True)
class Settings:
    """How sequences are written."""

    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = DEFAULT_GENERATION_BATCH_SIZE  # sequences at a time, at most
    numbers: Set[int] = frozenset()  # the tokens that are digits
    on_token: Callable | None = None  # called with a GeneratedSequence after each of its tokens
    # Asked after each forward pass; once it is true, the sequences that are still running are left
    should_stop: Callable[[], bool] | None = None


@dataclass
class GeneratedSequence:
    """One sequence: its prompt's number and what has been generated so far."""

    index: int
    prompt: list[int]
    settings: Settings
    ids: list[int] = field(default_factory=list)  # with the end token, once it has come
    log_probs: list[float] = field(default_factory=list)  # of each token, at temperature 1
    n_kept: int | None = None  # of a loop's ids: those before it is repeated
    # "stop", "loop", "length", "nan" (the model computed it), or "" while it is running
    finish_reason: str = ""

    def gumbel_noise(self, ahead: int, n: int) -> torch.Tensor:
        """Gumbel noise (n,) to sample the token after the next `ahead` ones with. It depends on seed, prompt
        number and position alone, so that neither batch size nor order changes a sample."""
        name = f"{self.settings.seed} {self.index} {len(self.ids) + ahead}"
        generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
        exponential = torch.empty(n).exponential_(generator=generator)
        return -exponential.clamp_(min=1e-30).log_()

    def add(self, token: int, log_prob: float) -> None:
        if math.isfinite(log_prob):
            self.ids.append(token)
            self.log_probs.append(log_prob)
            self._finish()
        else:
            self.finish_reason = "nan"
        if self.settings.on_token:
            self.settings.on_token(self)

    def _finish(self) -> None:
        """Sets `finish_reason` if the newest token is the last one."""
        if self.ids[-1] in self.settings.stop_ids:
            self.finish_reason = "stop"
        elif (n_kept := repeated_from(self.ids, self.settings.numbers)) is not None:
            self.finish_reason = "loop"
            self.n_kept = n_kept
        elif len(self.ids) == self.settings.max_new_tokens:
            self.finish_reason = "length"


def make_sequences(prompts: dict[int, list[int]], settings: Settings) -> list[GeneratedSequence]:
    """A sequence for each numbered prompt, the longest first, so that too little memory shows at the
    start."""
    sequences = [GeneratedSequence(i, prompt, settings) for i, prompt in prompts.items()]
    return sorted(sequences, key=lambda sequence: -len(sequence.prompt))


def sample(
    logits: torch.Tensor, positions: Sequence[tuple[GeneratedSequence, int]]
) -> tuple[list[int], list[float]]:
    """A token for each position (sequence, tokens ahead) and its log-probability at temperature 1.

    `logits` is (positions, vocabulary). The largest sum of a logit and Gumbel noise samples from the
    softmax, which rounding rarely changes."""
    logits = logits.float()
    scores = logits
    temperature = positions[0][0].settings.temperature
    if temperature >= GREEDY_BELOW:
        noise = [sequence.gumbel_noise(ahead, logits.shape[-1]) for sequence, ahead in positions]
        scores = logits / temperature + torch.stack(noise).to(logits.device)
    tokens = scores.argmax(-1, keepdim=True)
    log_probs = logits.gather(1, tokens)[:, 0] - logits.logsumexp(-1)
    return tokens[:, 0].tolist(), log_probs.tolist()


def draft(sequence: GeneratedSequence, n: int) -> list[int]:
    """Up to `n` tokens that may come next: those that followed the last earlier occurrence of the newest two
    tokens, else of the newest one. Summaries copy from notes (prompt lookup decoding: Saxena,
    github.com/apoorvumang/prompt-lookup-decoding, 2023)."""
    text = sequence.prompt + sequence.ids
    # After a single token the same words follow less often: a shorter draft
    for newest, n_drafted in ((text[-2:], n), (text[-1:], min(n, 3))):
        for end in range(len(text) - 1, len(newest) - 1, -1):
            if text[end - len(newest) : end] == newest:
                return text[end : end + n_drafted]
    return []


def common_prefix_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts share at the start, at most all but the last of each; 0 for one prompt."""
    if len(prompts) < 2:
        return 0
    # In the order of a dictionary all other prompts lie between these two
    low = min(prompts)
    high = max(prompts)
    n_same = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))
    return min(n_same, *(len(prompt) - 1 for prompt in prompts))


# ------------------------------------------------------------------------------- one forward pass


class Chunk(NamedTuple):
    """Tokens of one sequence in a forward pass: a prompt that enters, or the newest token and its draft."""

    slot: int
    first: int  # position of the first token
    ids: list[int]
    n_logits: int  # logits wanted: after the last so many tokens

    @property
    def drafted(self) -> list[int]:
        return self.ids[len(self.ids) - self.n_logits + 1 :]


def forward(model, cache: KVCache, chunks: Sequence[Chunk], n_single: int = 0) -> torch.Tensor:
    """One pass over one row of tokens without padding, chunk after chunk. The first `n_single` chunks are one
    token each, in the slots 0, 1, ...: their attention is computed together.

    Returns logits (n, vocabulary) in the order of the row, `n_logits` of each chunk."""
    device = model.get_input_embeddings().weight.device
    tokens = []
    positions = []
    kept = []
    for chunk in chunks:
        tokens += chunk.ids
        positions += range(chunk.first, chunk.first + len(chunk.ids))
        kept += range(len(tokens) - chunk.n_logits, len(tokens))
    spans = [(chunk.slot, chunk.first, len(chunk.ids)) for chunk in chunks[n_single:]]
    cache.plan_pass(positions[:n_single], spans, device)
    return model(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor(kept, device=device),
        kv_cache=cache,
        use_cache=False,
    ).logits[0]


# ------------------------------------------------------------------------------- the loop


@torch.inference_mode()
def decode(
    model, prompts: dict[int, list[int]], max_new_tokens: int, stop_ids: Sequence[int], **options
) -> Iterator[GeneratedSequence]:
    """Continues each numbered prompt (one token or more) and yields the sequences as they end. `options`: the
    other fields of Settings.

    `model` is a base model (not a PeftModel) that `enable_kv_cache` accepted, else ValueError is raised."""
    if model.config._attn_implementation != "kv_cache":
        raise ValueError("decode needs a model that enable_kv_cache has accepted")
    settings = Settings(max_new_tokens, stop_ids, **options)
    waiting = deque(make_sequences(prompts, settings))
    running: list[GeneratedSequence] = []
    n_slots = min(settings.batch_size, len(waiting))
    capacity = max(map(len, prompts.values()), default=0) + max_new_tokens

    # The prefix that all prompts share is computed once, in the last slot, and copied from there
    n_shared = common_prefix_length(list(prompts.values()))
    cache = KVCache(n_slots + bool(n_shared), capacity)
    if n_shared:
        forward(model, cache, [Chunk(n_slots, 0, waiting[0].prompt[:n_shared], 1)])

    while waiting or running:
        # 1. The running sequences go on, with drafts of what they may copy
        chunks = next_chunks(running)
        n_single = 0 if any(chunk.drafted for chunk in chunks) else len(chunks)

        # 2. Admit waiting prompts to free slots
        for sequence in admit(waiting, n_slots - len(running), n_shared):
            if n_shared:
                cache.copy(n_slots, len(running), n_shared)
            chunks.append(Chunk(len(running), n_shared, sequence.prompt[n_shared:], 1))
            running.append(sequence)

        # 3. Run the model, and sample at every position whose logits were kept
        logits = forward(model, cache, chunks, n_single)
        positions = [(s, ahead) for s, chunk in zip(running, chunks) for ahead in range(chunk.n_logits)]
        samples = zip(*sample(logits, positions))

        # 4. Accept tokens as far as the drafts were right
        for sequence, chunk in zip(running, chunks):
            accept(sequence, chunk.drafted, list(islice(samples, chunk.n_logits)))

        # 5. Retire the sequences that have ended
        yield from retire(running, cache)
        if settings.should_stop and settings.should_stop():
            return


def next_chunks(running: Sequence[GeneratedSequence]) -> list[Chunk]:
    """The newest token of each running sequence and its draft, if there is something to copy and few enough
    are running to share a pass. Keys and values of the tokens before are in the cache."""
    share = DRAFT_TOKENS // max(len(running), 1)
    chunks = []
    for slot, sequence in enumerate(running):
        n_left = sequence.settings.max_new_tokens - len(sequence.ids) - 1
        drafted = draft(sequence, min(share, n_left)) if share >= 2 else []
        first = len(sequence.prompt) + len(sequence.ids) - 1
        chunks.append(Chunk(slot, first, [sequence.ids[-1], *drafted], 1 + len(drafted)))
    return chunks


def admit(waiting: deque[GeneratedSequence], n_free: int, n_shared: int) -> list[GeneratedSequence]:
    """Takes the sequences from `waiting` that enter the next pass: as many as slots are free and memory
    allows."""
    entering = []
    n_tokens = 0
    while waiting and len(entering) < n_free and n_tokens < PREFILL_TOKENS:
        entering.append(waiting.popleft())
        n_tokens += len(entering[-1].prompt) - n_shared
    return entering


def accept(sequence: GeneratedSequence, drafted: list[int], samples: list[tuple[int, float]]) -> None:
    """Adds the samples (token, log-probability), one more than there are drafted tokens, up to the first that
    differs from the draft: what the model computed after it followed another token."""
    for expected, (token, log_prob) in zip([*drafted, None], samples):
        sequence.add(token, log_prob)
        if sequence.finish_reason or token != expected:
            return


def retire(running: list[GeneratedSequence], cache: KVCache) -> list[GeneratedSequence]:
    """Removes the sequences that have ended from `running` and returns them. The last running sequence moves
    into the slot of each, so that slot i belongs to running[i]."""
    ended = []
    for slot in reversed(range(len(running))):
        if running[slot].finish_reason:
            ended.append(running[slot])
            if running[slot].finish_reason == "nan":
                # A mask does not hide it from the next sequence in this slot
                for states in chain.from_iterable(cache.layers.values()):
                    states[slot] = 0
            last = running.pop()
            if slot < len(running):
                running[slot] = last
                cache.copy(len(running), slot, len(last.prompt) + len(last.ids) - 1)
    return ended


# ------------------------------------------------------------------------------- memory


def decode_within_memory(
    decoder: Callable,
    prompts: dict[int, list[int]],
    *arguments,
    batch_size: int,
    on_token: Callable[[GeneratedSequence], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options,
) -> Iterator[tuple[int, GeneratedSequence | None]]:
    """Yields (number, sequence) from `decoder`: `decode` or `decode_with_generate` with its model. Out of
    memory, half as many sequences at a time are tried; a prompt that does not even fit alone gives (number,
    None).

    Raises RunError if the model fails for another reason, and what `on_token` raises as it is."""
    of_caller = []

    def tell(sequence: GeneratedSequence) -> None:
        try:
            on_token(sequence)
        except Exception as error:
            of_caller.append(error)
            raise

    options |= {"should_stop": should_stop, "on_token": tell if on_token else None}
    waiting = dict(prompts)
    while waiting and not (should_stop and should_stop()):
        try:
            for sequence in decoder(dict(waiting), *arguments, batch_size=batch_size, **options):
                del waiting[sequence.index]
                yield sequence.index, sequence
        except (MemoryError, RuntimeError, OSError) as error:
            if error in of_caller or not (is_out_of_memory(error) or isinstance(error, RuntimeError)):
                raise
            if not is_out_of_memory(error):
                problem = f"the model failed ({type(error).__name__}: {first_line(error)})"
                raise RunError(problem, "check the device and its driver") from error
            if batch_size > 1 and len(waiting) > 1:
                batch_size = min(batch_size, len(waiting)) // 2
            else:
                # The longest was the first to be tried
                longest = max(waiting, key=lambda number: len(waiting[number]))
                del waiting[longest]
                yield longest, None


# ------------------------------------------------------------------------------- can a model do it?


@torch.inference_mode()
def enable_kv_cache(model) -> tuple[bool, str]:
    """(True, "") if `decode` gives a base model's own logits; its attention is then set to "kv_cache" for
    good, before any thread uses it. Otherwise (False, why not), with the attention as it was. Raises what
    probe_failure raises."""
    before = model.config._attn_implementation
    if before == "kv_cache":
        return True, ""
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        # Llama 4: the chunks are in transformers' mask alone
        return False, "its attention works in chunks of tokens"
    reason = "the probe failed"
    try:
        reason = _probe(model)
    except Exception as error:
        reason = probe_failure(error)
    finally:
        model.config._attn_implementation = before if reason else "kv_cache"
    return not reason, reason


def _probe(model) -> str:
    """How the logits of `forward` differ from a plain forward pass, in words; "" if they do not. Sets the
    model's attention.

    Three prompts enter together and share a prefix, then two tokens are written after each: longer than an
    attention window of up to 512 tokens. Of a longer one it is only checked that the layers hand it over."""
    text = model.config.get_text_config()
    # Of some layers; None if all see all tokens
    window = getattr(text, "sliding_window", None) or None
    longest = 9 + (window if window and window <= 512 else 0)
    prompts = [[5, 2, *((7 * k + 3 * n) % text.vocab_size for k in range(n))] for n in (longest, 7, 4)]
    before = model.config._attn_implementation
    model.config._attn_implementation = "kv_cache"
    cache = KVCache(4, longest + 4)
    forward(model, cache, [Chunk(3, 0, [5, 2], 1)])
    for slot in range(3):
        cache.copy(3, slot, 2)
    found = [forward(model, cache, [Chunk(slot, 2, prompt[2:], 1) for slot, prompt in enumerate(prompts)])]
    for _ in range(2):
        newest = [Chunk(slot, len(prompt), [slot + 11], 1) for slot, prompt in enumerate(prompts)]
        found.append(forward(model, cache, newest, n_single=3))
        for chunk in newest:
            prompts[chunk.slot] += chunk.ids
    model.config._attn_implementation = before
    with reference_attention(model):
        for slot, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt], device=found[0].device)
            expected = model(input_ids=tokens, use_cache=False).logits[0, -3:]
            problem = logits_problem(torch.stack(found)[:, slot], expected, model)
            if problem:
                return problem
    return "" if window in (None, *cache.windows) else f"its window of {window} tokens is in its mask alone"
