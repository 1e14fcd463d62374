"""LoRA on `nn.MultiheadAttention`, which reads the weights of its projections without calling a layer.

Query, key and value are projected by one weight, (3 E, E), and the result by that of `out_proj`, (E, E). Each gets an A and a
B, of one rank and scaling, and the forward is torch's with W + s B A in the place of each weight, as in PEFT:

    in_proj_weight    [W_q; W_k; W_v] + s B A
    out_proj.weight   W_o + 2 s B' A'        twice, as PEFT has it: see `LoraOutProjection`

So dropout on an adapter's input does not apply. In 16 bits the sum is rounded to the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..methods.registry import method_of
from ..spec.config import LoraConfig
from .base import LoraLayer
from .linear import LoraLinear


def updated_weight(layer: LoraLayer) -> Tensor:
    """W + the sum of s B A of the active adapters, in the dtype of W and with gradients for A and B."""
    W = layer.weight
    if layer.lora_folded or not layer.lora_active:
        return W
    with torch.autocast(W.device.type, enabled=False):
        A, B = layer.joined_factors(layer.lora_active)
        dtype = torch.promote_types(W.dtype, A.dtype)
        return (W.to(dtype) + B.to(dtype) @ A.to(dtype)).to(W.dtype)


class LoraOutProjection(LoraLinear):
    """The layer in attention that projects its result. It carries an adapter together with the attention around it.

    PEFT 0.21 adds the update to this weight twice, in the forward and in merging: its `MultiheadAttention.merge` adds it, and
    then calls the layer's own merge. A file does not say so, and what was trained with 2 s computes the same here.
    """

    scale = 2

    is_linear = False
    any_factors = False
    mixes = False
    drops = False
    token_dim = None

    @classmethod
    def file_path(cls, path: str, layer: nn.Module, layers: Iterable[str]) -> str:
        attention, _, name = path.rpartition(".")
        return f"{attention}.base_layer.{name}"


class LoraAttention(LoraLayer, nn.MultiheadAttention):
    """An `nn.MultiheadAttention` that carries adapters. Its `weight` is `in_proj_weight`."""

    bias = None
    takes_bias = False
    any_factors = False
    mixes = False
    drops = False
    weight_name = "in_proj_weight"
    parts = ("out_proj",)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        if not layer._qkv_same_embed_dim:
            return f"its keys and values have widths of their own (kdim={layer.kdim}, vdim={layer.vdim}), as PEFT refuses too"
        if not isinstance(layer.out_proj, NonDynamicallyQuantizableLinear):
            return f"its out_proj is a {type(layer.out_proj).__name__}, and torch's own is expected"
        if "in_proj_weight" not in layer._parameters or "weight" not in layer.out_proj._parameters:
            return "a weight of it is computed from other tensors (pruned, or parametrised)"
        return None

    @classmethod
    def unsupported(cls, layer: nn.Module, config: LoraConfig, r: int) -> str | None:
        asked = method_of(config).asked
        return f"is attention, whose forward in PEFT has no place for {asked}; leave it out" if asked else None

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        return layer.embed_dim, 3 * layer.embed_dim

    def as_matrix(self, W: Tensor) -> Tensor:
        return W

    @property
    def weight(self) -> nn.Parameter:
        return self.in_proj_weight

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.weight_name if name == "weight" else name, value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
        masks |= {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        # In a mixed batch no row has an adapter here: `mixed_batch` sees to that.
        if self.lora_folded or not self.lora_active or self.lora_rows.get(get_ident()):
            return self.lora_base_class.forward(self, query, key, value, **masks)
        swap = self.batch_first and query.dim() == 3
        if swap:  # N T E -> T N E; what was one tensor stays one, which F then projects at once
            turned = {id(x): x.transpose(0, 1) for x in (query, key, value)}
            query, key, value = (turned[id(x)] for x in (query, key, value))
        y, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            updated_weight(self),
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            updated_weight(self.out_proj),
            self.out_proj.bias,
            training=self.training,
            **masks,
        )
        return (y.transpose(0, 1) if swap else y), weights
