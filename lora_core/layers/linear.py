"""LoRA on linear layers: `nn.Linear`, Falcon's, those whose weight is packed (see `bases/`), and GPT-2's `Conv1D`.

What such a layer computes:

    y = x W^T + b + sum over active adapters of scaling * dropout(x) A^T B^T
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..bases import base_of
from ..bases.base import Base, compute_dtypes
from ..cpu.products import FastLinear, fast_linear, product
from ..errors import StateError
from ..maths.lora import Draw, lora_linear, lora_product, update_dtype
from .base import LoraLayer, Product
from .packed import PackedFolding


class LinearLayer(LoraLayer):
    """The products of a linear layer, however it stores its weight.

    Attributes:
        base_product: how the base layer multiplies in the forward, as `F.linear` is called.
    """

    is_linear = True
    base_product = staticmethod(F.linear)

    def product(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        return lora_product(x, A, B, scaling, dropout)

    def adapted_forward(self, x: Tensor, bias: Tensor | None, products: list[Product]) -> Tensor:
        first, *more = products
        y = lora_linear(x, self.as_matrix(self.weight), bias, *first, linear=self.base_product, draw=self.draw())
        return sum((lora_product(x, *one) for one in more), start=y).to(y.dtype) if more else y

    def draw(self) -> Draw | None:
        """What gives a dropout mask, if siblings share theirs."""
        group = self.lora_masks
        return None if group is None else lambda x, p: group.draw(self, x, p)


class LoraLinear(LinearLayer, nn.Linear):
    """An `nn.Linear` that carries adapters."""

    token_dim = 0

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        return layer.in_features, layer.out_features

    def as_matrix(self, W: Tensor) -> Tensor:
        return W

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # ... d_in -> ... d_out
        return F.linear(x, self.weight, bias)

    def add_to_tokens(self, y: Tensor, x: Tensor, ids: Tensor, change: Tensor) -> Tensor:  # ... d_out, ... d_in -> ... d_out
        dtype = update_dtype(x, change)
        return y.index_add_(-1, ids, (x.to(dtype) @ change.to(dtype).t()).to(y.dtype))  # in place: these may be all logits


class LoraFastLinear(LoraLinear, FastLinear):
    """A `FastLinear` that carries adapters."""

    base_product = staticmethod(product)

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # ... d_in -> ... d_out
        return fast_linear(x, self.weight, bias)


class LoraFalconLinear(LoraLinear):
    """Falcon's linear layer with adapters, which adds its bias in a step of its own: in 16 bits that rounds twice."""

    @staticmethod
    def base_product(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:  # ... d_in -> ... d_out
        return x @ W.t() if bias is None else x @ W.t() + bias

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # ... d_in -> ... d_out
        return self.base_product(x, self.weight, bias)


class LoraPacked(PackedFolding, LoraLinear):
    """A linear layer with a packed weight that carries adapters: it computes with the dense one, made anew each time."""

    token_dim = None

    @property
    def packing(self) -> Base:
        """What holds the weight.

        Raises:
            StateError: it is packed, and without what it takes to make it dense.
        """
        base = base_of(self)
        if not base.packed:
            raise StateError(
                "a packed weight has lost its scales; shard with fully_shard(..., ignored_params=packed_parameters(model))"
            )
        return base

    base_product = staticmethod(product)

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # ... d_in -> ... d_out
        if not self.lora_folded:
            return self.packing.multiply(self, x, bias)
        dtype = self.weight.dtype
        return F.linear(x.to(dtype), self.weight, None if bias is None else bias.to(dtype)).to(compute_dtypes(self, x)[1])

    def adapted_forward(self, x: Tensor, bias: Tensor | None, products: list[Product]) -> Tensor:
        first, *more = products
        dtype, _ = compute_dtypes(self, x)
        dense = self.packing.dequantizer(self, dtype)
        y = lora_linear(x, self.weight, bias, *first, dense, dtype, self.base_product, self.draw())
        return sum((lora_product(x, *one) for one in more), start=y).to(y.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if (base := base_of(self)).packed:
            base.follow(self, fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        base_of(self).revive(self.weight)


class LoraConv1D(LinearLayer):
    """GPT-2's `Conv1D` with adapters: a linear layer that stores its weight transposed, (d_in, d_out)."""

    fan_in_fan_out = True

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        return tuple(layer.weight.shape)

    def as_matrix(self, W: Tensor) -> Tensor:  # d_in d_out -> d_out d_in
        return W.t()

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # ... d_in -> ... d_out
        if bias is self.bias:
            return self.lora_base_class.forward(self, x)
        return F.linear(x, self.weight.t(), bias)
