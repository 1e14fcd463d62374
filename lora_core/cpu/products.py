"""Products with frozen weights that cost less on CPUs for which MKL is not made, and `nn.Linear` made of them.

    use_fast_linear(model)      # the model's nn.Linear layers, in place, before quantising and inject: same meaning

On x86 torch multiplies float32 matrices with MKL, which keeps its fastest kernels to Intel's processors. oneDNN, which is in
torch too, writes its kernels for the processor that it finds, and is faster on AMD's (docs/performance.md). But its call is
dearer, so small products stay where they are, and so do those with A and B. Elsewhere everything here is torch's own.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import first_derivative_only
from .traced import is_traced, made_again

#: Multiplications from which oneDNN makes up for its dearer call.
WORTH = 2**22


def product(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., d_out), for x, (..., d_in), and W, (d_out, d_in), by the faster library. Outside of autograd."""
    if faster_by_onednn(x, W):
        return _onednn()(x, W, bias, "none", [], "")
    return F.linear(x, W, bias)


@functools.cache
def _onednn() -> Callable:
    return torch.ops.mkldnn._linear_pointwise


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, for next to nothing where x has it already: `to` takes as long to find that out as a small product."""
    return x if x.dtype == dtype else x.to(dtype)


def tall_product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y, (d, r), for tall x, (T, d), and y, (T, r), of which r is small: the way round that MKL is faster with.

    On an AMD CPU that is y as it stands; on Intel's it is faster to sum along the rows of x.
    """
    return x.t() @ y if on_amd_cpu() else (y.t() @ x).t()


def faster_by_onednn(x: Tensor, W: Tensor) -> bool:
    """Whether `product` takes oneDNN for these: large enough matrices of float32, on an AMD CPU."""
    return (
        x.dtype == W.dtype == torch.float32
        and x.device.type == W.device.type == "cpu"
        and x.dim() > 1
        and x.numel() * W.shape[0] >= WORTH
        and onednn_suits_cpu()
        and torch.backends.mkldnn.enabled
    )


@functools.cache
def onednn_suits_cpu() -> bool:
    """Whether this is an AMD processor, and torch has oneDNN with the operation that multiplies a plain matrix."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and on_amd_cpu()


@functools.cache
def on_amd_cpu() -> bool:
    """Whether the processor is one of AMD's; False where that can't be told."""
    return "AuthenticAMD" in _cpu_vendor()


def _cpu_vendor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line for line in file if line.startswith("vendor_id")), "")
    return platform.processor()  # on Windows it ends with the vendor


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dense: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + b, (..., d_out), by `product`, with W frozen: no gradient is computed for it.

    Args:
        x: input, (..., d_in), floating point.
        weight: W, (d_out, d_in), or what `dense` turns into that (packed 4-bit values).
        bias: b, (d_out,), which may be trained, or None.
        dense: makes W of `weight`, in the forward and again in the backward, so that it is never kept.
        dtype: what to compute in, and the result's dtype; None: that of x.
    """
    dtype = dtype or x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if is_traced():
        return F.linear(x, made_again(dense, weight) if dense else weight, bias)
    return _FrozenLinear.apply(x, weight, bias, dense)


class _FrozenLinear(torch.autograd.Function):
    """The fused form of `frozen_linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias, dense):
        ctx.save_for_backward(weight)
        ctx.dense = dense
        return product(x, dense(weight) if dense else weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        need_x, _, need_bias, _ = ctx.needs_input_grad
        dx = product(dy, (ctx.dense(weight) if ctx.dense else weight).t()) if need_x else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None
        return dx, None, dbias, None


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by `product` where that is faster and `weight`, (d_out, d_in), is frozen."""
    if weight.requires_grad or torch.is_autocast_enabled(x.device.type) or not faster_by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return frozen_linear(x, weight, bias)


class FastLinear(nn.Linear):
    """`nn.Linear` that computes `fast_linear`."""

    def forward(self, x: Tensor) -> Tensor:  # ... d_in -> ... d_out
        return fast_linear(x, self.weight, self.bias)
