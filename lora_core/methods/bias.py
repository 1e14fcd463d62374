"""LoRA whose B has a bias of its own, c, trained from zero.

What it computes:

    W x + s (B A dropout(x) + c)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spec.config import LoraConfig
from .base import Table
from .lora import Lora


class LoraWithBias(Lora):
    """LoRA with a bias of B."""

    name, label, asked = "lora_bias", "bias of B", "lora_bias=True"
    besides = "the biases"
    mark = (False, True)
    bias_table = "lora_bias"
    tables = (*Lora.tables, Table("lora_bias", "bias", "lora_B.bias"))

    def asked_by(self, config: LoraConfig) -> bool:
        return config.lora_bias

    def start(self, layer: Any, like: Tensor, r: int, scaling: float, init: bool | str) -> dict[str, Tensor]:
        d_out = layer.matrix_shape(layer)[1]
        return super().start(layer, like, r, scaling, init) | {"lora_bias": like.new_zeros(d_out)}
