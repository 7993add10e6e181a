"""Replacements for operations of PyTorch that are slower, or take more memory, than they need to.

For training: cross-entropy summed in place, products with frozen weights, dropout from few random bits. For
inference on a CPU: linear layers with packed or 8-bit weights. tests/test_kernels.py compares each with
PyTorch's own, those for training with their gradients.

Four operators of PyTorch are not part of its public interface; torch.compile puts them into its code for x86
CPUs:

    operator                         checked with    what happens without it mkldnn._linear_pointwise
    torch 2.13.0    has_onednn() is False: nn.Linear stays, slower on some CPUs mkldnn._reorder_linear_weight
    torch 2.13.0    the same onednn.qlinear_prepack           torch 2.13.0    has_int8() is False: 8 bit goes
    through bitsandbytes onednn.qlinear_pointwise         torch 2.13.0    the same
"""

import functools
import platform

import torch
import torch.nn.functional as F
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


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return onednn_linear(grad, weight.t(), None), None, None


class FrozenLinear(nn.Linear):
    """nn.Linear with a float32 weight that is not trained, by oneDNN, on a CPU.

    torch gives float32 products to MKL, which uses half of the vector units of an AMD CPU with AVX-512.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self.weight, self.bias)


def use_frozen_kernels(model: nn.Module) -> None:
    """Turns the frozen float32 nn.Linear layers of a model on an x86 CPU into FrozenLinear."""
    if not has_onednn():
        return
    for module in model.modules():
        is_frozen = type(module) is nn.Linear and not any(
            parameter.requires_grad for parameter in module.parameters()
        )
        if is_frozen and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.__class__ = FrozenLinear


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


# ------------------------------------------------------------------------------- dropout


class FastDropout(nn.Module):
    """Dropout whose mask is drawn from 16 random bits per element, two and a half times as fast as nn.Dropout
    on a CPU, and kept in one byte per element, not four. The fraction of zeros is `p` to within 1 / 65,536;
    what is kept is scaled by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        # Four 16-bit numbers from each 64-bit one, from -2^15 to 2^15 - 1
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        numbers = words.view(torch.int16)[: x.numel()]
        n_dropped = round(self.p * 2**16)  # of the 2^16 numbers
        kept = (numbers >= n_dropped - 2**15).view(x.shape)
        return x * kept * (1 / (1 - n_dropped / 2**16))


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
        upper = (shifted >> 8) + 128
        lower = shifted & 255
        sums = self._product(torch.cat([upper, lower]).to(torch.uint8))
        upper_sums, lower_sums = sums.chunk(2)
        out = lower_sums.add_(upper_sums, alpha=256).mul_(scale)
        if self.bias is not None:
            out = out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def _product(self, halves: Tensor) -> Tensor:
        """(rows, out) in float32: `halves` (rows, in), which stand for themselves less 128, times the
        weight."""
        return torch.ops.onednn.qlinear_pointwise(
            qx=halves,
            x_scale=1.0,
            x_zero_point=128,
            qw=self.packed,
            w_scale=self.scale,
            w_zero_point=self.zero,
            bias=None,
            output_scale=1.0,
            output_zero_point=0,
            output_dtype=torch.float32,
            post_op_name="none",
            post_op_args=[],
            post_op_algorithm="",
        )


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


def convert_linear(module: nn.Module, kind: type) -> nn.Module:
    """A layer of `kind` (PackedLinear or Int8Linear) with the weight of a linear layer; GPT-2's Conv1D has it
    transposed."""
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return kind(weight, module.bias)


def replace_linear_layers(model: nn.Module, kind: type) -> None:
    """Replaces the linear layers of a model on a CPU with layers of `kind`; it then gives no gradient and
    cannot be saved. PackedLinear takes only float32: oneDNN refuses 16 bits on CPUs without the
    instructions."""
    # Names alone are kept, so that the old weights are freed one by one
    names = [
        name for name, module in model.named_modules() if type(module) in (nn.Linear, FrozenLinear, Conv1D)
    ]
    for name in names:
        module = model.get_submodule(name)
        if kind is not PackedLinear or module.weight.dtype == torch.float32:
            model.set_submodule(name, convert_linear(module, kind))
            # They would make a folder, or a repository, before they ask for the weights
            model.save_pretrained = model.push_to_hub = refuse_copy


def pack_for_inference(model: nn.Module) -> None:
    """PackedLinear for a float32 model without adapter on an x86 CPU; leaves other models as they are."""
    parameter = next(model.parameters())
    has_adapter = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    fits = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    if fits and not has_adapter and not getattr(model, "is_quantized", False) and has_onednn():
        replace_linear_layers(model, PackedLinear)
