"""W + s L R as something that code multiplies by, and that is not added up for it.

    M = UpdatedWeight(W, L, R, s)        W: (..., p, q);  L: (..., p, k);  R: (..., k, q), with the same leading dimensions
    x @ M                                x W + s (x L) R, in two thin products more than x W
    M[3], M.mT                           the same of one matrix of a stack, and transposed

Where code multiplies by a parameter itself, as the forward of fused experts does, the sum would have to be made for each
forward: a copy of all experts, of which a token needs a few, kept for the backward together with a dense gradient of that size.
So such code is given this object in place of the parameter (see `standin.py`): the products below are taken apart, and whatever
else is done with it is done with the sum. W may be packed, and is then a stand-in itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .lora import lora_linear, update_dtype
from .standin import StandIn


class UpdatedWeight(StandIn):
    """W + s L R.

    Args:
        W: (..., p, q), frozen.
        L: (..., p, k), with gradients.
        R: (..., k, q), with gradients.
        scaling: s.
    """

    def __init__(self, W: Tensor | StandIn, L: Tensor, R: Tensor, scaling: float) -> None:
        self.W = self.like = W
        self.L, self.R, self.scaling = L, R, scaling
        self._dense: Tensor | None = None
        self._each: list[tuple[Tensor, Tensor]] = []

    def dense(self) -> Tensor:
        """The sum, in the dtype of W: in 16 bits it is rounded to that. Made once; one without gradients is not kept."""
        if not torch.is_grad_enabled():
            return self._added()
        if self._dense is None:
            self._dense = self._added()
        return self._dense

    def _added(self) -> Tensor:
        W = self.W.dense() if isinstance(self.W, StandIn) else self.W
        return added(W, self.L, self.R, self.scaling)

    def thin(self, x: Tensor) -> Tensor:  # ... p -> ... q
        """s (x L) R, in the dtype of the update."""
        dtype = update_dtype(x, self.L)
        return self.scaling * (x.to(dtype) @ self.L.to(dtype) @ self.R.to(dtype))

    @property
    def mT(self) -> UpdatedWeight:
        return UpdatedWeight(self.W.mT, self.R.mT, self.L.mT, self.scaling)

    def one(self, index: int | Tensor) -> UpdatedWeight:
        if (isinstance(index, Tensor) and index.dim()) or not torch.is_grad_enabled():
            return UpdatedWeight(self.W[index], self.L[index], self.R[index], self.scaling)
        if not self._each:  # all at once: then they have one backward, and not each one of the size of all
            self._each = list(zip(self.L.unbind(), self.R.unbind(), strict=True))
        return UpdatedWeight(self.W[index], *self._each[int(index)], self.scaling)

    def linear(self, func: Callable, x: Tensor, bias: Tensor | None) -> Tensor:  # ... q -> ... p
        if not isinstance(self.W, StandIn):
            return lora_linear(x, self.W, bias, self.R, self.L, self.scaling)
        y = func(x, self.W, bias)
        return (y + self.mT.thin(x)).to(y.dtype)

    def times(self, func: Callable, x: Tensor, first: bool) -> Tensor:
        y = func(self.W, x) if first else func(x, self.W)
        return (y + (self.mT.thin(x.mT).mT if first else self.thin(x))).to(y.dtype)

    def grouped(self, func: Callable, x: Tensor, offs: Tensor) -> Tensor:  # S p -> S q
        y, ends = func(x, self.W, offs=offs), offs.tolist()
        counts = [end - start for start, end in zip([0, *ends], [*ends, len(x)], strict=True)]  # the last one: of no matrix
        used = [i for i, count in enumerate(counts) if count]
        parts = zip(used, x.split([counts[i] for i in used]), strict=True) if used else ()
        thin = [self[i].thin(part) if i < len(self) else part.new_zeros(len(part), y.shape[-1]) for i, part in parts]
        return (y + torch.cat(thin)).to(y.dtype) if thin else y


def added(W: Tensor, L: Tensor, R: Tensor, scaling: float) -> Tensor:
    """W + s L R, (..., p, q), in the dtype of W, with gradients for L and R."""
    dtype = torch.promote_types(W.dtype, L.dtype)
    with torch.autocast(W.device.type, enabled=False):
        L, R = L.to(dtype), R.to(dtype)
        if dtype == W.dtype:
            return (torch.addmm if W.dim() == 2 else torch.baddbmm)(W, L, R, alpha=scaling)
        return (scaling * (L @ R)).add_(W).to(W.dtype)
