"""Replacements for operations of PyTorch and PEFT that are slower, or take more memory, than they need to.

For training: cross-entropy summed in place; linear layers with a frozen weight, alone or with LoRA. For
inference on a CPU: linear layers with packed or 8-bit weights. tests/test_kernels.py compares each with the
libraries' own, those for training with their gradients.

torch.ops.mkldnn._linear_pointwise and _reorder_linear_weight, and torch.ops.onednn.qlinear_prepack and
qlinear_pointwise (torch 2.13.0) are no public interface: torch.compile puts them into its code for x86 CPUs.
Where the first two are missing, has_onednn() is False and the libraries' layers stay; where the others are,
has_int8() is False and 8 bit goes through bitsandbytes."""

import functools
import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sft.cli import InputError

# ------------------------------------------------------------------------------- loss


class SummedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, reduction="sum") in the memory of the logits alone.

    logits (n, vocabulary), targets (n,) -> a float32 scalar. The softmax is in float32 over some of the rows
    at a time; the gradient overwrites the logits, which is no longer needed (F.cross_entropy holds two more
    tensors of their size)."""

    ROWS = 128

    @staticmethod
    def forward(ctx, logits, targets):
        total = logits.new_zeros((), dtype=torch.float32)
        normalizers = logits.new_empty(len(targets), dtype=torch.float32)
        for start in range(0, len(targets), SummedCrossEntropy.ROWS):
            rows = slice(start, start + SummedCrossEntropy.ROWS)
            part = logits[rows].float()
            normalizers[rows] = part.logsumexp(-1)
            total += (normalizers[rows] - part.gather(1, targets[rows, None])[:, 0]).sum()
        ctx.save_for_backward(logits, targets, normalizers)
        return total

    @staticmethod
    def backward(ctx, grad):
        logits, targets, normalizers = ctx.saved_tensors
        for start in range(0, len(targets), SummedCrossEntropy.ROWS):
            rows = slice(start, start + SummedCrossEntropy.ROWS)
            part = logits[rows].float()  # no copy if it is float32 already
            part.sub_(normalizers[rows, None]).exp_()
            part.scatter_add_(1, targets[rows, None], part.new_full((len(part), 1), -1.0))
            logits[rows] = part.mul_(grad)
        return logits, None


# ------------------------------------------------------------------------------- frozen linear layers


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in float32 by oneDNN: x (..., in), weight (out, in) in any strides or packed, bias (out,)."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


@functools.cache
def _is_amd() -> bool:
    """torch gives float32 products to MKL. On an AMD CPU with AVX-512 that uses half of the vector units, and
    oneDNN is twice as fast; on one of Intel's a training step took 13 % less time with MKL."""
    about = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (about.read_text() if about.is_file() else platform.processor())


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in float32, without a gradient, by the faster library."""
    return onednn_linear(x, weight, bias) if _is_amd() else F.linear(x, weight, bias)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return frozen_product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return frozen_product(grad, weight.t(), None), None, None


class FrozenLinear(nn.Linear):
    """nn.Linear with a float32 weight that is not trained, on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self.weight, self.bias)


class _LoraProduct(torch.autograd.Function):
    """x W' + bias + scale dropout(x) A' B': the frozen product and the adapter's, added in place.

    For backward it keeps x, which layers with the same input share, the dropout's mask (one byte per element)
    and dropout(x) A', which is r wide."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, p):
        output = frozen_product(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        kept = None
        if p:
            kept, kept_share = dropout_mask(rows.shape, p)
            scale = scale / kept_share
        narrow = (rows if kept is None else torch.where(kept, rows, 0.0)) @ lora_a.t()
        output.view(-1, output.shape[-1]).addmm_(narrow, lora_b.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, lora_a, lora_b, narrow, kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, grad):
        rows, weight, lora_a, lora_b, narrow, kept = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_narrow = (grad_rows @ lora_b).mul_(ctx.scale)
        grad_b = (narrow.t() @ grad_rows).t().mul(ctx.scale)
        # Multiplying by numbers is faster than by Booleans
        kept = 1.0 if kept is None else kept.to(rows.dtype)
        grad_a = grad_narrow.t() @ (rows * kept)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = frozen_product(grad, weight.t(), None)
            grad_x.view(rows.shape).add_((grad_narrow @ lora_a).mul_(kept))
        return grad_x, None, None, grad_a, grad_b, None, None


class FrozenLoraLinear(LoraLinear):
    """PEFT's LoRA layer over a FrozenLinear, in one step."""

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        if self.disable_adapters or self.merged or kwargs:
            return super().forward(x, **kwargs)
        lora = (self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"])
        p = getattr(self.lora_dropout["default"], "p", 0.0) if self.training else 0.0
        return _LoraProduct.apply(x, self.base_layer.weight, self.base_layer.bias, *lora, p)


def dropout_mask(shape: tuple[int, int], p: float) -> tuple[Tensor, float]:
    """(a Boolean mask of what dropout keeps on a CPU, the share that is kept): from 16 random bits per
    element, so that this is `1 - p` to within 1 / 65,536."""
    n = math.prod(shape)
    # Four 16-bit numbers from each 64-bit one, from -2^15 to 2^15 - 1
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    n_dropped = round(p * 2**16)  # of the 2^16 numbers
    kept = words.view(torch.int16)[:n] >= n_dropped - 2**15
    return kept.view(shape), 1 - n_dropped / 2**16


def use_frozen_kernels(model: nn.Module) -> None:
    """Turns the frozen float32 nn.Linear layers of a model on an x86 CPU into FrozenLinear, and PEFT's LoRA
    layers over them into FrozenLoraLinear. On a GPU, quantized or in 16 bit they stay the libraries' own."""
    if not has_onednn():
        return
    for module in model.modules():
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        if type(module) is nn.Linear and not is_trained and _is_float32_on_cpu(module):
            module.__class__ = FrozenLinear
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is FrozenLinear:
            module.__class__ = FrozenLoraLinear


def _is_float32_on_cpu(module: nn.Module) -> bool:
    weight = next(module.parameters())
    return weight.device.type == "cpu" and weight.dtype == torch.float32


@functools.cache
def has_onednn() -> bool:
    """Whether FrozenLinear and PackedLinear work on this CPU: tried. Not on ARM, where they have not been
    measured."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 4 * 64).view(4, 64)
    weight = torch.linspace(1, -1, 32 * 64).view(32, 64)
    expected = x @ weight.t()
    try:
        found = (onednn_linear(x, weight, None), PackedLinear(weight, None)(x))
        return all(torch.allclose(product, expected, rtol=1e-3, atol=1e-3) for product in found)
    except (RuntimeError, AttributeError, TypeError):
        return False


# ------------------------------------------------------------------------------- linear layers for inference


def refuse_copy(*_, **__):
    fix = "write it with --merge_to, or load it with SFTInference(..., merge=False)"
    raise InputError("a model that was packed for inference cannot be saved or copied", fix)


class _ForInference(nn.Module):
    """A layer without its weight in standard form. A model with such layers would be saved or copied without
    them: refused instead."""

    @property
    def weight(self) -> Tensor:
        """(out, in), for the models that read it beside calling the layer (Jamba, Mamba). Computed each time:
        theirs are small."""
        products = self(torch.eye(self.in_features))
        return (products if self.bias is None else products - self.bias).t()

    _save_to_state_dict = refuse_copy  # behind state_dict()
    __reduce_ex__ = refuse_copy  # behind copy, deepcopy and pickle


class PackedLinear(_ForInference):
    """A linear layer whose float32 weight oneDNN has repacked once, instead of for each product. For
    inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.in_features = weight.shape[1]
        expected_rows = 32  # of the inputs
        weight = weight.detach().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, expected_rows)

    def forward(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.packed, self.bias)


class Int8Linear(_ForInference):
    """A linear layer with 8-bit weights, for inference only: each row of the weight is rounded to 255 levels
    once, each row of x to 65,025 when it comes.

    Vector-wise quantization (Dettmers et al., arXiv 2208.07339, section 2.1), but with a level of x in two
    halves of 8 bits: rounding x to one half changed summaries far more than rounding the weights. The sums
    are exact integers, so that no row of x depends on its neighbors."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.in_features = weight.shape[1]
        levels, scale = quantize_rows(weight.detach().float().contiguous(), 127)
        self.packed = torch.ops.onednn.qlinear_prepack(levels.to(torch.int8), None)
        self.scale = scale[:, 0]
        self.zero = torch.zeros(len(weight), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        levels, scale = quantize_rows(x.flatten(0, -2).float(), 127 * 256)
        # levels = 256 (upper - 128) + (lower - 128)
        shifted = levels.add_(128).to(torch.int16)
        halves = torch.cat([(shifted >> 8) + 128, shifted & 255]).to(torch.uint8)
        # Halves (2 rows, in) stand for themselves less 128; the output is float32, without anything after it
        weight = (self.packed, self.scale, self.zero)
        after = (1.0, 0, torch.float32, "none", [], "")
        sums = torch.ops.onednn.qlinear_pointwise(halves, 1.0, 128, *weight, None, *after)
        upper, lower = sums.chunk(2)
        out = lower.add_(upper, alpha=256).mul_(scale)
        if self.bias is not None:
            out = out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_rows(x: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) as integers from -highest to highest (in x's dtype), and the scale (rows, 1) that undoes
    it."""
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / highest
    return (x / scale).round_(), scale


@functools.cache
def has_int8() -> bool:
    """Whether Int8Linear works on this CPU: tried with the largest sums, which one without VNNI instructions
    gets wrong."""
    try:
        layer = Int8Linear(torch.full((32, 256), 0.5), None)
        return bool((layer(torch.full((4, 256), 0.5)) - 64).abs().max() < 1e-3)
    except (RuntimeError, AttributeError, TypeError):
        return False


def replace_linear_layers(model: nn.Module, kind: type) -> None:
    """Replaces the linear layers of a model on a CPU, each with its LoRA adapter if it has one, with layers
    of `kind` (PackedLinear or Int8Linear); it then gives no gradient and cannot be saved. PackedLinear takes
    only float32: oneDNN refuses 16 bits on CPUs without the instructions."""
    # Names alone are kept, so that the old weights are freed one by one
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, FrozenLinear, Conv1D, LoraLinear)
        and ".lora_" not in name
        and not name.endswith(".base_layer")
    ]
    for name in names:
        module = model.get_submodule(name)
        linear = module.get_base_layer() if isinstance(module, LoraLinear) else module
        weight = linear.weight
        if kind is PackedLinear and weight.dtype != torch.float32:
            continue
        if isinstance(module, LoraLinear):
            weight = weight.float() + module.get_delta_weight("default")
        model.set_submodule(name, kind(weight.t() if isinstance(linear, Conv1D) else weight, linear.bias))
        # They would make a folder, or a repository, before they ask for the weights
        model.save_pretrained = model.push_to_hub = refuse_copy


def pack_for_inference(model: nn.Module) -> None:
    """PackedLinear for a float32 model without adapter on an x86 CPU; leaves other models as they are."""
    has_adapter = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    is_plain = not has_adapter and not getattr(model, "is_quantized", False)
    if is_plain and _is_float32_on_cpu(model) and has_onednn():
        replace_linear_layers(model, PackedLinear)
