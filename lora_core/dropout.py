"""Dropout masks that cost little on a CPU, and `nn.Dropout` made of them.

    use_fast_dropout(model)      # the model's own nn.Dropout layers, in place: same meaning, a tenth of the time

Each element compares one random byte with a threshold, and eight bytes are drawn at a time, where `F.dropout` draws a
double for each element. So the probability is rounded to a multiple of 1/256 (0.1 to 26/256), and the rescaling uses the
rounded value. A mask is kept for the backward as one bit an element. It comes from torch's generator: reproducible under
a seed, and drawn again alike under gradient checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SecondDerivativeError


def first_derivative_only(backward: Callable) -> Callable:
    """Marks the backward of an autograd function that is not differentiable itself.

    torch's `once_differentiable` notices a second derivative only where the incoming gradient requires one, and is
    silently wrong where that is a constant; this refuses as soon as a graph of the backward is asked for.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise SecondDerivativeError(
                "LoRA layers and fast dropout have no second derivative; call backward() or grad() without create_graph"
            )
        return backward(ctx, *gradients)

    return checked


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element of x, (...), with probability p and scales the others by 1 / (1 - p); p rounded to n / 256."""
    if not p or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep, kept = draw_keep_mask(x.shape, p, x.device)
        ctx.save_for_backward(pack_bits(keep))
        ctx.shape, ctx.scale = x.shape, 1 / kept
        return keep.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        (bits,) = ctx.saved_tensors
        return unpack_bits(bits, ctx.shape).to(dy.dtype).mul_(dy).mul_(ctx.scale), None


class FastDropout(nn.Dropout):
    """`nn.Dropout` with the mask of this file. On a GPU, whose own dropout is one kernel, it is `nn.Dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.inplace or not self.training or self.p == 1:
            return super().forward(x)
        return dropout(x, self.p)


def use_fast_dropout(model: nn.Module) -> int:
    """Makes every `nn.Dropout` of `model` a `FastDropout`, in place; returns how many there were."""
    layers = [m for m in model.modules() if type(m) is nn.Dropout]
    for layer in layers:
        layer.__class__ = FastDropout
    return len(layers)


def draw_keep_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """A fresh dropout mask: uint8 of `shape`, 1 (keep) or 0 (drop), and the probability of a 1.

    `p` is rounded to a multiple of 1/256, but not up to 1.
    """
    n = shape.numel()
    threshold = min(round(p * 256), 255)
    # Without the bounds random_() leaves the sign bit of an int64 zero, and every eighth byte would be below 128.
    words = torch.empty((n + 7) // 8, dtype=torch.int64, device=device).random_(-(2**63), None)
    mask = words.view(torch.uint8)[:n].view(shape)
    return torch.ge(mask, threshold, out=mask), 1 - threshold / 256


def pack_bits(mask: Tensor) -> Tensor:
    """A mask of ones and zeros as bits, on the CPU; as it is elsewhere, where numpy does not reach."""
    return torch.from_numpy(np.packbits(mask.numpy())) if mask.device.type == "cpu" else mask


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The uint8 mask that `pack_bits` packed."""
    if bits.device.type != "cpu":
        return bits
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).view(shape)
