"""LoRA on convolutions: `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`.

The kernel, (d_out, channels, *k), is a matrix of d_in = channels * k values a row. An update of rank r is a convolution of
the same geometry to r channels, by A, and one of size 1 from those, by B.

Where the base's kernel has groups, A reads all channels, as in PEFT, and B has the groups: (d_out, r / groups). The update then
reaches across the groups, which no kernel of the base's shape can hold: it can't be folded in. For DoRA PEFT takes norms of
another matrix, and so does `weight_with`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StateError
from ..maths.lora import fold_, update_dtype
from ..methods.base import Method
from ..methods.registry import method_of
from ..spec.config import LoraConfig
from ..spec.starts import starts_from_weight
from .base import LoraLayer


class LoraConv(LoraLayer):
    """A convolution with adapters."""

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        return layer.in_channels * prod(layer.kernel_size), layer.out_channels

    @classmethod
    def file_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        ones = (1,) * len(layer.kernel_size)
        return super().file_shapes(layer, r) | {
            "A": (r, layer.in_channels, *layer.kernel_size),
            "B": (layer.out_channels, r, *ones),
            "scale": (1, layer.out_channels, *ones),
        }

    def as_matrix(self, W: Tensor) -> Tensor:  # d_out channels k -> d_out d_in
        return W.view(len(W), -1)

    def dense_weight(self) -> Tensor:
        return super().dense_weight().contiguous()  # in channels_last it would have no view as a matrix

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # N channels *size -> N d_out *size
        return self._conv_forward(x, self.weight, None if bias is None else bias.to(self.weight.dtype))

    def reduce(self, x: Tensor, kernel: Tensor) -> Tensor:  # N channels *size -> N r *size
        return self._conv_forward(x, kernel, None)

    def product(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        dtype = update_dtype(x, A)
        kernel = A.to(dtype).view(len(A), self.in_channels, *self.kernel_size)
        h = self.reduce(F.dropout(x.to(dtype), dropout), kernel)  # N r *size
        channel = h.dim() - len(self.kernel_size) - 1
        return scaling * (h.movedim(channel, -1) @ B.to(dtype).t()).movedim(-1, channel)

    def spread(self, values: Tensor, y: Tensor) -> Tensor:
        return values.view(*values.shape, *(1,) * len(self.kernel_size))


class LoraGroupedConv(LoraConv):
    """A convolution in groups with adapters: B is kept as its groups, (d_out, r / groups)."""

    any_factors = False

    @classmethod
    def unsupported(cls, layer: nn.Module, config: LoraConfig, r: int) -> str | None:
        here = f"is a convolution of {layer.groups} groups"
        if r % layer.groups:
            return f"{here}, and the rank {r} is no multiple of that; choose another rank, or leave it out"
        if not (method := method_of(config)).owns_factors:
            return f"{here}, whose update is no part of its weight, as {method.label} needs it; leave {method.asked} out"
        init = config.init_lora_weights
        if init == "orthogonal" or starts_from_weight(init):
            return f"{here}, where init_lora_weights={init!r} can't start; use True or 'gaussian'"
        return None

    @classmethod
    def file_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        shapes = super().file_shapes(layer, r)
        d_out, _, *ones = shapes["B"]
        return shapes | {"B": (d_out, r // layer.groups, *ones)}

    def started(self, method: Method, like: Tensor, r: int, scaling: float, init: Any) -> Mapping[str, Tensor]:
        tables = super().started(method, like, r, scaling, init)
        return {**tables, "lora_B": tables["lora_B"][:, : r // self.groups].contiguous()}

    def weight_with(self, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """What PEFT takes norms of: the values of B, r in a row, times A, (r, channels k), added to W's as they lie."""
        W = self.as_matrix(self.dense_weight())
        return fold_(W.view(-1, A.shape[1]), A, B.reshape(-1, len(A)), scaling).view_as(W)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A, (r, d_in), and B as one matrix, (d_out, r), which is zero between an output and the ranks of other groups."""
        A, B = super().factors(name)
        return A, torch.block_diag(*B.chunk(self.groups))

    def reduce(self, x: Tensor, kernel: Tensor) -> Tensor:  # N channels *size -> N r *size
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(x, kernel, None, self.stride, padding, self.dilation)

    def check_stored(self, names: Iterable[str]) -> None:
        raise StateError(
            f"the update of a convolution of {self.groups} groups reaches across them, as PEFT has it, and its kernel can't "
            "hold that; keep the adapter, or unload it"
        )
