"""sft/model/attention.py: packed rows and the KV cache against the model's own attention, and the probes."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lora import gradients_of, tiny_examples, with_lora
from tiny import tiny_model
from transformers import AttentionInterface

import sft.model.attention as attention_module
from sft.data.dataset import packed_batch, padded_batch
from sft.model.attention import KVCache, causal_mask, group_by_length, per_example_attention
from sft.model.probes import (
    enable_packing,
    is_untrained,
    logits_problem,
    longest_shared,
    probe_failure,
    reference_attention,
)
from stage_a_sft_training import summed_loss

PACKING = ["llama", "mistral", "qwen2", "gemma", "phi3", "gpt2"]
PADDING = ["gemma2", "bloom"]  # soft-capped scores; attention that transformers cannot replace
KV_CACHE = [*PACKING, "llama-wide", "gemma2"]


def test_causal_mask():
    """Queries at positions 0 and 3, five keys."""
    positions = torch.tensor([0, 3])
    assert causal_mask(positions, 5, None).int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert causal_mask(positions, 5, 2).int().tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert causal_mask(positions[:, None], 5, 2).shape == (2, 1, 5)


# ------------------------------------------------------------------------------- packed rows


@pytest.mark.parametrize("architecture", PACKING + PADDING)
@pytest.mark.parametrize("seed, size", [(0, 1), (1, 3), (2, 11)])
def test_loss_and_gradients_equal_cross_entropy_one_by_one(architecture, seed, size):
    """Packed and padded alike, against F.cross_entropy over each example alone."""
    model = with_lora(tiny_model(architecture, seed), seed)
    examples = tiny_examples()[:size]
    reference = 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        targets = torch.tensor(example.input_ids[example.n_prompt :])
        reference = reference + F.cross_entropy(logits[example.n_prompt - 1 : -1], targets, reduction="sum")
    reference.backward()
    expected = gradients_of(model)

    packs, _ = enable_packing(model, 512)
    assert packs is (architecture in PACKING)
    # A packed model takes only packed rows; the padded path is checked on a second copy
    copy = with_lora(tiny_model(architecture, seed), seed)
    cases = [(copy, padded_batch(examples, 0))]
    if packs:
        cases.append((model, packed_batch(examples)))
    for trained, batch in cases:
        trained.zero_grad()
        loss = summed_loss(trained, batch)
        loss.backward()
        assert loss.item() == pytest.approx(reference.item(), rel=2e-5)
        for name, gradient in gradients_of(trained).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("architecture", PACKING)
def test_no_example_sees_another(architecture):
    """Changing one example of a packed row leaves the logits of the others as they were, to the bit."""
    model = tiny_model(architecture)
    assert enable_packing(model, 512) == (True, "")
    first, second, third = tiny_examples()[:3]
    changed_ids = [(token + 1) % 400 for token in second.input_ids]
    changed = type(second)(second.row_id, changed_ids, second.n_prompt)
    before = model(**packed_batch([first, second, third]).inputs).logits[0]
    after = model(**packed_batch([first, changed, third]).inputs).logits[0]
    start = first.n_target_tokens
    end = start + second.n_target_tokens
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.allclose(before[start:end], after[start:end])


@pytest.mark.parametrize("lengths", [[1], [5, 1, 40], [33, 90, 2, 17]])
@pytest.mark.parametrize(
    "heads, kv_heads, window, dtype",
    [(4, 4, None, "float32"), (6, 2, None, "float32"), (4, 2, 8, "float32"), (4, 1, 8, "bfloat16")],
)
def test_attention_in_a_packed_row_is_that_of_a_dense_mask(lengths, heads, kv_heads, window, dtype):
    """Value and gradient."""
    torch.manual_seed(len(lengths))
    dtype = getattr(torch, dtype)
    states = [
        torch.randn(1, n, sum(lengths), 16).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(example))[:, None] - torch.arange(len(example))
    seen = (example[:, None] == example) & (distance >= 0) & (distance < (window or len(example)))
    double = [state.double() for state in states]
    expected = F.scaled_dot_product_attention(*double, attn_mask=seen, scale=0.3, enable_gqa=True)
    expected = expected.transpose(1, 2)
    options = {"example_lengths": lengths, "scaling": 0.3, "sliding_window": window}
    ours, _ = per_example_attention(None, *states, None, **options)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, **close)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    our_gradients = torch.autograd.grad(ours, states, direction.to(dtype))
    gradients = torch.autograd.grad(expected, states, direction)
    for mine, theirs in zip(our_gradients, gradients):
        torch.testing.assert_close(mine, theirs, **close)


# ------------------------------------------------------------------------------- the KV cache


@pytest.fixture(params=KV_CACHE)
def two_models(request):
    """The same model with its own attention, and with kv_cache set."""
    model = tiny_model(request.param)
    own = tiny_model(request.param)
    model.set_attn_implementation("kv_cache")
    return model, own


@pytest.mark.parametrize("padding", [None, "left", "right"])
@torch.no_grad()
def test_a_plain_pass_is_the_models_own(two_models, padding):
    model, own = two_models
    ids = torch.arange(120).view(3, 40) * 7 % 400
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :11] = 0
    elif padding == "right":
        mask[1, 30:] = 0
    options = {} if padding is None else {"attention_mask": mask}
    found = model(ids, **options).logits[mask.bool()]
    expected = own(ids, **options).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generate_writes_what_the_model_writes(two_models, cache_implementation):
    """Padded on the left, beyond the attention window, with keys of earlier passes; and one prompt alone."""
    model, own = two_models
    ids = torch.arange(80).view(2, 40) * 7 % 400
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    options = {
        "max_new_tokens": 30,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache_implementation,
    }
    padded = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(padded, own.generate(ids, attention_mask=mask, **options))
    alone = model.generate(ids[1:], attention_mask=mask[1:], **options)
    assert torch.equal(alone, own.generate(ids[1:], attention_mask=mask[1:], **options))


@torch.no_grad()
def test_a_4d_mask_is_followed(two_models):
    model, own = two_models
    ids = torch.arange(12)[None]
    mask = torch.zeros(1, 1, 12, 12).masked_fill_(~torch.ones(12, 12).tril(2).bool(), torch.finfo().min)
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, own(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_token_of_a_row_sees_its_own_sequence(two_models):
    """Two sequences enter, then two tokens follow and a third sequence enters in two chunks."""
    model, own = two_models
    prompts = [[(7 * i + 3 * n) % 400 for i in range(n)] for n in (31, 9, 40)]
    cache = KVCache(3, 48)

    def run(tokens: list[int], positions: list[int], chunks) -> torch.Tensor:
        """`positions` of the running sequences' newest tokens."""
        cache.plan_pass(positions, chunks, torch.device("cpu"))
        all_positions = [*positions]
        for _, first, n in chunks:
            all_positions += range(first, first + n)
        return model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([all_positions]),
            kv_cache=cache,
            use_cache=False,
        ).logits[0]

    first = run(prompts[0] + prompts[1], [], [(0, 0, 31), (1, 0, 9)])
    second = run([5, 6, *prompts[2][:25]], [31, 9], [(2, 0, 25)])
    third = run([7, 8, *prompts[2][25:]], [32, 10], [(2, 25, 15)])
    found = [
        torch.stack([first[30], second[0], third[0]]),
        torch.stack([first[39], second[1], third[1]]),
        torch.stack([second[-1], third[-1]]),
    ]
    expected = [
        own(torch.tensor([prompts[0] + [5, 7]])).logits[0, 30:],
        own(torch.tensor([prompts[1] + [6, 8]])).logits[0, 8:],
        own(torch.tensor([prompts[2]])).logits[0, [24, 39]],
    ]
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_packed_rows_without_a_kv_cache_are_refused():
    """Not computed as if they were one sequence."""
    model = tiny_model()
    model.set_attn_implementation("kv_cache")
    with pytest.raises(ValueError, match="packed rows only with a KVCache"):
        model(input_ids=torch.arange(5)[None], position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=False)


# ------------------------------------------------------------------------------- probes


@pytest.mark.parametrize(
    "architecture, reason", [("gemma2", "does not compute softcap"), ("bloom", "cannot replace")]
)
def test_a_model_that_cannot_take_packed_rows_gives_a_reason_and_is_left_as_it_was(architecture, reason):
    model = tiny_model(architecture).train()
    before = model.config._attn_implementation
    packs, found = enable_packing(model, 512)
    assert not packs
    assert reason in found
    assert "\n" not in found
    assert model.config._attn_implementation == before
    assert model.training


def test_wrong_windows_are_found():
    """Here, an attention that drops them."""

    def without_window(*arguments, **options):
        return per_example_attention(*arguments, **(options | {"sliding_window": None}))

    AttentionInterface.register("per_example", without_window)
    try:
        packs, reason = enable_packing(tiny_model("mistral"), 512)
    finally:
        AttentionInterface.register("per_example", per_example_attention)
    assert not packs
    assert "logits differ" in reason


def test_what_an_attention_refuses_in_training_alone_is_found():
    def without_dropout(module, *arguments, **options):
        if module.training:
            raise ValueError("no dropout here")
        return per_example_attention(module, *arguments, **options)

    AttentionInterface.register("per_example", without_dropout)
    try:
        assert enable_packing(tiny_model(), 512) == (False, "per_example: ValueError: no dropout here")
    finally:
        AttentionInterface.register("per_example", per_example_attention)


def test_sequences_beyond_a_change_of_position_embeddings_have_passes_of_their_own():
    """Beside a longer note, "longrope" gives a short one other position embeddings."""
    model = tiny_model("phi3-longrope")
    assert longest_shared(model, 1024) == 64
    assert longest_shared(model, 64) == longest_shared(tiny_model(), 1024) == math.inf
    assert enable_packing(model, 1024) == (True, "")
    assert longest_shared(model, 1024) == 64
    assert model.config._attn_implementation == "per_example"


def test_tokens_that_nobody_trained():
    model = tiny_model()
    assert not is_untrained(model, 7)
    with torch.no_grad():
        model.lm_head.weight[[7, 300]] = model.lm_head.weight[9].clone()
        model.lm_head.weight[11] = 0
    assert all(is_untrained(model, token) for token in (7, 9, 11, 300))
    assert not is_untrained(model, 8)


def test_a_mistake_of_ours_is_an_error(monkeypatch):
    """Not a silent slower path: here, a name in our attention that torch does not have."""
    model = tiny_model()
    before = model.config._attn_implementation
    monkeypatch.setattr(attention_module, "F", SimpleNamespace())
    with pytest.raises(AttributeError, match="scaled_dot_product_attention"):
        enable_packing(model, 512)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_probes_in_either_order(architecture):
    """The reference pass has an attention of transformers' own, whatever the model is set up for."""
    ids = torch.arange(12)[None]
    expected = tiny_model(architecture)(ids).logits
    for attention in ("kv_cache", "per_example"):
        model = tiny_model(architecture)
        model.set_attn_implementation(attention)
        with reference_attention(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert model.config._attn_implementation == attention
    model.set_attn_implementation("kv_cache")
    packs, _ = enable_packing(model, 512)
    assert packs is (architecture in PACKING)
    assert model.config._attn_implementation == ("per_example" if packs else "kv_cache")
    assert enable_packing(model, 512)[0] is packs


def raised(work) -> Exception:
    with pytest.raises(Exception) as error:
        work()
    return error.value


def test_what_a_probe_meets():
    in_torch = raised(lambda: torch.ones(2) @ torch.ones(3))
    assert probe_failure(in_torch).startswith("RuntimeError: ")
    elsewhere = raised(lambda: tiny_model()(no_such_argument=1))
    assert probe_failure(elsewhere)
    for memory in (
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate"),
        torch.OutOfMemoryError(),
    ):
        with pytest.raises(type(memory)):
            probe_failure(memory)
    ours = raised(lambda: group_by_length([1, 2], "three"))
    with pytest.raises(TypeError):
        probe_failure(ours)


def test_logits_are_compared_to_within_rounding():
    model = tiny_model()
    expected = torch.tensor([[1.0, -10.0]])
    assert logits_problem(expected + 0.009, expected, model) == ""
    assert "differ by 0.02" in logits_problem(expected + 0.02, expected, model)
    assert "differ by nan" in logits_problem(expected * torch.nan, expected, model)
    assert "shape (2,), not (1, 2)" in logits_problem(expected[0], expected, model)
    assert logits_problem(expected * 0, expected * 0, model) == ""
    for rounded in (tiny_model().bfloat16(), tiny_model()):
        rounded.is_quantized = True
        assert logits_problem(expected + 0.4, expected, rounded) == ""
        assert logits_problem(expected + 0.6, expected, rounded)
