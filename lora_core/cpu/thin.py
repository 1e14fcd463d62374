"""The thin products of LoRA on a CPU; `gpu/thin.py` has the same functions, and says what they compute.

Masks are applied to blocks of rows that stay in a core's cache. What is wider than the base is cast once, as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.jit import is_tracing

from .products import cast, tall_product

#: Elements of a block of rows that is masked at a time: 2 MiB of float32.
BLOCK = 2**19


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(x, dtype)


def narrow(x: Tensor, A: Tensor, keep: Tensor | None = None) -> Tensor:  # T d, r d -> T r
    if keep is None:
        return cast(x, A.dtype) @ A.t()
    h = A.new_empty(len(x), len(A))
    for rows in blocks(x):
        torch.mm(dropped(x[rows], keep[rows].to(A.dtype)), A.t(), out=h[rows])
    return h


def add(y: Tensor, h: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:  # T d, T r, d r -> T d
    return cast(cast(y, B.dtype).addmm_(h, B.t(), alpha=s), dtype)


def is_one_token(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `add_to_token` serves for x, (..., d), and an update in `dtype`.

    Vectors of 16 bits are left to the other functions, and so are a program that `torch.jit.trace` makes for more tokens, and
    kinds of tensors that may have no product with a vector, such as DTensor.
    """
    return not is_tracing() and x.numel() == x.shape[-1] and x.is_cpu and type(x) is Tensor and dtype.itemsize >= 4


def add_to_token(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """y + s x A^T B^T, (..., d_out), for x, (..., d_in), of one token, rounded once to `dtype`; y may be overwritten.

    Beside one token the time is that of the calls, and calls with vectors are cheaper.
    """
    y = cast(y, B.dtype)
    y.view(-1).addmv_(B, A.mv(cast(x, A.dtype).reshape(-1)), alpha=s)
    return cast(y, dtype)


def tall(x: Tensor, g: Tensor) -> Tensor:  # T d, T r -> d r
    return tall_product(cast(x, g.dtype), g)


def gradients(
    x: Tensor | None, dx: Tensor | None, g: Tensor, A: Tensor, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    dx = None if dx is None else cast(dx, A.dtype)
    if keep is None:
        dA = None if x is None else tall(x, g).t()
        dx = None if dx is None else dx.addmm_(g, A)
    else:
        sums = torch.promote_types(A.dtype, torch.float32)  # in 16 bits each block would be rounded
        dA = None if x is None else A.new_zeros(A.shape[1], A.shape[0], dtype=sums)  # d r
        for rows in blocks(keep):
            mask = keep[rows].to(A.dtype)
            if dx is not None:
                dx[rows].addcmul_(g[rows] @ A, mask)
            if dA is not None:
                dA += tall_product(dropped(x[rows], mask), g[rows])
        dA = None if dA is None else dA.t().to(A.dtype)
    return dA, None if dx is None else cast(dx, dtype)


def dropped(x: Tensor, mask: Tensor) -> Tensor:
    """mask * x, in the place of the mask, in its dtype. Two dtypes in one operation would take ten times as long."""
    return mask.mul_(cast(x, mask.dtype))


def blocks(x: Tensor) -> Iterator[slice]:
    """The rows of x, (T, d), in blocks: so small that one stays in a core's cache, and costs little memory."""
    T, d = x.shape
    step = max(1, BLOCK // max(d, 1))
    return (slice(start, start + step) for start in range(0, T, step))
