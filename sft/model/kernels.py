"""The operations that the libraries do slower, or in more memory or bits, than they need to be.

For training: attention over packed rows, cross-entropy summed in place, products with frozen weights, dropout from cheap random
bits. For inference on a CPU: linear layers with packed or 8-bit weights. Each is compared with PyTorch's own in
tests/test_kernels.py, those of training with their gradients; varlen_attention, which needs a GPU, only
by the probe at the start of a run (enable_packing).
"""

import functools
import platform
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ attention


# ------------------------------------------------------------------------------------------------ loss


class SummedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, reduction="sum") in the memory of the logits alone.

    logits (n, vocabulary), targets (n,) -> a float32 scalar. The softmax is done in float32 over a part of the rows at a time;
    the gradient takes the place of the logits, which nobody needs any more (F.cross_entropy holds two more tensors of
    their size).
    """

    ROWS = 128

    @staticmethod
    def forward(ctx, logits, targets):
        total = logits.new_zeros((), dtype=torch.float32)
        normalizers = logits.new_empty(len(targets), dtype=torch.float32)
        for i in range(0, len(targets), SummedCrossEntropy.ROWS):
            rows = slice(i, i + SummedCrossEntropy.ROWS)
            part = logits[rows].float()
            normalizers[rows] = part.logsumexp(-1)
            total += (normalizers[rows] - part.gather(1, targets[rows, None])[:, 0]).sum()
        ctx.save_for_backward(logits, targets, normalizers)
        return total

    @staticmethod
    def backward(ctx, grad):
        logits, targets, normalizers = ctx.saved_tensors
        for i in range(0, len(targets), SummedCrossEntropy.ROWS):
            rows = slice(i, i + SummedCrossEntropy.ROWS)
            part = logits[rows].float()  # no copy if it is float32 already
            part.sub_(normalizers[rows, None]).exp_()
            part.scatter_add_(1, targets[rows, None], part.new_full((len(part), 1), -1.0))
            logits[rows] = part.mul_(grad)
        return logits, None


# ------------------------------------------------------------------------------------------------ frozen linear layers


class FrozenLinear(torch.autograd.Function):
    """F.linear with a weight that is not trained, in float32, by oneDNN.

    torch gives float32 products to MKL, which uses half of the vector units of an AMD CPU with AVX-512. The operator is the one
    that torch.compile puts into its code; it takes x (..., in), weight (out, in) in any strides, bias (out,) or None.
    """

    @staticmethod
    def product(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return FrozenLinear.product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return FrozenLinear.product(grad, weight.t(), None), None, None


def has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and platform.machine() in ("x86_64", "AMD64")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def speed_up_frozen_layers(model: nn.Module) -> None:
    """Lets the frozen float32 linear layers of a model on an x86 CPU use FrozenLinear."""
    if not has_onednn():
        return
    for module in model.modules():
        frozen = type(module) is nn.Linear and not any(
            parameter.requires_grad for parameter in module.parameters()
        )
        if frozen and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.forward = types.MethodType(
                lambda self, x: FrozenLinear.apply(x, self.weight, self.bias), module
            )


# ------------------------------------------------------------------------------------------------ dropout


class FastDropout(nn.Module):
    """Dropout whose mask is drawn from 16 random bits an element, two and a half times as fast as nn.Dropout on a CPU and
    kept in one byte an element, not four. The share of zeros is `p` to within 1 / 65,536; what is kept is scaled by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = (bits[: x.numel()] >= round(self.p * 2**16) - 2**15).view(x.shape)
        return x * kept * (1 / (1 - round(self.p * 2**16) / 2**16))


# ------------------------------------------------------------------------------------------------ linear layers for inference


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has brought into its own order once, instead of for each product. For inference
    alone. (The operators are those that torch.compile puts into frozen models.)"""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed, self.bias = (
            torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 32),
            bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights: each row of the weight is rounded to 255 levels once, each row of x to 65,025 when it
    comes (vector-wise quantization: Dettmers et al., arXiv 2208.07339, section 2.1, but with a level of x in two halves of 8 bits:
    rounding x to one half changed summaries far more than rounding the weights). The sums are exact whole numbers, so that no
    row of x depends on its neighbours. For inference alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        levels, scale = quantize_rows(weight.detach().float().contiguous(), 127)
        self.packed, self.scale, self.bias = (
            torch.ops.onednn.qlinear_prepack(levels.to(torch.int8), None),
            scale[:, 0],
            bias,
        )
        self.zero = torch.zeros(len(weight), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        levels, scale = quantize_rows(x.flatten(0, -2).float(), 127 * 256)
        levels, n = levels.add_(128).to(torch.int16), len(levels)
        halves = torch.cat([(levels >> 8) + 128, levels & 255]).to(
            torch.uint8
        )  # levels = 256 (upper - 128) + (lower - 128)
        weight = self.packed, self.scale, self.zero
        out = torch.ops.onednn.qlinear_pointwise(
            halves, 1.0, 128, *weight, None, 1.0, 0, torch.float32, "none", [], ""
        )
        out = out[n:].add_(out[:n], alpha=256).mul_(scale)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype).view(*x.shape[:-1], -1)


def quantize_rows(x: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """x (rows, n) as whole numbers from -highest to highest, and the scale (rows, 1) that brings them back."""
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / highest
    return (x / scale).round_(), scale


@functools.cache
def has_int8() -> bool:
    """Whether Int8Linear works on this CPU: tried with the largest sums, which one without VNNI instructions gets wrong."""
    try:
        layer = Int8Linear(torch.full((32, 256), 0.5), None)
        return bool((layer(torch.full((4, 256), 0.5)) - 64).abs().max() < 1e-3)
    except (RuntimeError, AttributeError):
        return False


def convert_linear(module: nn.Module, kind: type) -> nn.Module:
    """A layer of `kind` with the weight of a linear layer; GPT-2's Conv1D keeps it transposed."""
    return kind(module.weight if type(module).__name__ == "Linear" else module.weight.t(), module.bias)


def replace_linear_layers(model: nn.Module, kind: type) -> None:
    """Puts `kind` (PackedLinear or Int8Linear) in the place of the linear layers of a model on a CPU, which then gives no gradient
    and cannot be saved. PackedLinear takes float32 alone: oneDNN refuses 16 bits on CPUs without the instructions."""
    # Names alone, so that the old weights go one by one
    for name in [
        name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
    ]:
        module = model.get_submodule(name)
        if kind is not PackedLinear or module.weight.dtype == torch.float32:
            model.set_submodule(name, convert_linear(module, kind))
