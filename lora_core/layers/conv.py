"""LoRA on convolutions: `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`.

The kernel, (d_out, channels, *k), is a matrix of d_in = channels * k values a row. An update of rank r is a convolution of
the same geometry to r channels, by A, and one of size 1 from those, by B.
"""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from ..maths.lora import update_dtype
from .base import LoraLayer


class LoraConv(LoraLayer):
    """A convolution with adapters. Grouped ones can't carry any: their kernel is not one matrix."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return None if layer.groups == 1 else "its kernel, of several groups, is no matrix"

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        return layer.in_channels * prod(layer.kernel_size), layer.out_channels

    @classmethod
    def file_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        ones = (1,) * len(layer.kernel_size)
        return super().file_shapes(layer, r) | {
            "lora_A": (r, layer.in_channels, *layer.kernel_size),
            "lora_B": (layer.out_channels, r, *ones),
            "lora_magnitude": (1, layer.out_channels, *ones),
        }

    def as_matrix(self, W: Tensor) -> Tensor:  # d_out channels k -> d_out d_in
        return W.view(len(W), -1)

    def dense_weight(self) -> Tensor:
        return super().dense_weight().contiguous()  # in channels_last it would have no view as a matrix

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # N channels *size -> N d_out *size
        return self._conv_forward(x, self.weight, None if bias is None else bias.to(self.weight.dtype))

    def product(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        dtype = update_dtype(x, A)
        kernel = A.to(dtype).view(len(A), self.in_channels, *self.kernel_size)
        h = self._conv_forward(F.dropout(x.to(dtype), dropout), kernel, None)  # N r *size
        channel = h.dim() - len(self.kernel_size) - 1
        return scaling * (h.movedim(channel, -1) @ B.to(dtype).t()).movedim(-1, channel)

    def spread(self, values: Tensor, y: Tensor) -> Tensor:
        return values.view(*values.shape, *(1,) * len(self.kernel_size))
