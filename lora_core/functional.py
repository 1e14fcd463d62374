"""The maths of LoRA on plain tensors: no modules, no names, no state.

A LoRA linear layer computes (Hu et al., arXiv 2106.09685, equation 3)

    y = x W^T + b + s dropout(x) A^T B^T        W: (d_out, d_in) frozen;  A: (r, d_in) and B: (d_out, r) trained

and, with g = s dy B, its gradients are

    dx = dy W + dropout'(g A)        dA = g^T dropout(x)        dB = s dy^T (dropout(x) A^T)

Written as separate autograd operations this makes several passes over tensors of the size of x and y, and autograd
keeps copies of them. `lora_linear` is one autograd function instead. For the backward it keeps x, or with dropout the copy
that was dropped out, either of them one for all layers that read the same x; the thin product dropout(x) A^T; and the seed of
the dropout's mask. The update is added into the base layer's output in place, dx is built in one buffer, and no gradient for
W is computed.

Shapes below: T tokens (the leading dimensions of x, flattened), d_in, d_out, r.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropped, dropped_for, first_derivative_only, same_keep_mask_for
from .products import product, tall_product

#: Elements of a block of rows of g A that is masked at a time: 2 MiB of float32. A quarter takes the same time.
BLOCK = 2**19


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    dense: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """A linear layer with a low-rank update: x W^T + b + scaling * dropout(x) A^T B^T.

    Args:
        x: input, (..., d_in), floating point.
        weight: W, (d_out, d_in), or what `dense` turns into that (packed 4-bit values).
        bias: b, (d_out,), or None.
        lora_A: A, (r, d_in), of any float dtype.
        lora_B: B, (d_out, r), likewise.
        scaling: the factor before the update, a number (lora_alpha / r).
        dropout: probability with which an element of x is zeroed before A; 0 when not training. It is rounded to a
            multiple of 1/256 and drawn from torch's generator for x's device. Layers that read the same tensor one after
            another share its mask (`dropout.dropped_for`); from pass to pass it is independent.
        dense: makes W of `weight`, a new tensor in the dtype of the computation; called in the forward and again in the
            backward, so that only the packed form is kept in between.
        dtype: what to compute in, and the result's dtype; None: autocast's if that is on, else that of x.
        linear: how the base layer multiplies in the forward: `F.linear`, or `products.product`.

    Returns:
        y, (..., d_out).
    """
    if dtype is None:
        dtype = autocast_dtype(x)
        if dense is None and weight.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            dense = methodcaller("to", dtype)  # the cast copy of W is not kept for the backward either
    bias = None if bias is None else bias.to(dtype)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    if torch.compiler.is_compiling() or weight.requires_grad:
        # A compiler fuses plain operations better than it sees through ours; and ours has no gradient for W.
        x, W = x.to(dtype), dense(weight) if dense else weight
        return F.linear(x, W, bias) + lora_product(x, lora_A, lora_B, scaling, dropout)
    dropped = dropped_for(x, dropout, dtype, weight.data_ptr()) if dropout else None
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropped, dense, dtype, linear)


def fold_(W: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """Folds an adapter into W, (d_out, d_in), in place: W + s B A; with DoRA's m, (d_out,): f (W + s B A). Returns W."""
    W.addmm_(B.to(W.dtype), A.to(W.dtype), alpha=scaling)
    return W if magnitude is None else W.mul_(dora_factor(W, magnitude)[:, None])


def dora_factor(V: Tensor, magnitude: Tensor) -> Tensor:
    """f = m / |V|, (d_out,), with the norm of each row of V, (d_out, d_in), a constant in the gradient.

    V is W + s B A, the direction; the output of the layer is f times that of V (Liu et al., "DoRA", arXiv 2402.09353,
    equation 5 and section 4.3). A row of zeros gets the factor 0, not NaN.
    """
    norm = torch.linalg.vector_norm(V.detach(), dim=1)
    return magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| in the Frobenius norm, row by row in blocks: without a third tensor of their size, which takes longer."""
    rows = max(1, 2**18 // max(1, a[:1].numel()))
    parts = [torch.linalg.vector_norm(x - y).double() for x, y in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.stack(parts).norm().item()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x is computed in: autocast's if that is on, which leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def lora_product(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """The update alone, in plain operations: scaling * dropout(x) A^T B^T, (..., d_out); arguments as above."""
    return scaling * (F.dropout(x, dropout) @ lora_A.to(x.dtype).t() @ lora_B.to(x.dtype).t())


class _LoraLinear(torch.autograd.Function):
    """The fused form of `lora_linear`; the module docstring has the equations."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, s, dropped: Dropped | None, dense, dtype, linear):
        need_A, need_B = ctx.needs_input_grad[3:5]
        x_cast = x.to(dtype)
        h = None
        if dropped:
            s = s / dropped.kept  # dropout's rescaling, on one number instead of on every element
        x2 = dropped.x if dropped else x_cast.reshape(-1, x.shape[-1])  # T d_in
        if not dropped and folding_pays(x2.shape[0], A.shape[1], dtype, dense):
            y = linear(x_cast, fold(weight, A, B, s, dense), bias)  # ... d_out
        else:
            # The base layer's own call, on x as it came: a fresh adapter (B = 0) then changes no bit of its output.
            y = linear(x_cast, dense(weight) if dense else weight, bias).contiguous()  # ... d_out
            h = x2 @ A.t()  # T r
            y.view(-1, B.shape[0]).addmm_(h, B.t(), alpha=s)

        read = dropped.x if dropped else x  # x as it came: a cast copy would not be shared
        ctx.save_for_backward(
            read if need_A or (need_B and h is None) else None,
            weight,
            A,
            B,
            h if need_B else None,
            dropped.source if dropped else None,
        )
        ctx.s, ctx.p, ctx.dense, ctx.x_dtype = s, dropped and dropped.p, dense, x.dtype
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        x, weight, A, B, h, source = ctx.saved_tensors
        s, dense = ctx.s, ctx.dense
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        dx = dA = dB = dbias = None
        dy2 = dy.reshape(-1, B.shape[0])  # T d_out
        x2 = None if x is None else x.to(dy.dtype).reshape(-1, A.shape[1])  # T d_in
        g = (dy2 @ B).mul_(s)  # T r
        if need_B:
            h = x2 @ A.t() if h is None else h
            dB = tall_product(dy2, h).mul_(s)
        if need_A:
            dA = tall_product(x2, g).t()
        if need_x:
            folded = source is None and folding_pays(dy2.shape[0], B.shape[0], dy.dtype, dense)
            W = fold(weight, A, B, s, dense) if folded else dense(weight) if dense else weight
            dx = product(dy2, W.t())  # T d_in
            del W
            if source is not None:
                add_masked_(dx, g, A, same_keep_mask_for(source, dx.shape, ctx.p))
            elif not folded:
                dx.addmm_(g, A)
            dx = dx.view(*dy.shape[:-1], A.shape[1]).to(ctx.x_dtype)
        if need_bias:
            dbias = dy2.sum(0)
        return dx, None, dbias, dA, dB, None, None, None, None, None


def add_masked_(dx: Tensor, g: Tensor, A: Tensor, keep: Tensor) -> None:
    """Adds keep * (g A), (T, d_in), to dx; on a CPU block by block, so that g A and the mask as numbers cost little memory."""
    T = len(dx)
    step = max(1, BLOCK // dx.shape[1]) if dx.device.type == "cpu" else max(1, T)
    for start in range(0, T, step):
        rows = slice(start, start + step)
        dx[rows].addcmul_(g[rows] @ A, keep[rows].to(dx.dtype))


# --- which way to multiply ------------------------------------------------------------------------------------------
#
# Without dropout, x W^T + s (x A^T) B^T is also x (W + s B A)^T, and likewise in the backward (Cherniuk et al., "Run
# LoRA Run", arXiv 2312.03415). Both do T r (d_in + d_out) multiplications in all for h and g, which the gradients of A
# and B need anyway. Beyond those, adding the thin product touches each element of the output twice (2 T d_out in the
# forward, 2 T d_in in the backward), and folding touches each element of W: three times when a copy must be made, twice
# when W has just been dequantised into a buffer of our own. Rank multiplies both sides alike, so the choice is one of T
# against the width summed over. Forward and backward measured on two CPU cores at r=16 and widths 384 and 768: with a copy
# folding is 6 to 11 % slower at once the width or less, even from twice on and up to 4 % faster at five times; in a buffer
# it is up to 3 % slower at once, even from 1.5 times on. 16-bit weights are never folded: W + s B A rounded to 16 bits
# loses most of a small update.


def folding_pays(tokens: int, width: int, dtype: torch.dtype, dense: Callable | None) -> bool:
    """Whether x (W + s B A)^T is cheaper than two products, for `tokens` rows summed over `width`."""
    return dtype in (torch.float32, torch.float64) and tokens > width * (1.5 if dense else 2)


def fold(weight: Tensor, A: Tensor, B: Tensor, scaling: float, dense: Callable[[Tensor], Tensor] | None) -> Tensor:
    """W + scaling * B A, (d_out, d_in), in a new tensor: in the one that `dense` makes, if it is given."""
    return dense(weight).addmm_(B, A, alpha=scaling) if dense else torch.addmm(weight, B, A, alpha=scaling)
