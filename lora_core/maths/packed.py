"""A packed weight as something that code multiplies by: made dense for each product, and again for its gradient, never kept.

    M = PackedWeight(like, unpack)       # unpack(None): W, (E, p, q);  unpack(3): the one matrix number 3, (p, q)
    x @ M[3]                             # one matrix is made dense, and dropped again

A forward that multiplies by a parameter, as that of fused experts does, would keep all of it dense for the backward: what
packing has won would be lost in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cpu.dropout import first_derivative_only
from .lora import autocast_dtype
from .standin import StandIn

#: From which matrix of a stack (None: all of them, a tensor: several) to its dense values, a new tensor.
Unpack = Callable[[int | Tensor | None], Tensor]


class PackedWeight(StandIn):
    """W, frozen.

    Args:
        like: a tensor of the shape, dtype and device of W, whose values are not read.
        unpack: what makes it dense.
        dtype: what products are computed in, which come out in that of x; None: in that too. Autocast goes before it.
        index: of a matrix of the stack, which is then what this is; or of several.
        flipped: whether it is that with its last two dimensions swapped.
    """

    def __init__(
        self,
        like: Tensor,
        unpack: Unpack,
        dtype: torch.dtype | None = None,
        index: int | Tensor | None = None,
        flipped: bool = False,
    ) -> None:
        self.like, self.unpack, self.compute_dtype, self.index, self.flipped = like, unpack, dtype, index, flipped

    def dense(self) -> Tensor:
        """A new tensor each time."""
        W = self.unpack(self.index)
        return W.mT if self.flipped else W

    @property
    def mT(self) -> PackedWeight:
        return PackedWeight(self.like.mT, self.unpack, self.compute_dtype, self.index, not self.flipped)

    def one(self, index: int | Tensor) -> PackedWeight | Tensor:
        if self.index is not None:
            return self.dense()[index]
        several = isinstance(index, Tensor) and index.dim()
        like = self.like[0].expand(*index.shape, *self.like.shape[1:]) if several else self.like[index]
        index = index if several else range(len(self.like))[int(index)]  # from the front, if it was from the end
        return PackedWeight(like, self.unpack, self.compute_dtype, index, self.flipped)

    def linear(self, func: Callable, x: Tensor, bias: Tensor | None) -> Tensor:  # ... q -> ... p
        return self._frozen(x, lambda x, W: func(x, W), torch.matmul, bias)

    def times(self, func: Callable, x: Tensor, first: bool) -> Tensor:
        if first:
            return self._frozen(x, lambda x, W: func(W, x), lambda dy, W: W.mT @ dy)
        return self._frozen(x, func, lambda dy, W: dy @ W.mT)

    def grouped(self, func: Callable, x: Tensor, offs: Tensor) -> Tensor:  # S p -> S q
        return self._frozen(x, lambda x, W: func(x, W, offs=offs), lambda dy, W: func(dy, W.mT, offs=offs))

    def _frozen(self, x: Tensor, forward: Callable, backward: Callable, bias: Tensor | None = None) -> Tensor:
        auto = torch.is_autocast_enabled(x.device.type)
        dtype = autocast_dtype(x) if auto else self.compute_dtype or x.dtype
        y = _Frozen.apply(x.to(dtype), self, forward, backward)
        y = y if bias is None else y + bias.to(dtype)
        return y if auto else y.to(x.dtype)


class _Frozen(torch.autograd.Function):
    """forward(x, W), which is linear in x, and backward(dy, W), which is its gradient for x."""

    @staticmethod
    def forward(ctx, x, M, forward, backward):
        ctx.M, ctx.backward_product, ctx.shape = M, backward, x.shape
        return forward(x, M.dense().to(x.dtype))

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        dx = ctx.backward_product(dy, ctx.M.dense().to(dy.dtype))
        return dx.sum_to_size(ctx.shape), None, None, None  # where x was broadcast over a stack
