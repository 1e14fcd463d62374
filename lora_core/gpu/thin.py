"""The thin products of LoRA on a GPU: T tokens, widths d, ranks r, with r far below T and d.

    narrow(x, A, keep)   x A^T, of x with what `keep` drops made zero
    add(y, h, B, s)      y + s h B^T
    tall(x, g)           x^T g
    gradients(...)       those of `narrow`

x and y may have 16 bits where A, B and h have 32: the products are then computed in 32, and their sums rounded once.

A GPU multiplies bfloat16 many times faster than float32, and a float32 copy of a large x takes longer than the product. So
where x is large and bfloat16, the other factor is taken apart into two halves of bfloat16, high + low, which hold 16 of its
24 bits. Products of two bfloat16 numbers are exact in float32, in which they are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements of x from which halves pay for the calls that they cost: before, the calls take longer than the GPU works.
LARGE = 2**24

#: Whether torch can write the product of two bfloat16 matrices as float32: from 2.8 on, on CUDA. On ROCm, whose devices are
#: "cuda" too, the first versions that have the function raise (sgl-project/sglang, pull request 34681).
_WRITES_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, (T, d), as `narrow` and `tall` read it best with others of `dtype`."""
    return x if in_halves(x, dtype) else x.to(dtype)


def narrow(x: Tensor, A: Tensor, keep: Tensor | None = None) -> Tensor:
    """x A^T, (T, r), in the dtype of A, (r, d), for x, (T, d), times the mask `keep`, (T, d), of ones and zeros."""
    x = x if keep is None else dropped(x, keep)
    if in_halves(x, A.dtype):
        return float32_product(x, halves(A).flatten(0, 1).t()).view(len(x), 2, len(A)).sum(1)
    return x.to(A.dtype) @ A.t()


def add(y: Tensor, h: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """y + s h B^T, (T, d), for h, (T, r), and B, (d, r), of one dtype, rounded once to `dtype`; y may be overwritten."""
    if y.dtype == B.dtype:
        return y.addmm_(h, B.t(), alpha=s).to(dtype)
    update = h @ B.t()  # T d; a product of 16 bits that adds to y would be rounded before the sum is
    return y.add_(update, alpha=s) if dtype == y.dtype else torch.add(y, update, alpha=s).to(dtype)


def tall(x: Tensor, g: Tensor) -> Tensor:
    """x^T g, (d, r), in the dtype of g, (T, r), for x, (T, d)."""
    return tall_transposed(x, g).t() if in_halves(x, g.dtype) else x.to(g.dtype).t() @ g


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
    dA = None if x is None else tall_transposed(x if keep is None else dropped(x, keep), g)
    if dx is None or keep is None:
        return dA, None if dx is None else add(dx, g, A.t(), 1.0, dtype)
    update = g @ A  # T d
    return dA, dx.addcmul_(update, keep) if dtype == dx.dtype else torch.addcmul(dx, update, keep).to(dtype)


def tall_transposed(x: Tensor, g: Tensor) -> Tensor:
    """g^T x, (r, d), as `tall`."""
    if in_halves(x, g.dtype):
        return float32_product(halves(g.t()).flatten(0, 1), x).view(2, g.shape[1], x.shape[1]).sum(0)
    return g.t() @ x.to(g.dtype)


def dropped(x: Tensor, keep: Tensor) -> Tensor:
    """keep * x, a new tensor."""
    return torch.addcmul(x.new_zeros(()), x, keep)


# --- in halves --------------------------------------------------------------------------------------------------------


def in_halves(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x, (T, d), is multiplied as it is, by the halves of a factor of `dtype`."""
    return x.dtype == torch.bfloat16 and dtype == torch.float32 and x.numel() >= LARGE and x.is_cuda and _WRITES_FLOAT32


def halves(a: Tensor) -> Tensor:
    """high and low, (2, ...), of bfloat16, whose sum is a, of float32, to 2^-17 of each element."""
    both = torch.empty(2, *a.shape, dtype=torch.bfloat16, device=a.device)
    torch.sub(a, both[0].copy_(a), out=both[1])
    return both


def float32_product(x: Tensor, y: Tensor) -> Tensor:
    """x y in float32, of matrices of bfloat16, as they are."""
    return torch.mm(x, y, out_dtype=torch.float32)
