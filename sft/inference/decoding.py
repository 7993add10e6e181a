"""The decoding loop: token ids of many prompts in, token ids of their continuations out. Knows no note and no
file.

`decode` is continuous batching (Yu et al., Orca, OSDI 2022) over a KV cache with one slot per sequence: keys
and values are written once and never concatenated, and a sequence that ends frees its slot for the next
prompt. The prefix that all prompts share is computed once. When few sequences are running, each forward pass
also verifies drafts copied from their prompts. `enable_kv_cache` finds out whether a model can work this way;
sft/inference/generate.py is for the rest."""

import functools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import torch

from sft.cli import RunError, is_out_of_memory
from sft.inference.endings import repeated_from
from sft.model.attention import KVCache, attention_window
from sft.model.probes import logits_problem, probe_failure, reference_attention
from sft.options import DEFAULT_GENERATION_BATCH_SIZE

# Prompts enter a forward pass until they have this many tokens: more would only take more memory
PREFILL_TOKENS = 1024

# Drafted in one pass, shared among the running sequences if each gets two or more
DRAFT_TOKENS = 8

# Below this temperature sampling would give the likeliest token anyway, and the division could overflow
GREEDY_BELOW = 0.01


# ------------------------------------------------------------------------------- sequences


@dataclass
class GeneratedSequence:
    """One sequence: its prompt's number and what has been generated so far."""

    index: int
    prompt: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)  # with the end token, once it has come
    log_probs: list[float] = field(default_factory=list)  # of each token, at temperature 1
    numbers: Set[int] = frozenset()  # the tokens that are digits
    n_kept: int | None = None  # of a loop's ids: those before it is repeated
    # "stop", "loop", "length", "nan" (the model computed it), or "" while it is running
    finish_reason: str = ""

    @property
    def n_cached(self) -> int:
        """Tokens whose keys and values are in the KV cache: all but the newest, once a token has been
        generated."""
        return len(self.prompt) + len(self.ids) - 1

    def gumbel_noise(self, ahead: int, n: int) -> torch.Tensor:
        """Gumbel noise (n,) to sample the token after the next `ahead` ones with. It depends on seed, prompt
        number and position alone, so that neither batch size nor order changes a sample."""
        seed = random.Random(f"{self.seed} {self.index} {len(self.ids) + ahead}").getrandbits(63)
        exponential = torch.empty(n).exponential_(generator=torch.Generator().manual_seed(seed))
        return -exponential.clamp_(min=1e-30).log_()

    def add(self, token: int, log_prob: float, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        if not math.isfinite(log_prob):
            self.finish_reason = "nan"
            return
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if token in stop_ids:
            self.finish_reason = "stop"
        elif (n_kept := repeated_from(self.ids, self.numbers)) is not None:
            self.finish_reason = "loop"
            self.n_kept = n_kept
        elif len(self.ids) == max_new_tokens:
            self.finish_reason = "length"


def make_sequences(
    prompts: dict[int, list[int]], seed: int, numbers: Set[int] = frozenset()
) -> list[GeneratedSequence]:
    """A sequence for each numbered prompt, the longest first, so that too little memory shows at the
    start."""
    sequences = [GeneratedSequence(i, prompt, seed, numbers=numbers) for i, prompt in prompts.items()]
    return sorted(sequences, key=lambda sequence: -len(sequence.prompt))


def sample(
    logits: torch.Tensor, temperature: float, positions: Sequence[tuple[GeneratedSequence, int]]
) -> tuple[list[int], list[float]]:
    """A token for each position (sequence, tokens ahead) and its log-probability at temperature 1.

    `logits` is (positions, vocabulary). The largest sum of a logit and Gumbel noise samples from the
    softmax, which rounding rarely changes."""
    logits = logits.float()
    scores = logits
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
    """Several tokens of one sequence in a forward pass: a prompt that enters, or the newest token and its
    draft."""

    slot: int
    first: int  # position of the first token
    ids: list[int]
    n_logits: int  # logits wanted: after the last so many tokens


def forward(
    model, cache: KVCache, running: Sequence[GeneratedSequence], chunks: Sequence[Chunk]
) -> torch.Tensor:
    """One pass over one row of tokens without padding:

        | newest token of each running sequence | first chunk | second chunk | ...
          slot 0, slot 1, ..., slot running - 1   chunk.slot    chunk.slot

    Returns logits (n, vocabulary) in the order of the row: one after each running sequence's token,
    `n_logits` in each chunk."""
    device = model.get_input_embeddings().weight.device
    tokens = [sequence.ids[-1] for sequence in running]
    positions = [sequence.n_cached for sequence in running]
    cache.plan_pass(positions, [(chunk.slot, chunk.first, len(chunk.ids)) for chunk in chunks], device)
    kept = list(range(len(running)))
    row_positions = list(positions)
    for chunk in chunks:
        tokens += chunk.ids
        row_positions += range(chunk.first, chunk.first + len(chunk.ids))
        kept += range(len(tokens) - chunk.n_logits, len(tokens))
    return model(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([row_positions], device=device),
        logits_to_keep=torch.tensor(kept, device=device),
        kv_cache=cache,
        use_cache=False,
    ).logits[0]


# ------------------------------------------------------------------------------- the loop


@torch.inference_mode()
def decode(
    model,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    temperature: float = 0.0,
    batch_size: int = DEFAULT_GENERATION_BATCH_SIZE,
    seed: int = 0,
    numbers: Set[int] = frozenset(),
    on_token: Callable[[GeneratedSequence], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[GeneratedSequence]:
    """Continues each numbered prompt (one token or more) and yields the sequences as they end, at most
    `batch_size` of them running at a time. `numbers`: the tokens that are digits. `on_token` is called after
    each token; once `should_stop`, asked after each forward pass, is true, the generator ends without the
    sequences that are still running.

    `model` is a base model (not a PeftModel) that `enable_kv_cache` accepted, else ValueError is raised."""
    if model.config._attn_implementation != "kv_cache":
        raise ValueError("decode needs a model that enable_kv_cache has accepted")
    waiting = deque(make_sequences(prompts, seed, numbers))
    running: list[GeneratedSequence] = []
    n_slots = min(batch_size, len(waiting))
    capacity = max(map(len, prompts.values()), default=0) + max_new_tokens

    # The prefix that all prompts share is computed once, in the last slot, and copied from there
    n_shared = common_prefix_length(list(prompts.values()))
    cache = KVCache(n_slots + bool(n_shared), capacity)
    if n_shared:
        forward(model, cache, [], [Chunk(n_slots, 0, waiting[0].prompt[:n_shared], 1)])

    while waiting or running:
        # 1. Draft what the running sequences may go on to copy
        drafts = draft_all(running, max_new_tokens)

        # 2. Admit waiting prompts to free slots
        entering = admit(waiting, n_slots - len(running), n_shared)

        # 3. Run the model, and sample at every position whose logits were kept
        logits = run_pass(model, cache, running, drafts, entering, n_shared)
        running += entering
        drafts += [[] for _ in entering]
        positions = [(s, ahead) for s, drafted in zip(running, drafts) for ahead in range(len(drafted) + 1)]
        samples = zip(*sample(logits, temperature, positions))

        # 4. Accept tokens as far as the drafts were right
        for sequence, drafted in zip(running, drafts):
            own_samples = list(islice(samples, len(drafted) + 1))
            for token, log_prob in accepted(drafted, own_samples):
                sequence.add(token, log_prob, stop_ids, max_new_tokens)
                if on_token:
                    on_token(sequence)
                if sequence.finish_reason:
                    break

        # 5. Retire the sequences that have ended
        yield from retire(running, cache)
        if should_stop and should_stop():
            return


def draft_all(running: Sequence[GeneratedSequence], max_new_tokens: int) -> list[list[int]]:
    """A draft for each running sequence, empty if there is nothing to copy or too many are running to share a
    pass."""
    share = DRAFT_TOKENS // max(len(running), 1)
    if share < 2:
        return [[] for _ in running]
    return [draft(sequence, min(share, max_new_tokens - len(sequence.ids) - 1)) for sequence in running]


def admit(waiting: deque[GeneratedSequence], n_free: int, n_shared: int) -> list[GeneratedSequence]:
    """Takes the sequences from `waiting` that enter the next pass: as many as slots are free and memory
    allows."""
    entering = []
    n_tokens = 0
    while waiting and len(entering) < n_free and n_tokens < PREFILL_TOKENS:
        entering.append(waiting.popleft())
        n_tokens += len(entering[-1].prompt) - n_shared
    return entering


def run_pass(
    model,
    cache: KVCache,
    running: list[GeneratedSequence],
    drafts: list[list[int]],
    entering: list[GeneratedSequence],
    n_shared: int,
) -> torch.Tensor:
    """Logits after each running sequence's newest token and after each token of its draft, then after each
    prompt that enters. With drafts, all running sequences enter the pass as chunks."""
    newest = running
    chunks = []
    if any(drafts):
        newest = []
        for slot, (sequence, drafted) in enumerate(zip(running, drafts)):
            chunks.append(Chunk(slot, sequence.n_cached, [sequence.ids[-1], *drafted], len(drafted) + 1))
    for slot, sequence in enumerate(entering, len(running)):
        if n_shared:
            cache.copy(cache.n_slots - 1, slot, n_shared)
        chunks.append(Chunk(slot, n_shared, sequence.prompt[n_shared:], 1))
    return forward(model, cache, newest, chunks)


def accepted(drafted: list[int], samples: list[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """The samples up to the first that differs from the draft: what the model computed after it followed
    another token.

    `samples` are (token, log-probability), one more than there are drafted tokens."""
    for expected, (token, log_prob) in zip([*drafted, None], samples):
        yield token, log_prob
        if token != expected:
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
                cache.copy(len(running), slot, last.n_cached)
    return ended


# ------------------------------------------------------------------------------- memory


def decode_within_memory(
    decoder: Callable,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    batch_size: int,
    on_token: Callable[[GeneratedSequence], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options,
) -> Iterator[tuple[int, GeneratedSequence | None]]:
    """Yields (number, sequence) from `decoder`: `decode` or `decode_with_generate` with its model. Out of
    memory, half as many sequences at a time are tried; a prompt that does not even fit alone gives (number,
    None).

    Raises RunError if the model fails for another reason, and what `on_token` raises as it is.
    """
    waiting = dict(prompts)
    options["should_stop"] = should_stop
    if on_token:
        options["on_token"] = functools.partial(_call, on_token)
    while waiting and not (should_stop and should_stop()):
        try:
            for sequence in decoder(
                dict(waiting), max_new_tokens, stop_ids, batch_size=batch_size, **options
            ):
                del waiting[sequence.index]
                yield sequence.index, sequence
        except _OfCaller as error:
            raise error.__cause__ from None
        except (MemoryError, RuntimeError, OSError) as error:
            _raise_unless_out_of_memory(error)
            if batch_size > 1 and len(waiting) > 1:
                batch_size = min(batch_size, len(waiting)) // 2
            else:
                # The longest was the first to be tried
                longest = max(waiting, key=lambda number: len(waiting[number]))
                del waiting[longest]
                yield longest, None


class _OfCaller(Exception):
    """Holds an exception that is not the model's, as its cause."""


def _call(on_token: Callable[[GeneratedSequence], None], sequence: GeneratedSequence) -> None:
    try:
        on_token(sequence)
    except Exception as error:
        raise _OfCaller from error


def _raise_unless_out_of_memory(error: Exception) -> None:
    """Raises a RuntimeError as RunError, with the first line of its message, and any other error as it is."""
    if is_out_of_memory(error):
        return
    if not isinstance(error, RuntimeError):
        raise error
    reason = str(error).partition("\n")[0]
    problem = f"the model failed ({type(error).__name__}: {reason})"
    raise RunError(problem, "check the device and its driver") from error


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
    device = model.get_input_embeddings().weight.device
    sequences = _probe_sequences(model.config.get_text_config())
    before = model.config._attn_implementation
    model.config._attn_implementation = "kv_cache"
    cache = KVCache(len(sequences) + 1, len(sequences[0].prompt) + 2)
    found = _probe_logits(model, sequences, cache)
    model.config._attn_implementation = before
    with reference_attention(model):
        for sequence in sequences:
            tokens = torch.tensor([sequence.prompt + sequence.ids], device=device)
            expected = model(input_ids=tokens, use_cache=False).logits[0, -3:]
            problem = logits_problem(found[:, sequence.index], expected, model)
            if problem:
                return problem
    window = attention_window(model.config.get_text_config())
    return "" if window in (None, *cache.windows) else f"its window of {window} tokens is in its mask alone"


def _probe_sequences(text_config) -> list[GeneratedSequence]:
    window = attention_window(text_config) or 0
    longest = (window if window <= 512 else 0) + 9
    shared = [5, 2]
    prompts = {
        i: shared + [(7 * k + 3 * n) % text_config.vocab_size for k in range(n)]
        for i, n in enumerate((longest, 7, 4))
    }
    return make_sequences(prompts, seed=0)


def _probe_logits(model, sequences: list[GeneratedSequence], cache: KVCache) -> torch.Tensor:
    """Logits (3, sequences, vocabulary) after each prompt and after each of two tokens that are then written
    to it."""
    shared = sequences[0].prompt[:2]
    forward(model, cache, [], [Chunk(len(sequences), 0, shared, 1)])
    for slot in range(len(sequences)):
        cache.copy(len(sequences), slot, len(shared))
    prompts = [Chunk(slot, 2, sequence.prompt[2:], 1) for slot, sequence in enumerate(sequences)]
    logits = [forward(model, cache, [], prompts)]
    for _ in range(2):
        for sequence in sequences:
            sequence.ids.append((sequence.index + 11) % model.config.get_text_config().vocab_size)
        logits.append(forward(model, cache, sequences, []))
    return torch.stack(logits)
