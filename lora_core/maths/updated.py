"""W + s L R as something that code multiplies by, and that is not added up for it.

    M = UpdatedWeight(W, L, R, s)        W: (..., p, q);  L: (..., p, k);  R: (..., k, q), with the same leading dimensions
    x @ M                                x W + s (x L) R, in two thin products more than x W
    M[3], M.mT                           the same of one matrix of a stack, and transposed

Where code multiplies by a parameter itself, as the forward of fused experts does, the sum would have to be made for each
forward: a copy of all experts, of which a token needs a few, kept for the backward together with a dense gradient of that size.
So such code is given this object in place of the parameter. torch asks it in each of its functions that meet it
(`__torch_function__`): the products below are taken apart; whatever else is done with it is done with the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .lora import lora_linear, update_dtype

#: What torch's products call their two operands, in order.
_OPERANDS = ("input", "weight", "other", "mat2")
#: What the sum has in common with W.
_LIKE_W = frozenset({"device", "dim", "dtype", "is_cpu", "is_cuda", "ndim", "numel", "shape", "size"})


class UpdatedWeight:
    """W + s L R.

    Args:
        W: (..., p, q), frozen.
        L: (..., p, k), with gradients.
        R: (..., k, q), with gradients.
        scaling: s.
    """

    def __init__(self, W: Tensor, L: Tensor, R: Tensor, scaling: float) -> None:
        self.W, self.L, self.R, self.scaling = W, L, R, scaling
        self._dense: Tensor | None = None
        self._each: list[tuple[Tensor, Tensor]] = []

    def dense(self) -> Tensor:
        """The sum, in the dtype of W: in 16 bits it is rounded to that. Made once; one without gradients is not kept."""
        if not torch.is_grad_enabled():
            return added(self.W, self.L, self.R, self.scaling)
        if self._dense is None:
            self._dense = added(self.W, self.L, self.R, self.scaling)
        return self._dense

    def thin(self, x: Tensor) -> Tensor:  # ... p -> ... q
        """s (x L) R, in the dtype of the update."""
        dtype = update_dtype(x, self.L)
        return self.scaling * (x.to(dtype) @ self.L.to(dtype) @ self.R.to(dtype))

    @property
    def mT(self) -> UpdatedWeight:
        return UpdatedWeight(self.W.mT, self.R.mT, self.L.mT, self.scaling)

    def transpose(self, a: int, b: int) -> UpdatedWeight | Tensor:
        n = self.W.dim()
        return self.mT if {a % n, b % n} == {n - 2, n - 1} else self.dense().transpose(a, b)

    def __getitem__(self, index: Any) -> UpdatedWeight | Tensor:
        whole = not isinstance(index, Tensor) or index.dtype in (torch.int32, torch.int64)
        if self.W.dim() == 2 or not isinstance(index, (int, Tensor)) or isinstance(index, bool) or not whole:
            return self.dense()[index]
        if (isinstance(index, Tensor) and index.dim()) or not torch.is_grad_enabled():
            return UpdatedWeight(self.W[index], self.L[index], self.R[index], self.scaling)
        if not self._each:  # all at once: then they have one backward, and not each one of the size of all
            self._each = list(zip(self.L.unbind(), self.R.unbind(), strict=True))
        return UpdatedWeight(self.W[index], *self._each[int(index)], self.scaling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.W if name in _LIKE_W else self.dense(), name)

    def __len__(self) -> int:
        return len(self.W)

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(self, x)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product, named = _PRODUCTS.get(getattr(func, "__name__", "")), dict(kwargs)
        operands = [named.pop(name) for name in _OPERANDS if name in named]
        result = product(func, *args, *operands, **named) if product else NotImplemented
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, UpdatedWeight) else a, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.dense(), name)(*others)


# Python asks the class for these, and not `__getattr__`.
_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "abs")
for _name in (*_ARITHMETIC, "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(UpdatedWeight, f"__{_name}__", _operator(f"__{_name}__"))


def added(W: Tensor, L: Tensor, R: Tensor, scaling: float) -> Tensor:
    """W + s L R, (..., p, q), in the dtype of W, with gradients for L and R."""
    dtype = torch.promote_types(W.dtype, L.dtype)
    with torch.autocast(W.device.type, enabled=False):
        L, R = L.to(dtype), R.to(dtype)
        if dtype == W.dtype:
            return (torch.addmm if W.dim() == 2 else torch.baddbmm)(W, L, R, alpha=scaling)
        return (scaling * (L @ R)).add_(W).to(W.dtype)


# --- products: each gives NotImplemented for what it does not know ----------------------------------------------------


def _linear(func: Callable, x: Any, M: Any, bias: Tensor | None = None) -> Any:  # ... q -> ... p
    if not isinstance(M, UpdatedWeight) or M.W.dim() != 2 or isinstance(x, UpdatedWeight):
        return NotImplemented
    return lora_linear(x, M.W, bias, M.R, M.L, M.scaling)


def _matmul(func: Callable, x: Any, M: Any) -> Any:
    if isinstance(M, UpdatedWeight) and isinstance(x, Tensor):  # ... p -> ... q
        if x.dim() == 1 and M.W.dim() > 2:  # one vector by a stack: broadcast, its products would be matrices
            return NotImplemented
        y, update = func(x, M.W), M.thin
    elif isinstance(x, UpdatedWeight) and isinstance(M, Tensor) and M.dim() > 1:  # the matrix stands before the vectors
        x, M = M, x
        y, update = func(M.W, x), lambda x: M.mT.thin(x.mT).mT
    else:
        return NotImplemented
    return (y + update(x)).to(y.dtype)


def _grouped(func: Callable, x: Any, M: Any, offs: Tensor | None = None, **others: Any) -> Any:  # S p -> S q
    """The rows of x up to the first of `offs` by the first matrix, those up to the next by the next one."""
    if not isinstance(M, UpdatedWeight) or offs is None or any(value is not None for value in others.values()):
        return NotImplemented
    y, ends = func(x, M.W, offs=offs), offs.tolist()
    counts = [end - start for start, end in zip([0, *ends], [*ends, len(x)], strict=True)]  # the last one: of no matrix
    used = [i for i, count in enumerate(counts) if count]
    parts = zip(used, x.split([counts[i] for i in used]), strict=True) if used else ()
    thin = [M[i].thin(part) if i < len(M) else part.new_zeros(len(part), y.shape[-1]) for i, part in parts]
    return (y + torch.cat(thin)).to(y.dtype) if thin else y


_PRODUCTS = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "bmm": _matmul,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,  # transformers' own
}
