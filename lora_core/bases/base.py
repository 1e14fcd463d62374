"""The contract of a base: how a frozen weight is held, and what everybody else may ask of it.

    base = base_of(layer)             # the one that holds its weight: `dense.py` if no other does
    base.dense(layer)                 # W, (d_out, d_in), whatever it is packed in
    str(base.format_of(layer))        # "float32", "nf4/64/double": read again by `parse_format`

A base keeps nothing: all that there is to a weight stands on its layer, so that moving, copying, saving and sharding a model
need no base. A packed weight is made dense for each product, in the forward and again in the backward, and never kept: the
maths (`maths/lora.py`) takes the function that does so. Everything outside of this room asks only what is here; `register_base`
adds another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cpu.products import frozen_linear
from ..errors import StateError
from ..maths.lora import autocast_dtype

#: What weights may be packed from, and products with packed ones be computed in.
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Format(ABC):
    """How a weight is held: all that it takes to hold another in the same way."""

    @abstractmethod
    def __str__(self) -> str:
        """One word, without spaces, as fingerprints have it."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Format | None:
        """The format that prints as `text`; None if it is no format of this kind."""


class Base(ABC):
    """One way to hold a frozen weight of (d_out, d_in).

    Attributes:
        name: what the command line and files call it.
        label: what reports call it.
        Format: the class of its formats; with its defaults, the one that is taken if none is asked for.
        packed: whether a weight has to be made dense to be multiplied by.
        library: the Python package that it needs; None: none besides torch.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    Format: ClassVar[type[Format]]
    packed: ClassVar[bool] = True
    library: ClassVar[str | None] = None

    # --- what a base says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def holds(self, weight: Any) -> bool:
        """Whether a layer's `weight` is held in this way."""

    @abstractmethod
    def format_of(self, layer: nn.Module) -> Format:
        """The format of the layer's weight."""

    @abstractmethod
    def shape_of(self, weight: Tensor) -> torch.Size:
        """The shape of the weight once it is dense, of which `weight` is what the layer holds."""

    @abstractmethod
    def parts(self, layer: nn.Module) -> list[Tensor]:
        """The tensors that the weight is held in: two weights are the same if these are. Fingerprints sample them."""

    @abstractmethod
    def state(self, layer: nn.Module) -> dict[str, Tensor]:
        """{"weight": ..., and the others}: what a file holds for the weight, by transformers' names."""

    @abstractmethod
    def nbytes(self, weight: Tensor) -> int:
        """Bytes that a weight takes, scales included."""

    @abstractmethod
    def dequantizer(self, layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """A function from the layer's weight, as it is held, to the dense one: (d_out, d_in), of `dtype`, a new tensor."""

    @abstractmethod
    def dense_dtype(self, layer: nn.Module) -> torch.dtype:
        """The dtype that the weight had before it was packed, or that the model around it was cast to since."""

    @abstractmethod
    def set_dense_dtype(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Makes the layer's weight one that becomes `dtype` when it is dense."""

    @abstractmethod
    def pack(self, linear: nn.Linear, form: Format, compute_dtype: torch.dtype | None = None) -> nn.Module:
        """A frozen layer in the place of `linear`, on its device, that holds its weight so; the bias is shared.

        Args:
            linear: the layer; its weight is one of COMPUTE_DTYPES. It is left alone.
            form: how.
            compute_dtype: what products are computed in; None: the weight's dtype.
        """

    @abstractmethod
    def repack(self, layer: nn.Module, W: Tensor) -> nn.Parameter:
        """W, (d_out, d_in), held as the weight of `layer` is: a parameter for it. The layer is left alone."""

    def packs_stack(self, form: Format, shape: Sequence[int]) -> bool:
        """Whether one parameter of this shape, (E, p, q), which is several matrices, can be held so.

        Then there are `pack_stack` and `matrix`, and the rest is asked of something whose `weight` is that parameter.
        """
        return False

    def pack_stack(self, W: Tensor, form: Format) -> nn.Parameter:
        """W, (E, p, q), held so, on its device: a parameter for it."""
        raise NotImplementedError

    def matrix(self, layer: nn.Module, index: int, dtype: torch.dtype) -> Tensor:
        """One of the layer's E matrices, dense: (p, q), of `dtype`, a new tensor; the others stay packed."""
        raise NotImplementedError

    @abstractmethod
    def quantization_config(self, form: Format, skipped: Sequence[str], compute_dtype: str) -> dict[str, Any]:
        """What transformers has in a configuration under that name, for a checkpoint whose other layers are `skipped`."""

    def adopt(self, layer: nn.Module) -> bool:
        """Gives another library's layer, of exactly the type it has, a forward that computes with the dequantised weight.

        Returns:
            Whether it was one; `release` is the reverse.
        """
        return False

    def release(self, layer: nn.Module) -> None:
        """Gives a layer that was adopted the class that it had."""
        raise NotImplementedError

    def revive(self, weight: nn.Parameter) -> None:
        """Gives a weight that comes out of a pickle, which knows plain parameters alone, the class that it had."""
        return None

    # --- what follows from that ---------------------------------------------------------------------------------------

    def dense(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that a layer computes with: (d_out, d_in), a new tensor."""
        return self.dequantizer(layer, dtype)(layer.weight.detach())

    def multiply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, (..., d_out), with W frozen, by exactly the dequantised weight."""
        dtype, result = compute_dtypes(layer, x)
        return frozen_linear(x, layer.weight, bias, self.dequantizer(layer, dtype), dtype).to(result)

    def to_dense(self, layer: nn.Module) -> nn.Linear:
        """A plain `nn.Linear` with the weight that the layer computes with, in its `dense_dtype`."""
        return plain_linear(layer, nn.Parameter(self.dense(layer, self.dense_dtype(layer)), requires_grad=False))

    def follow(self, layer: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """Notes on a layer that the model around it was cast or moved by `fn`, as `nn.Module.half` and `cuda` do."""
        now = fn(torch.empty(0, dtype=self.dense_dtype(layer), device=layer.weight.device)).dtype
        self.set_dense_dtype(layer, now)


def compute_dtypes(layer: nn.Module, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What a layer with a packed weight computes in and what it returns, given x: autocast's dtype for both if that is on; else
    the layer's compute dtype (that of x if it has none), and the dtype of x.

    Raises:
        StateError: x holds no floating-point numbers.
    """
    if not x.is_floating_point():
        raise StateError(
            f"a quantised layer got an input of {x.dtype}: the model casts it to the dtype of the layer's weight, which is "
            "packed; name the layer in skip when you quantise the model"
        )
    if torch.is_autocast_enabled(x.device.type):
        return (autocast_dtype(x),) * 2
    return getattr(layer, "compute_dtype", None) or x.dtype, x.dtype


def plain_linear(layer: nn.Module, weight: nn.Parameter) -> nn.Linear:
    """A plain `nn.Linear` with this weight, which it shares, and the layer's bias in the same dtype."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight, linear.bias = weight, layer.bias
    if linear.bias is not None:
        linear.bias.data = linear.bias.data.to(weight.dtype)  # bitsandbytes' forward casts it to the compute dtype
    return linear.train(layer.training)


class PackedLayer(nn.Module):
    """What every frozen linear layer with a packed weight does: it multiplies by exactly the weight that its base holds.

    Attributes:
        base: what holds the weight.
    """

    base: Base

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base.revive(self.weight)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.base.holds(self.weight):  # adapters that are folded in have made it dense
            self.base.follow(self, fn)
        return self

    def forward(self, x: Tensor) -> Tensor:  # ... d_in -> ... d_out
        return self.base.multiply(self, x, self.bias)


class PackedLinear(PackedLayer, nn.Linear):
    """Such a layer, for a base that needs no class of another library.

    Args:
        base: what holds the weight.
        linear: the layer in whose place it is; the bias is shared.
        weight: the weight, held so.
    """

    def __init__(self, base: Base, linear: nn.Linear, weight: nn.Parameter) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.base, self.weight, self.bias = base, weight, linear.bias
        self.train(linear.training)
