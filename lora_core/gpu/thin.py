"""The thin products of LoRA on a GPU: T tokens, widths d, ranks r, with r far below T and d.

    narrow(x, A, keep)   x A^T, of x with what `keep` drops made zero
    add(y, h, B, s)      y + s h B^T
    tall(x, g)           x^T g
    gradients(...)       those of `narrow`

x and y may have 16 bits where A, B and h have 32: the products are then computed in 32, and their sums rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, (T, d), as `narrow` and `tall` read it best with others of `dtype`."""
    return x.to(dtype)


def narrow(x: Tensor, A: Tensor, keep: Tensor | None = None) -> Tensor:
    """x A^T, (T, r), in the dtype of A, (r, d), for x, (T, d), times the mask `keep`, (T, d), of ones and zeros."""
    return (x if keep is None else dropped(x, keep)).to(A.dtype) @ A.t()


def add(y: Tensor, h: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """y + s h B^T, (T, d), for h, (T, r), and B, (d, r), of one dtype, rounded once to `dtype`; y may be overwritten."""
    if y.dtype == B.dtype:
        return y.addmm_(h, B.t(), alpha=s).to(dtype)
    update = h @ B.t()  # T d
    return y.add_(update, alpha=s) if dtype == y.dtype else torch.add(y, update, alpha=s).to(dtype)


def tall(x: Tensor, g: Tensor) -> Tensor:
    """x^T g, (d, r), in the dtype of g, (T, r), for x, (T, d)."""
    return x.to(g.dtype).t() @ g


def gradients(
    x: Tensor | None, dx: Tensor | None, g: Tensor, A: Tensor, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `narrow`, for that of its result, g, (T, r).

    Args:
        x: (T, d), or None if A needs no gradient.
        dx: (T, d), to which the gradient of x is added, or None if it needs none. It may be overwritten.
        dtype: what the sum in dx is rounded to.

    Returns:
        The gradient of A, (r, d), and dx with that of x added.
    """
    dA = None if x is None else g.t() @ (x if keep is None else dropped(x, keep)).to(g.dtype)
    if dx is None or keep is None:
        return dA, None if dx is None else add(dx, g, A.t(), 1.0, dtype)
    update = g @ A  # T d
    return dA, dx.addcmul_(update, keep) if dtype == dx.dtype else torch.addcmul(dx, update, keep).to(dtype)


def dropped(x: Tensor, keep: Tensor) -> Tensor:
    """keep * x, a new tensor."""
    return torch.addcmul(x.new_zeros(()), x, keep)
