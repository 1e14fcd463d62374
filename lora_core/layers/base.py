"""`LoraLayer`: what adapters do to a layer in the forward. What they do folded into its weight, `folding.py` says.

Whatever the kind of layer, its weight is also a matrix W of (d_out, d_in), and of one adapter it makes

    f * (W x + s B A dropout(x)) + b + s c       with plain LoRA f is 1 and c is 0; methods/base.py has the others

Several active adapters add up: the change of each is worked out from the base alone, so their order does not matter.
"""

from __future__ import annotations

from threading import get_ident

import torch
from torch import Tensor, nn

from ..bases.forwards import stored_weight
from .folding import FoldedLayer
from .traits import Traits

Product = tuple[Tensor, Tensor, float, float]  # A, B, scaling, dropout


class LoraLayer(Traits, FoldedLayer):
    """What every kind of adapted layer shares. A subclass says how to multiply, and how its weight is a matrix."""

    bias: Tensor | None

    # --- what a kind of layer says ----------------------------------------------------------------------------------

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of the weight, as a matrix, of a layer that was adopted or may be."""
        raise NotImplementedError

    @classmethod
    def file_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """{form of a table (see `methods/base.py`): the shape of such a tensor in PEFT's files}."""
        d_in, d_out = cls.matrix_shape(layer)
        return {"A": (r, d_in), "B": (d_out, r), "scale": (d_out,), "bias": (d_out,), "rank": (r,)}

    def as_matrix(self, W: Tensor) -> Tensor:
        """W, laid out as the layer's weight, as (d_out, d_in): a view."""
        raise NotImplementedError

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the base layer computes, with this bias in place of its own."""
        raise NotImplementedError

    def product(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        """scaling * B A dropout(x): what an adapter adds to the output, in plain operations."""
        raise NotImplementedError

    def adapted_forward(self, x: Tensor, bias: Tensor | None, products: list[Product]) -> Tensor:
        """The base layer's output with the products added, rounded once to the dtype that the base gives."""
        y = self.base_forward(x, bias)
        return sum((self.product(x, *product) for product in products), start=y).to(y.dtype)

    def add_to_tokens(self, y: Tensor, x: Tensor, ids: Tensor, change: Tensor) -> Tensor:
        """The output y with what it changes that the weight's rows of the tokens `ids`, (k,), are others by `change`, (k, d).

        Where `token_dim` says that there are tokens. It may write into y.
        """
        raise NotImplementedError

    def spread(self, values: Tensor, y: Tensor) -> Tensor:
        """`values`, one for each output feature (d_out,) and maybe row (N, d_out), in a shape that y broadcasts with."""
        return values if values.dim() == 1 else values.view(len(values), *(1,) * (y.dim() - 2), -1)

    def dense_weight(self) -> Tensor:
        """The weight that this layer computes with: a new tensor, in float32, or float64 if it is that."""
        weight = stored_weight(self).detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    def dense_dtype(self) -> torch.dtype:
        """The dtype of the weight once it is dense."""
        return self.weight.dtype

    # --- the forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.lora_rows and (rows := self.lora_rows.get(get_ident())):
            return rows.forward(self, x)
        if self.lora_folded or not self.lora_active:
            return self.base_forward(x, self.bias)
        for name in self.lora_active:
            if not self.lora_method[name].is_product:
                return self._general_forward(x)
        return self._product_forward(x, self.lora_active)

    def _product_forward(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """The forward with adapters that add products, and maybe a bias."""
        y = self.adapted_forward(x, self.bias, self.products_of(names))
        own = self.own_biases(names)
        return y if own is None else (y + self.spread(own, y)).to(y.dtype)

    def _general_forward(self, x: Tensor) -> Tensor:
        """The forward where an adapter scales the output, or says itself what it adds to it, beside others that may not."""
        apart = [name for name in self.lora_active if self.lora_method[name].adds_itself]
        others = tuple(name for name in self.lora_active if name not in apart)
        if not others:
            y = self.base_forward(x, self.bias)
        elif self._are_products(others):
            y = self._product_forward(x, others)
        else:
            y = self._scaled_forward(x, others)
        for name in apart:
            y = self.lora_method[name].add(self, name, y, x)
        return y

    def products_of(self, names: tuple[str, ...]) -> list[Product]:
        """What the forward must add. Adapters without dropout make one product of summed rank; each other has its own mask."""
        if len(names) == 1:
            (name,) = names
            return [(*self.factors(name), self.lora_scaling[name], self._dropout_now(name))]
        plain = [name for name in names if not self._dropout_now(name)]
        dropped = [name for name in names if name not in plain]
        products = [(*self.factors(name), self.lora_scaling[name], self._dropout_now(name)) for name in dropped]
        return [*products, (*self.joined_factors(plain), 1.0, 0.0)] if plain else products

    def _dropout_now(self, name: str) -> float:
        return self.lora_dropout[name] if self.training else 0.0

    def _scaled_forward(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """The forward where an adapter multiplies the output by its f, or may."""
        found = [(name, self.row_scale(name)) for name in names]
        scales = {name: f for name, f in found if f is not None}
        if scales and len(names) == 1 and not self._rounds(x):  # one pass over the plain layer's output
            (f,) = scales.values()
            y = self.adapted_forward(x, None, self.products_of(names))
            dtype, y = y.dtype, y * self.spread(f.to(y.dtype), y)
        else:
            y = self.base_forward(x, None)
            dtype = y.dtype
            y = y * self.spread(1 + sum(f - 1 for f in scales.values()), y) if scales else y
            for name in names:
                A, B = self.factors(name)
                B = B * scales[name].to(B.dtype)[:, None] if name in scales else B
                y = y + self.product(x, A, B, self.lora_scaling[name], self._dropout_now(name))
        for bias in (self.bias, self.own_biases(names)):
            y = y if bias is None else y + self.spread(bias, y)
        return y.to(dtype)

    def _rounds(self, x: Tensor) -> bool:
        """Whether the base gives 16 bits and the update has more: then what is made of their sum is rounded at the end."""
        dtype = x.dtype if x.is_floating_point() else self.weight.dtype
        return dtype.itemsize < 4 and not torch.is_autocast_enabled(x.device.type)
