"""Both decoders against transformers' generate, one prompt after the other; too little memory."""

import functools
import math
import random
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NOTES, tiny_model
from transformers import AttentionInterface

from sft.cli import RunError
from sft.inference import decoding, endings
from sft.inference.decoding import (
    GeneratedSequence,
    Settings,
    common_prefix_length,
    decode,
    draft,
    enable_kv_cache,
    make_sequences,
    sample,
)
from sft.inference.endings import repeated_from
from sft.inference.generate import decode_apart, decode_with_generate
from sft.model.attention import KVCache, group_by_length, kv_cache_attention
from sft.model.probes import enable_packing, longest_shared

STOPS = list(range(2, 420, 12))  # many, so that some sequences end early and others enter
ARCHITECTURES = ["llama", "llama-wide", "mistral", "qwen2", "gemma", "gemma2", "phi3", "gpt2"]


def alone(
    model, prompt: list[int], max_new_tokens: int, stops: list[int] = STOPS
) -> tuple[list[int], list[float]]:
    """Greedy ids with the end token, or until they are a loop, and their log-probabilities, as transformers
    has them."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    ids = out.sequences[0, len(prompt) :].tolist()
    loops = (n for n in range(1, len(ids)) if repeated_from(ids[:n]) is not None)
    ids = ids[: next(loops, None)]
    return ids, [logits[0].log_softmax(-1)[token].item() for logits, token in zip(out.logits, ids)]


def random_prompts(seed: int, n: int, longest: int = 60) -> dict[int, list[int]]:
    source = random.Random(seed)
    shared = [source.randrange(400) for _ in range(source.randrange(8))]
    own = [[source.randrange(400) for _ in range(source.randrange(1, longest))] for _ in range(n)]
    return {10 * i: shared + ids for i, ids in enumerate(own)}


def kv_cache_model(architecture: str, seed: int = 0):
    model = tiny_model(architecture, seed)
    assert enable_kv_cache(model) == (True, "")
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_one_by_one_generate(architecture):
    for seed in (0, 1):
        prompts = random_prompts(seed, 9)
        reference = tiny_model(architecture, seed)
        expected = {i: alone(reference, prompt, 20) for i, prompt in prompts.items()}
        assert len({len(ids) for ids, _ in expected.values()}) > 1
        model = kv_cache_model(architecture, seed)
        for batch_size in (1, 4, 20):
            written = {s.index: s for s in decode(model, prompts, 20, STOPS, batch_size=batch_size)}
            assert written.keys() == expected.keys()
            for i, (ids, log_probs) in expected.items():
                assert written[i].ids == ids
                assert written[i].log_probs == pytest.approx(log_probs, abs=2e-3)
                assert (written[i].finish_reason == "stop") == (ids[-1] in STOPS)
                assert (written[i].finish_reason == "loop") == (repeated_from(ids) is not None)


def test_models_without_kv_cache_go_through_generate():
    model = tiny_model("bloom")
    prompts = random_prompts(3, 7)
    own_attention = model.config._attn_implementation
    fits, reason = enable_kv_cache(model)
    assert not fits
    assert "logits" in reason
    assert model.config._attn_implementation == own_attention
    with pytest.raises(ValueError, match="enable_kv_cache"):
        next(decode(model, prompts, 15, STOPS))
    expected = {i: alone(model, prompt, 15)[0] for i, prompt in prompts.items()}
    for batch_size in (1, 3):
        written = decode_with_generate(model, prompts, 15, STOPS, batch_size=batch_size)
        assert {sequence.index: sequence.ids for sequence in written} == expected


@pytest.mark.parametrize("write", [decode, decode_with_generate])
def test_what_differs_in_numbers_alone_ends_in_the_same_place_in_any_batch(monkeypatch, write):
    monkeypatch.setattr(endings, "REPEATED_NUMBERED_TOKENS", 1)
    model = kv_cache_model("llama") if write is decode else tiny_model("llama")
    prompts = random_prompts(3, 5, 20)
    numbers = frozenset(range(0, 400, 2))
    longer = {s.index: s.ids for s in write(model, prompts, 24, [1])}

    def stopped(batch_size: int) -> dict:
        sequences = list(write(model, prompts, 24, [1], numbers=numbers, batch_size=batch_size))
        assert any(sequence.finish_reason == "loop" for sequence in sequences)
        return {sequence.index: sequence.ids for sequence in sequences}

    together = stopped(5)
    assert stopped(1) == together
    for index, ids in longer.items():
        ends = (n for n in range(1, len(ids)) if repeated_from(ids[:n], numbers) is not None)
        assert together[index] == ids[: next(ends, None)]


def test_chunked_attention_and_wrong_windows_are_found_out():
    model = tiny_model("llama")
    model.config.attention_chunk_size = 8
    assert enable_kv_cache(model) == (False, "its attention works in chunks of tokens")
    model = tiny_model("mistral")
    model.model.layers[0].self_attn.layer_idx = 1  # two layers in one slot
    fits, reason = enable_kv_cache(model)
    assert not fits
    assert "logits" in reason


def test_long_windows_that_stay_in_the_mask_are_found_out():
    """Beyond what the probe writes, so by what the layers hand to their attention."""

    def without_window(*arguments, **options):
        return kv_cache_attention(*arguments, **(options | {"sliding_window": None}))

    model = tiny_model("mistral")
    model.config.sliding_window = 600
    AttentionInterface.register("kv_cache", without_window)
    try:
        assert enable_kv_cache(model) == (False, "its window of 600 tokens is in its mask alone")
    finally:
        AttentionInterface.register("kv_cache", kv_cache_attention)
    assert enable_kv_cache(model) == (True, "")


def test_a_sequence_is_the_same_beside_one_that_changes_the_position_embeddings():
    model = tiny_model("phi3-longrope")
    prompts = {0: list(range(5, 15)), 1: list(range(5, 105)), 2: list(range(9, 30))}
    expected = {i: alone(tiny_model("phi3-longrope"), ids, 12)[0] for i, ids in prompts.items()}
    assert enable_kv_cache(model) == (True, "")
    together = decode_apart(decode, longest_shared(model, 1024), model, prompts, 12, STOPS, batch_size=4)
    assert {sequence.index: sequence.ids for sequence in together} == expected


def test_a_mistake_of_our_own_is_no_reason_for_the_slow_way(monkeypatch):
    model = tiny_model("llama")
    own_attention = model.config._attn_implementation
    monkeypatch.setattr(KVCache, "plan_pass", None)  # as a misspelled name would be
    with pytest.raises(TypeError, match="not callable"):
        enable_kv_cache(model)
    assert model.config._attn_implementation == own_attention


def test_a_model_set_for_packed_rows_can_be_probed():
    model = tiny_model("llama")
    assert enable_packing(model, 512)
    assert enable_kv_cache(model) == (True, "")


@pytest.mark.parametrize("write", [decode, decode_with_generate])
def test_should_stop_is_asked_after_each_pass(write):
    """Sequences that have ended by then are yielded, those still running are not."""
    prompts = random_prompts(5, 8)
    model = kv_cache_model("llama") if write is decode else tiny_model("llama")
    complete = {s.index: s.ids for s in write(model, prompts, 30, STOPS)}
    for n_passes in (1, 4, 12):
        answers = iter([False] * (n_passes - 1) + [True] * 2)
        sequences = write(model, prompts, 30, STOPS, should_stop=functools.partial(next, answers))
        written = {sequence.index: sequence.ids for sequence in sequences}
        assert len(written) < len(prompts)
        assert all(complete[i] == ids for i, ids in written.items())
    assert written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_copied_passages_take_fewer_passes_and_change_nothing(monkeypatch, architecture, temperature):
    """A random model writes in circles sooner or later, which drafts foresee; what they foresee beyond the
    end of a loop is dropped."""
    reference = tiny_model(architecture)
    model = kv_cache_model(architecture)
    prompts = {i: prompt * 2 for i, prompt in random_prompts(4, 3).items()}

    def written(n_drafted: int) -> tuple[dict, int]:
        passes = []
        monkeypatch.setattr(decoding, "DRAFT_TOKENS", n_drafted)
        sequences = decode(
            model,
            prompts,
            60,
            [1],
            temperature=temperature,
            seed=1,
            should_stop=lambda: passes.append(1),  # None: never stops
        )
        return {s.index: s for s in sequences}, len(passes)

    plain, n_plain = written(0)
    drafted, n_drafted = written(12)
    for i, prompt in prompts.items():
        assert drafted[i].ids == plain[i].ids
        assert drafted[i].log_probs == pytest.approx(plain[i].log_probs, abs=2e-3)
        if temperature == 0:
            assert drafted[i].ids == alone(reference, prompt, 60, [1])[0]
    assert n_drafted <= n_plain
    if architecture == "llama" and temperature == 0:
        assert n_drafted < n_plain


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 4))
def test_draft_is_what_followed_before(text, n):
    found = draft(GeneratedSequence(0, text[:1], Settings(9, STOPS), text[1:]), n)
    for length in (2, 1):
        ends = [end for end in range(length, len(text)) if text[end - length : end] == text[-length:]]
        if len(text) >= length and ends:
            assert found == text[ends[-1] : ends[-1] + (n if length == 2 else min(n, 3))]
            return
    assert found == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=7), st.integers(0, 60))
def test_runs_of_similar_length_are_the_cheapest(lengths, per_call):
    runs = group_by_length(lengths, per_call)
    assert [slot for first, last, _ in runs for slot in range(first, last)] == list(range(len(lengths)))
    assert all(longest == max(lengths[first:last]) for first, last, longest in runs)
    splits = (
        [*cuts, len(lengths)] for n in range(len(lengths)) for cuts in combinations(range(1, len(lengths)), n)
    )
    costs = [
        sum(max(lengths[a:b]) * (b - a) + per_call for a, b in zip([0, *split], split)) for split in splits
    ]
    assert sum(longest * (last - first) + per_call for first, last, longest in runs) == min(costs, default=0)
    assert len(group_by_length(lengths, math.inf)) == bool(lengths)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_common_prefix_length(prompts):
    expected = 0
    if len(prompts) > 1:
        while all(len(p) > expected + 1 and p[expected] == prompts[0][expected] for p in prompts):
            expected += 1
    assert common_prefix_length(prompts) == expected


@functools.cache
def llamas() -> tuple:
    """The same model with its own attention and with the KV cache."""
    return tiny_model("llama"), kv_cache_model("llama")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(1, 7),
)
def test_any_prompts_in_any_grouping(prompts, batch_size):
    reference, model = llamas()
    numbered = dict(enumerate(prompts))
    expected = {i: alone(reference, prompt, 6)[0] for i, prompt in numbered.items()}
    assert {s.index: s.ids for s in decode(model, numbered, 6, STOPS, batch_size=batch_size)} == expected


@pytest.mark.parametrize("write", [decode, decode_with_generate])
def test_samples_depend_on_seed_and_number_alone(write):
    model = kv_cache_model("llama") if write is decode else tiny_model("llama")
    prompts = random_prompts(5, 8)

    def sampled(seed, batch_size, chosen=prompts):
        return {
            s.index: s.ids
            for s in write(model, chosen, 12, STOPS, temperature=1.3, seed=seed, batch_size=batch_size)
        }

    together = sampled(1, 8)
    assert sampled(1, 3) == together
    assert sampled(1, 1) == together
    assert sampled(2, 8) != together
    assert sampled(1, 2, {30: prompts[30]}) == {30: together[30]}


def test_samples_outlast_rounding():
    """Logits of another batch size differ by rounding, which must not change what is sampled."""
    torch.manual_seed(0)
    logits = torch.randn(400, 30_000) * 3
    sequences = make_sequences({i: [1] for i in range(400)}, Settings(9, STOPS, temperature=1.0))
    positions = [(sequence, 0) for sequence in sequences]
    tokens = sample(logits, positions)[0]
    assert len(set(tokens)) > 50
    rounded = sample(logits + torch.randn_like(logits) * 1e-5, positions)[0]
    assert sum(a != b for a, b in zip(tokens, rounded)) <= 1


def test_samples_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0, -torch.inf, 2.0]]).repeat(4000, 1)
    for temperature in (0.5, 1.0, 2.0):
        sequences = make_sequences({i: [1] for i in range(4000)}, Settings(9, STOPS, temperature))
        tokens, log_probs = sample(logits, [(s, 0) for s in sequences])
        share = torch.bincount(torch.tensor(tokens), minlength=5) / 4000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.03)
        assert log_probs == pytest.approx(logits[0].log_softmax(-1)[torch.tensor(tokens)].tolist(), abs=1e-5)


# ------------------------------------------------------------------------------- memory


def test_one_note_without_memory_does_not_fail_the_others(specialist, monkeypatch):
    notes = [note for note, _ in NOTES[:6]]
    expected = specialist.generate_batch(notes, 5)
    decode = specialist.decoder
    longest = max(range(6), key=lambda i: len(specialist.prompt_ids(notes[i], 5)[0]))

    def forgetful(model, prompts, *arguments, batch_size, **options):
        if longest in prompts or batch_size > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        yield from decode(model, prompts, *arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(specialist, "decoder", forgetful)
    results = specialist.generate_batch(notes, 5)
    assert results[longest]["error"] == "out of memory on this note"
    del results[longest]
    del expected[longest]
    assert results == expected


def test_a_dead_gpu_stops_the_run(specialist, monkeypatch):
    def dead(*arguments, **options):
        raise torch.AcceleratorError(
            "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
        )
        yield

    monkeypatch.setattr(specialist, "decoder", dead)
    with pytest.raises(
        RunError, match=r"the model failed \(AcceleratorError: CUDA error: device-side assert triggered\)"
    ):
        specialist.generate_batch([note for note, _ in NOTES], 5)
