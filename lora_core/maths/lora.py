"""The maths of LoRA on plain tensors: no modules, no names, no state.

A LoRA linear layer computes (Hu et al., arXiv 2106.09685, equation 3)

    y = x W^T + b + s dropout(x) A^T B^T        W: (d_out, d_in) frozen;  A: (r, d_in) and B: (d_out, r) trained

and, with g = s dy B, its gradients are

    dx = dy W + dropout'(g A)        dA = g^T dropout(x)        dB = s dy^T (dropout(x) A^T)

Written as separate autograd operations this makes several passes over tensors of the size of x and y, and autograd
keeps copies of them. `lora_linear` is one autograd function instead. For the backward it keeps x,
which is one tensor for all layers that read it; the thin product dropout(x) A^T; and the seed of the dropout's mask. The update
is added into the base layer's output in place, dx is built in one buffer, and no gradient for W is computed.

Beside a 16-bit or 4-bit base A and B are float32. The base's product is computed in the base's dtype, as without an adapter;
the update, and the gradients of A and B, in float32; and their sums are rounded once, to the dtype that the base gives.

Shapes below: T tokens (the leading dimensions of x, flattened), d_in, d_out, r.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu import thin as cpu_thin
from ..cpu.dropout import KeepMask, draw_keep_mask, first_derivative_only, plain_dropout, same_keep_mask
from ..cpu.masks import same_shared_mask
from ..cpu.products import cast, product
from ..cpu.traced import is_traced, made_again
from ..gpu import thin as gpu_thin

Draw = Callable[[Tensor, float], KeepMask]


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
    draw: Draw | None = None,
) -> Tensor:
    """A linear layer with a low-rank update: x W^T + b + scaling * dropout(x) A^T B^T.

    Args:
        x: input, (..., d_in), floating point.
        weight: W, (d_out, d_in), or what `dense` turns into that (packed 4-bit values).
        bias: b, (d_out,), or None.
        lora_A: A, (r, d_in), of any float dtype. The update is computed in autocast's dtype if that is on, else in the wider
            of this and that of x.
        lora_B: B, (d_out, r), likewise.
        scaling: the factor before the update, a number (lora_alpha / r).
        dropout: probability with which an element of x is zeroed before A; 0 when not training. It is rounded as `dropout.py`
            says, and drawn from torch's generator for x's device.
        dense: makes W of `weight`, a new tensor in the dtype of the computation; called in the forward and again in the
            backward, so that only the packed form is kept in between.
        dtype: what the base's product is computed in; None: autocast's dtype if that is on, else that of x.
        linear: how the base layer multiplies in the forward: `F.linear`, or `products.product`.
        draw: gives the dropout mask for (x, dropout), where several layers share one; None: each call draws its own.

    Returns:
        y, (..., d_out), in autocast's dtype or that of x.
    """
    result = autocast_dtype(x)
    if dtype is None:
        dtype = result
        if dense is None and weight.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            dense = methodcaller("to", dtype)  # the cast copy of W is not kept for the backward either
    bias = None if bias is None else cast(bias, dtype)
    wide = result
    if lora_A.dtype != result or lora_B.dtype != result:
        wide = update_dtype(x, lora_A)
        lora_A, lora_B = cast(lora_A, wide), cast(lora_B, wide)
    if is_traced() or weight.requires_grad or _is_watched():  # ours has no gradient for W
        W = made_again(dense, weight) if dense else weight
        y = F.linear(x.to(dtype), W, bias)
        return (y + lora_product(x, lora_A, lora_B, scaling, dropout)).to(result)
    mask = None
    if dropout:
        mask = draw(x, dropout) if draw else draw_keep_mask((x.numel() // x.shape[-1], x.shape[-1]), dropout, x.device)
    if not torch.is_grad_enabled():  # nothing is to be kept, and a call of an autograd function is dear beside one token
        if mask is None and cpu_thin.is_one_token(x, wide):
            y = linear(cast(x, dtype), dense(weight) if dense else weight, bias)
            return cpu_thin.add_to_token(y, x, lora_A, lora_B, scaling, result)
        return _fused(x, weight, bias, lora_A, lora_B, scaling, mask, dense, dtype, result, linear)[0]
    return _LoraLinear.apply(
        x, weight, bias, lora_A, lora_B, scaling, mask, dropout, dense, dtype, result, linear, draw is not None
    )


def _is_watched() -> bool:
    """Whether a mode of torch sees each operation, as selective checkpointing does, which must not find results changed."""
    return torch._C._len_torch_dispatch_stack() > 0


def fold_(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Folds an adapter into W, (d_out, d_in), in place: W + s B A. Returns W. With a leading dimension, E of them at once."""
    add = W.addmm_ if W.dim() == 2 else W.baddbmm_
    return add(B.to(W.dtype), A.to(W.dtype), alpha=scaling)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x is computed in: autocast's if that is on, which leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def update_dtype(x: Tensor, factor: Tensor) -> torch.dtype:
    """What the update of x by A and B is computed in: autocast's dtype if that is on, else the wider of theirs."""
    if x.is_floating_point() and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, factor.dtype)


def lora_product(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """The update alone, in plain operations: scaling * dropout(x) A^T B^T, (..., d_out), in the dtype of `update_dtype`."""
    dtype = update_dtype(x, lora_A)
    return scaling * (plain_dropout(x.to(dtype), dropout) @ lora_A.to(dtype).t() @ lora_B.to(dtype).t())


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    mask: KeepMask | None,
    dense: Callable | None,
    dtype: torch.dtype,
    result: torch.dtype,
    linear: Callable,
) -> tuple[Tensor, Tensor | None]:
    """y, and dropout(x) A^T, (T, r), without dropout's rescaling, if it was needed."""
    x_cast = cast(x, dtype)  # ... d_in
    x2 = (x_cast if A.dtype == dtype else x).reshape(-1, x.shape[-1])  # T d_in
    if mask:
        s = s / mask.kept  # on one number instead of on every element
    elif A.dtype == dtype and folding_pays(x2, A.shape[1], dense):
        return linear(x_cast, fold(weight, A, B, s, dense), bias).to(result), None
    # The base layer's own call, on x as it came: a fresh adapter (B = 0) then changes no bit of its output.
    y = linear(x_cast, dense(weight) if dense else weight, bias)  # ... d_out
    ways, y2 = thin(x), y.reshape(-1, B.shape[0])  # T d_out
    h = ways.narrow(x2, A, mask.keep if mask else None)
    sums = ways.add(y2, h, B, s, result)
    added = sums is y2 and y.is_contiguous()  # then y2 is a view of y, which has the sums
    return y if added else sums.view(y.shape), h


class _LoraLinear(torch.autograd.Function):
    """The fused form of `lora_linear`; the module docstring has the equations. A and B come in the update's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, s, mask: KeepMask | None, p, dense, dtype, result, linear, shared):
        need_A, need_B = ctx.needs_input_grad[3:5]
        y, h = _fused(x, weight, bias, A, B, s, mask, dense, dtype, result, linear)
        ctx.save_for_backward(
            x if need_A or (need_B and h is None) else None,  # as it came: a cast copy would not be shared
            weight,
            A,
            B,
            h if need_B else None,
            mask.source if mask else None,
        )
        ctx.s = s / mask.kept if mask else s
        ctx.p, ctx.dense, ctx.dtype, ctx.x_dtype = p, dense, dtype, x.dtype
        ctx.same_mask = same_shared_mask if shared else same_keep_mask
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        x, weight, A, B, h, source = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        s, dense, ways = ctx.s, ctx.dense, thin(dy)
        dx = dA = dB = dbias = None
        dy2 = dy.reshape(-1, B.shape[0])  # T d_out
        dy_thin = ways.operand(dy2, A.dtype)
        x2 = None if x is None else x.reshape(-1, A.shape[1])  # T d_in
        g = ways.narrow(dy_thin, B.t()).mul_(s)  # T r
        if need_B:
            h = ways.narrow(x2, A) if h is None else h
            dB = ways.tall(dy_thin, h).mul_(s)
        folded = source is None and A.dtype == ctx.dtype and folding_pays(dy2, B.shape[0], dense)
        if need_x:
            W = fold(weight, A, B, s, dense) if folded else dense(weight) if dense else weight
            dx = product(dy2.to(ctx.dtype), W.t())  # T d_in
            del W
        keep = None if source is None else ctx.same_mask(source, (len(dy2), A.shape[1]), ctx.p, dy.device)
        dA, more = ways.gradients(x2 if need_A else None, None if folded else dx, g, A, keep, ctx.x_dtype)
        if need_x:
            dx = (dx.to(ctx.x_dtype) if folded else more).view(*dy.shape[:-1], A.shape[1])
        if need_bias:
            dbias = dy2.to(ctx.dtype).sum(0)
        return dx, None, dbias, dA, dB, *(None,) * 8


def thin(x: Tensor) -> ModuleType:
    """The thin products that are fast where x is: a module with the functions that `gpu/thin.py` describes."""
    return cpu_thin if x.device.type == "cpu" else gpu_thin


# --- which way to multiply ------------------------------------------------------------------------------------------
#
# Without dropout, x W^T + s (x A^T) B^T is also x (W + s B A)^T, and likewise in the backward (Cherniuk et al., "Run
# LoRA Run", arXiv 2312.03415). Both do T r (d_in + d_out) multiplications in all for h and g, which the gradients of A
# and B need anyway. Beyond those, adding the thin product touches each element of the output twice (2 T d_out in the
# forward, 2 T d_in in the backward), and folding touches each element of W: three times when a copy must be made, twice
# when W has just been dequantised into a buffer of our own. Rank multiplies both sides alike, so the choice is one of T
# against the width summed over; docs/performance.md has the measurements. 16-bit weights are never folded: W + s B A rounded
# to 16 bits loses most of a small update.


def folding_pays(x: Tensor, width: int, dense: Callable | None) -> bool:
    """Whether x (W + s B A)^T is cheaper than two products, for x, (T, d), of full precision, and the `width` summed over."""
    return x.dtype in (torch.float32, torch.float64) and len(x) > width * (1.5 if dense else 2)


def fold(weight: Tensor, A: Tensor, B: Tensor, scaling: float, dense: Callable[[Tensor], Tensor] | None) -> Tensor:
    """W + scaling * B A, (d_out, d_in), in a new tensor: in the one that `dense` makes, if it is given."""
    return dense(weight).addmm_(B, A, alpha=scaling) if dense else torch.addmm(weight, B, A, alpha=scaling)
