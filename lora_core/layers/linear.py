"""LoRA on linear layers: `nn.Linear`, the 4-bit linear of bitsandbytes, and GPT-2's `Conv1D`.

    y = x W^T + b + sum over active adapters of scaling * dropout(x) A^T B^T
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..functional import lora_linear, lora_product
from ..nf4 import compute_dtypes, dense_dtype, dequantize, dequantizer, is_quantized, linear_4bit_class
from .base import LoraLayer


class LoraLinear(LoraLayer, nn.Linear):
    """An `nn.Linear` that carries adapters. On 4-bit layers: a subclass of this and of their class."""

    def forward(self, x: Tensor) -> Tensor:  # ... d_in -> ... d_out
        if self.lora_folded or not self.lora_active:
            return super().forward(x)
        first, *more = self.active_products()
        y = lora_linear(x, self.weight, self.bias, *first)
        for product in more:
            y = y + lora_product(x, *product)
        return y

    def lora_shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def add_delta_(self, W: Tensor, name: str) -> None:  # W: d_out d_in
        A, B = self.lora_A[name].detach().to(W.dtype), self.lora_B[name].detach().to(W.dtype)
        W.addmm_(B, A, alpha=self.lora_scaling[name])


class Lora4bit(LoraLinear):
    """What a 4-bit linear layer does differently: it computes with the dequantised weight, made anew each time."""

    def forward(self, x: Tensor) -> Tensor:  # ... d_in -> ... d_out
        if self.lora_folded:
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            y = nn.functional.linear(x.to(self.weight.dtype), self.weight, bias)
            return y.to(compute_dtypes(self, x)[1])
        if not self.lora_active:
            return linear_4bit_class().forward(self, x)
        first, *more = self.active_products()
        dtype, result_dtype = compute_dtypes(self, x)
        y = lora_linear(x, self.weight, self.bias, *first, dequantizer(self, dtype), dtype)
        for product in more:
            y = y + lora_product(x.to(dtype), *product)
        return y.to(result_dtype)

    def dense_weight(self) -> Tensor:
        return dequantize(self)

    def dense_dtype(self) -> torch.dtype:
        return dense_dtype(self)


class LoraConv1D(LoraLayer):
    """GPT-2's `Conv1D` with adapters: a linear layer that stores its weight transposed, (d_in, d_out)."""

    def forward(self, x: Tensor) -> Tensor:  # ... d_in -> ... d_out
        if self.lora_folded or not self.lora_active:
            return super().forward(x)
        first, *more = self.active_products()
        y = lora_linear(x, self.weight.t(), self.bias, *first)
        for product in more:
            y = y + lora_product(x, *product)
        return y

    def lora_shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape)

    def add_delta_(self, W: Tensor, name: str) -> None:  # W: d_in d_out
        LoraLinear.add_delta_(self, W.t(), name)


def lora_class(module: nn.Module) -> type[LoraLayer] | None:
    """The class that carries adapters on layers of `module`'s exact type; None if there is none.

    A subclass of `nn.Linear` that we don't know may have a forward of its own, which ours would replace: it has none.
    """
    base = type(module)
    if issubclass(base, LoraLayer):
        return base
    if base is nn.Linear:
        return LoraLinear
    if is_quantized(module) and isinstance(module, nn.Linear):
        return _subclass(Lora4bit, base)
    if base.__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' class, which is not imported here
        return _subclass(LoraConv1D, base)
    return None


@functools.cache
def _subclass(kind: type[LoraLayer], base: type[nn.Module]) -> type[LoraLayer]:
    return type(f"Lora{base.__name__}", (kind, base), {"__doc__": kind.__doc__})
