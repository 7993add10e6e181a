"""sft/model/kernels.py: each operation against PyTorch's own, value and gradient, at several sizes and
seeds."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lora import gradients_of, with_lora
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny import tiny_model
from torch import nn

from sft.model import kernels
from sft.model.adapter import set_gradient_checkpointing
from sft.model.kernels import (
    FrozenLinear,
    FrozenLoraLinear,
    Int8Linear,
    PackedLinear,
    SummedCrossEntropy,
    dropout_mask,
    has_int8,
    has_onednn,
    replace_linear_layers,
    use_frozen_kernels,
)


@pytest.mark.parametrize(
    "n, vocabulary, seed", [(1, 2, 0), (7, 50, 1), (128, 300, 2), (129, 1000, 3), (400, 49, 4)]
)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_summed_cross_entropy(n, vocabulary, seed, scale):
    torch.manual_seed(seed)
    hidden = torch.randn(n, 16, requires_grad=True)
    head = torch.randn(vocabulary, 16) * scale
    targets = torch.randint(vocabulary, (n,))
    weight = torch.rand(())
    expected = F.cross_entropy((hidden.double() @ head.double().T), targets, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected * weight, hidden)
    ours = SummedCrossEntropy.apply(hidden @ head.T, targets)
    (grad,) = torch.autograd.grad(ours * weight, hidden)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=1e-4)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=2e-5 * scale)


def test_summed_cross_entropy_of_16_bit_logits_is_that_of_their_float32_values():
    torch.manual_seed(0)
    logits = (torch.randn(200, 500) * 5).bfloat16().requires_grad_()
    targets = torch.randint(500, (200,))
    (expected_grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), targets, reduction="sum"), logits)
    expected = F.cross_entropy(logits.float(), targets, reduction="sum").item()
    ours = SummedCrossEntropy.apply(logits * 1, targets)
    (grad,) = torch.autograd.grad(ours, logits)
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grad, expected_grad)


def test_a_loss_that_is_not_finite_stays_so():
    logits = torch.zeros(3, 5).index_fill_(0, torch.tensor([1]), torch.nan)
    assert SummedCrossEntropy.apply(logits, torch.tensor([0, 1, 2])).isnan()


@pytest.mark.parametrize("p, shape", [(0.05, (300, 577)), (0.5, (100, 1001)), (0.9, (1, 100_003))])
def test_what_dropout_keeps(p, shape):
    torch.manual_seed(3)
    kept, share = dropout_mask(shape, p)
    dropped = ~kept.flatten()
    n = dropped.numel()
    assert kept.shape == shape
    assert abs(share - (1 - p)) < 2**-16
    assert abs(dropped.float().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
    # Neighbors are drawn independently
    both_dropped = (dropped[1:] & dropped[:-1]).float().mean().item()
    assert abs(both_dropped - p * p) < 6 * (p * p / n) ** 0.5 + 1e-4
    torch.manual_seed(3)
    assert torch.equal(dropout_mask(shape, p)[0], kept)  # the seed decides
    assert not torch.equal(dropout_mask(shape, p)[0], kept)


needs_onednn = pytest.mark.skipif(not has_onednn(), reason="no oneDNN here")


@needs_onednn
@pytest.mark.parametrize(
    "shape, n_out, bias",
    [((1, 1), 1, False), ((1, 7, 33), 20, True), ((300, 64), 129, True), ((2, 5, 96), 48, False)],
)
@pytest.mark.parametrize("is_amd", [False, True])
def test_frozen_linear(shape, n_out, bias, is_amd, monkeypatch):
    monkeypatch.setattr(kernels, "_is_amd", lambda: is_amd)
    torch.manual_seed(n_out)
    layer = nn.Linear(shape[-1], n_out, bias=bias).requires_grad_(False)
    reference = copy.deepcopy(layer).double()
    use_frozen_kernels(layer)
    assert isinstance(layer, FrozenLinear)
    wide = torch.randn(*shape[:-1], 2 * shape[-1])
    for x in (wide[..., : shape[-1]].contiguous(), wide[..., ::2]):  # with and without gaps
        x = x.detach().requires_grad_()
        expected = reference(x.double())
        direction = torch.randn(n_out, dtype=torch.float64).expand_as(expected)  # strides of 0
        (expected_grad,) = torch.autograd.grad(expected, x, direction)
        ours = layer(x)
        (grad,) = torch.autograd.grad(ours, x, direction.float())
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_only_frozen_float32_layers_are_replaced():
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    layers[0].requires_grad_(False)
    layers[1].requires_grad_(False).bfloat16()
    x = torch.randn(2, 8)
    before = layers[0](x)
    use_frozen_kernels(layers)
    assert [type(layer) for layer in layers] == [FrozenLinear, nn.Linear, nn.Linear]
    torch.testing.assert_close(layers[0](x), before)


@needs_onednn
def test_a_frozen_layer_is_copied_pickled_and_printed():
    layer = nn.Linear(8, 5).requires_grad_(False)
    use_frozen_kernels(layer)
    x = torch.randn(2, 8)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is FrozenLinear
        assert torch.equal(again(x), layer(x))
    assert repr(layer) == "FrozenLinear(in_features=8, out_features=5, bias=True)"


# ------------------------------------------------------------------------------- LoRA


def lora_model(architecture: str, **options):
    """A tiny model with PEFT's own LoRA on all its linear layers, an effect in each of them."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)
    model = get_peft_model(tiny_model(architecture), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.train()


@needs_onednn
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "architecture, options",
    [
        ("llama", {"r": 16, "lora_alpha": 32}),
        ("qwen2", {"r": 1, "lora_alpha": 3, "use_rslora": True}),
        ("gemma2", {"r": 4, "lora_alpha": 1}),
        ("phi3", {"r": 7, "lora_alpha": 16, "use_rslora": True}),
    ],
)
def test_lora_layers_are_pefts(architecture, options, checkpointing):
    """In loss, gradients and what is saved."""
    ids = torch.arange(40).view(2, 20)
    found = []
    for ours in (False, True):
        model = lora_model(architecture, **options)
        if ours:
            use_frozen_kernels(model)
            n_linear = sum(isinstance(module, LoraLayer) for module in model.modules())
            assert sum(isinstance(module, FrozenLoraLinear) for module in model.modules()) == n_linear
        if checkpointing:
            set_gradient_checkpointing(model)
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
        loss.backward()
        found.append((loss, gradients_of(model), get_peft_model_state_dict(model)))
    (loss, gradients, saved), (our_loss, our_gradients, our_saved) = found
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == our_gradients.keys() and saved.keys() == our_saved.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5)


@needs_onednn
def test_lora_dropout():
    """Of one layer and one seed, a map that is linear in x, A and B: the gradients are its differences. Over
    seeds the mean is the layer without dropout."""
    layer = nn.Sequential(nn.Linear(40, 24))
    config = LoraConfig(target_modules=["0"], r=4, lora_alpha=8, lora_dropout=0.3)
    model = get_peft_model(layer, config)
    use_frozen_kernels(model)
    layer = model.base_model.model[0]
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    nn.init.normal_(weights[1])
    x = torch.randn(2, 5, 40, requires_grad=True)

    def output(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x)

    direction = torch.randn(2, 5, 24)
    gradients = torch.autograd.grad((output(0) * direction).sum(), (x, *weights))
    with torch.no_grad():
        before = output(0)
        for changed, gradient in zip((x, *weights), gradients):
            step = torch.randn_like(changed)
            changed.add_(step)
            difference = ((output(0) - before) * direction).sum()
            changed.sub_(step)
            torch.testing.assert_close(difference, (gradient * step).sum(), rtol=1e-3, atol=1e-2)
        draws = torch.stack([output(seed) for seed in range(400)])
        expected = layer.eval()(x)
        error = (draws.mean(0) - expected).abs() / (draws.std(0) / 20)
        assert error.max() < 5 and error.mean() < 1  # in standard errors; 0.8 of them on average
        torch.testing.assert_close(layer(x), expected)


@needs_onednn
def test_a_disabled_adapter_has_no_effect():
    model = lora_model("llama", lora_dropout=0.5).eval()
    use_frozen_kernels(model)
    ids = torch.arange(20)[None]
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, tiny_model()(ids).logits, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_over_16_bits_stays_pefts(dtype):
    model = with_lora(tiny_model().to(dtype))
    use_frozen_kernels(model)
    assert not any(isinstance(module, FrozenLoraLinear) for module in model.modules())


@needs_onednn
def test_frozen_layers_beside_lora():
    """LoRA's own layers train and stay; merged, the model is packed as any other."""
    model = with_lora(tiny_model())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        use_frozen_kernels(model)
        n_frozen = sum(isinstance(module, FrozenLinear) for module in model.modules())
        assert n_frozen == 15  # two layers of seven, and the head
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        replace_linear_layers(merged, PackedLinear)
        assert sum(isinstance(module, PackedLinear) for module in merged.modules()) == n_frozen
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["_linear_pointwise", "_reorder_linear_weight"])
def test_a_missing_onednn_operator_is_noticed(monkeypatch, name):
    """As of another torch version; the layers then stay PyTorch's."""

    def changed(*_):
        raise TypeError(f"{name}() takes other arguments")

    monkeypatch.setattr(torch.ops.mkldnn, name, changed)
    assert not has_onednn.__wrapped__()


def test_without_onednn_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(kernels, "has_onednn", lambda: False)
    layer = nn.Linear(8, 8).requires_grad_(False)
    use_frozen_kernels(layer)
    assert type(layer) is nn.Linear


@pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI instructions")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind, bound", [(PackedLinear, 1e-5), (Int8Linear, 0.05)])
def test_layers_for_inference_give_the_same_logits(architecture, kind, bound):
    model = tiny_model(architecture)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        replace_linear_layers(model, kind)
        assert sum(isinstance(module, kind) for module in model.modules()) >= 9
        assert (model(ids).logits - before).norm() <= bound * before.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_left_to_torch(monkeypatch, dtype):
    """As on a CPU without the instructions, where oneDNN refuses to reorder such a weight."""

    def refused(*_):
        raise RuntimeError(
            "mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw"
        )

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refused)
    model = tiny_model().to(dtype)
    replace_linear_layers(model, PackedLinear)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(RuntimeError):
        replace_linear_layers(tiny_model(), PackedLinear)


@pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI instructions")
@pytest.mark.parametrize(
    "n_in, n_out, rows, seed",
    [(1, 1, 1, 0), (17, 5, 3, 1), (64, 200, 1, 2), (576, 96, 40, 3), (1536, 64, 130, 4)],
)
def test_int8_layer_is_the_product_of_the_rounded_weight(n_in, n_out, rows, seed):
    torch.manual_seed(seed)
    weight = torch.randn(n_out, n_in)
    bias = torch.randn(n_out)
    scale_of_rows = torch.logspace(-4, 4, 2 * rows).view(2, rows, 1)
    x = torch.randn(2, rows, n_in) * scale_of_rows
    x[0, 0, 0] = 0
    layer = Int8Linear(weight, bias)
    scale = weight.abs().amax(1, keepdim=True).double() / 127
    expected = x.double() @ ((weight.double() / scale).round() * scale).T
    error = (layer(x).double() - bias.double() - expected).abs()
    # Half a level of x in each product
    level = x.double().abs().amax(-1, keepdim=True) / 32512
    bound = 0.51 * level * (scale * 127).T * n_in
    assert bool((error <= bound + 1e-4 * expected.abs().amax(-1, keepdim=True) + 1e-5).all())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    alone = torch.stack([torch.stack([layer(row[None])[0] for row in part]) for part in x])
    assert torch.equal(alone, layer(x))  # to the bit: no row depends on its neighbors


@pytest.mark.parametrize("kind, exact", [(PackedLinear, True), (Int8Linear, False)])
def test_models_that_read_a_weight_find_it(kind, exact):
    if not (has_onednn() if exact else has_int8()):
        pytest.skip("not on this CPU")
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    found = kind(weight, torch.randn(64)).weight
    torch.testing.assert_close(found, weight, atol=1e-5 if exact else 0.03, rtol=0)


def test_a_cpu_whose_sums_overflow_is_noticed(monkeypatch):
    """Without VNNI instructions oneDNN adds pairs of products in 16 bits, which saturate."""
    forward = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: forward(self, x).clamp(max=40))
    assert not has_int8.__wrapped__()
