"""A weight that is simply there, in a dtype of its own. What no other base holds is held so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from .base import Base, Format, plain_linear
from .forwards import stored_weight


@dataclass(frozen=True)
class DenseFormat(Format):
    """A weight in `dtype`: "float32"."""

    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @classmethod
    def parse(cls, text: str) -> DenseFormat | None:
        dtype = getattr(torch, text, None)
        return cls(dtype) if isinstance(dtype, torch.dtype) else None


class Dense(Base):
    """Weights of any dtype and shape."""

    name, label, packed = "dense", "dense", False
    Format = DenseFormat

    def holds(self, weight: Any) -> bool:
        return isinstance(weight, Tensor)

    def format_of(self, layer: nn.Module) -> DenseFormat:
        return DenseFormat(layer.weight.dtype)

    def shape_of(self, weight: Tensor) -> torch.Size:
        return weight.shape

    def parts(self, layer: nn.Module) -> list[Tensor]:
        return [stored_weight(layer)]

    def state(self, layer: nn.Module) -> dict[str, Tensor]:
        return {"weight": stored_weight(layer).detach()}

    def nbytes(self, weight: Tensor) -> int:
        return weight.nbytes

    def dequantizer(self, layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return methodcaller("to", dtype, copy=True)

    def dense(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return stored_weight(layer).detach().to(dtype, copy=True)

    def to_dense(self, layer: nn.Module) -> nn.Linear:
        """The new layer shares the weight."""
        return plain_linear(layer, layer.weight)

    def dense_dtype(self, layer: nn.Module) -> torch.dtype:
        return layer.weight.dtype

    def set_dense_dtype(self, layer: nn.Module, dtype: torch.dtype) -> None:
        layer.weight.data = layer.weight.data.to(dtype)

    def pack(self, linear: nn.Linear, form: Format, compute_dtype: torch.dtype | None = None) -> nn.Module:
        raise StateError("a dense format packs nothing")

    def repack(self, layer: nn.Module, W: Tensor) -> nn.Parameter:
        return nn.Parameter(W.to(layer.weight.dtype), requires_grad=False)

    def quantization_config(self, form: Format, skipped: Sequence[str], compute_dtype: str) -> dict[str, Any]:
        return {}
