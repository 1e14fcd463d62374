"""DoRA: the magnitude of each row of the weight is trained apart from its direction (Liu et al., arXiv 2402.09353).

    f (W x + s B A dropout(x)),   f = m / |W + s B A| for each row        (equation 5)

The norm is a constant in the gradient (section 4.3). m starts as the norms that are there, so f starts as 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bases.forwards import stored_entry
from ..spec.config import LoraConfig
from .base import Table
from .lora import Lora

#: The table of m, and the field of a configuration that asks for it.
MAGNITUDE, ASKED = "lora_magnitude", "use_dora"


class Dora(Lora):
    """LoRA with a trained magnitude for each output."""

    name, label, asked = "dora", "DoRA", f"{ASKED}=True"
    besides = "the magnitudes"
    needs_base = "whose update depends on the base's weights"
    mark = (True, False)
    is_product = False
    tables = (*Lora.tables, Table(MAGNITUDE, "scale", "lora_magnitude_vector"))

    def asked_by(self, config: LoraConfig) -> bool:
        return config.use_dora

    @torch.no_grad()
    def settle(self, layer: Any, name: str) -> None:
        magnitude = layer.lora_magnitude[name]
        magnitude.data = self.direction(layer, name).norm(dim=1).to(magnitude)

    def start(self, layer: Any, like: Tensor, r: int, scaling: float, init: bool | str) -> dict[str, Tensor]:
        d_out = layer.matrix_shape(layer)[1]
        return super().start(layer, like, r, scaling, init) | {"lora_magnitude": like.new_empty(d_out)}

    @torch.no_grad()
    def direction(self, layer: Any, name: str) -> Tensor:
        """W + s B A, (d_out, d_in), a new tensor in float32 or float64."""
        return layer.weight_with(*self.product(layer, name), layer.lora_scaling[name])

    def row_scale(self, layer: Any, name: str) -> Tensor:
        return dora_factor(self.direction(layer, name), stored_entry(layer.lora_magnitude, name))

    def fold_(self, layer: Any, name: str, W: Tensor) -> Tensor:
        V = super().fold_(layer, name, W)
        return V.mul_(dora_factor(V, layer.lora_magnitude[name])[:, None])

    def as_plain(self, fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {"use_dora": False}


def dora_factor(V: Tensor, magnitude: Tensor) -> Tensor:
    """f = m / |V|, (d_out,), of the direction V = W + s B A, (d_out, d_in), with its norms constants in the gradient.

    A row of zeros gets the factor 0, not NaN.
    """
    norm = torch.linalg.vector_norm(V.detach(), dim=1)
    return magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny)
