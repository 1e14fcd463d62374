"""Something that code multiplies by in the place of a tensor, and that is not made for it.

A subclass says what it is once it is a tensor (`dense`), what is known of that without making it (`like`), and how the
products with it are made. torch asks it in each of its functions that meet it (`__torch_function__`); whatever is no product is
done with the tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: What torch's products call their two operands, in order.
_OPERANDS = ("input", "weight", "other", "mat2")
#: What is known without making the tensor.
_KNOWN = frozenset({"device", "dim", "dtype", "is_cpu", "is_cuda", "ndim", "numel", "shape", "size"})
#: {name of a function of torch: which of the products of a stand-in it is}.
_PRODUCTS = {
    "linear": "linear",
    "matmul": "matmul",
    "__matmul__": "matmul",
    "bmm": "matmul",
    "grouped_mm": "grouped",
    "_grouped_mm": "grouped",
    "grouped_mm_fallback": "grouped",  # transformers' own
}


class StandIn(ABC):
    """What stands in the place of a tensor M, (..., p, q)."""

    #: A tensor, or another stand-in, of the shape, dtype and device of M.
    like: ClassVar[Any]

    @abstractmethod
    def dense(self) -> Tensor:
        """M."""

    @property
    @abstractmethod
    def mT(self) -> StandIn:
        """M with its last two dimensions swapped."""

    @abstractmethod
    def one(self, index: int | Tensor) -> StandIn:
        """The matrix of a stack that an index names, or those that several name, (..., p, q)."""

    # Each product gives NotImplemented for what it does not know.

    @abstractmethod
    def linear(self, func: Callable, x: Tensor, bias: Tensor | None) -> Any:
        """x M^T + b, of one matrix."""

    @abstractmethod
    def times(self, func: Callable, x: Tensor, first: bool) -> Any:
        """M x if M stands `first`, else x M."""

    @abstractmethod
    def grouped(self, func: Callable, x: Tensor, offs: Tensor) -> Any:
        """The rows of x up to the first of `offs` by the first matrix, those up to the next by the next one: S p -> S q."""

    def transpose(self, a: int, b: int) -> StandIn | Tensor:
        n = self.like.dim()
        return self.mT if {a % n, b % n} == {n - 2, n - 1} else self.dense().transpose(a, b)

    def __getitem__(self, index: Any) -> StandIn | Tensor:
        whole = not isinstance(index, Tensor) or index.dtype in (torch.int32, torch.int64)
        if self.like.dim() == 2 or not isinstance(index, (int, Tensor)) or isinstance(index, bool) or not whole:
            return self.dense()[index]
        return self.one(index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like if name in _KNOWN else self.dense(), name)

    def __len__(self) -> int:
        return len(self.like)

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(self, x)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        operands = [*args, *(named.pop(name) for name in _OPERANDS if name in named)]
        product = _PRODUCTS.get(getattr(func, "__name__", ""))
        result = _product(product, func, operands, named) if product and len(operands) > 1 else NotImplemented
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, StandIn) else a, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _product(name: str, func: Callable, operands: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """The product of the first two operands, one of which is a stand-in."""
    x, M, *rest = operands
    if isinstance(x, StandIn) == isinstance(M, StandIn) or not isinstance(M if isinstance(x, StandIn) else x, Tensor):
        return NotImplemented
    if name == "matmul":
        if isinstance(x, StandIn):
            return x.times(func, M, first=True) if M.dim() > 1 else NotImplemented
        # One vector by a stack is broadcast: its products would be matrices.
        return M.times(func, x, first=False) if x.dim() > 1 or M.like.dim() == 2 else NotImplemented
    if isinstance(x, StandIn):
        return NotImplemented
    others = dict(named)
    extra = rest[0] if rest else others.pop("bias" if name == "linear" else "offs", None)
    if len(rest) > 1 or any(value is not None for value in others.values()):
        return NotImplemented
    if name == "linear":
        return M.linear(func, x, extra) if M.like.dim() == 2 else NotImplemented
    return NotImplemented if extra is None else M.grouped(func, x, extra)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.dense(), name)(*others)


# Python asks the class for these, and not `__getattr__`.
_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "abs")
for _name in (*_ARITHMETIC, "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(StandIn, f"__{_name}__", _operator(f"__{_name}__"))
