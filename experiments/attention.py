"""Attention for training on a CPU: what "sdpa" computes, with dropout that costs little.

    use_fast_attention(model)

torch's `scaled_dot_product_attention` has no fused kernel for a CPU that drops attention weights, and its plain path
draws a double for each of them. This is that path with the masks of `lora_core.cpu.dropout`. Without dropout, on a GPU, or
with what it does not know (softcap, position biases, causal masks left implicit) it is "sdpa" itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_core.cpu.dropout import dropout as fast_dropout

NAME = "fast_dropout_attention"
#: Options of transformers' attention functions that this one leaves to "sdpa".
UNKNOWN = ("softcap", "position_bias", "cache", "sliding_window")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling) v, dropped out in between, in transformers' interface for attention functions.

    Args:
        query: (B, H, T, d); key, value: (B, H, S, d).
        attention_mask: (B, 1, T, S) bool, True where a query may look; None: everywhere.

    Returns:
        (B, T, H, d), and None for the weights.
    """
    plain = query.shape[1] == key.shape[1] and all(options.get(name) is None for name in UNKNOWN)
    implicit_mask = attention_mask is None and (options.get("is_causal") or getattr(module, "is_causal", False))
    if not dropout or query.device.type != "cpu" or not plain or implicit_mask:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(2, 3)  # B H T S
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = fast_dropout(scores.softmax(-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def use_fast_attention(model: PreTrainedModel) -> bool:
    """Makes `model` attend through `attention`, if it uses "sdpa" now; returns whether it does."""
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True
