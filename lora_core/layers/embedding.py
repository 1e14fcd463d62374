"""LoRA on `nn.Embedding`, whose weight is the transpose of a linear layer's: (d_in, d_out), d_in entries of d_out values.

The rows of A^T are looked up where the base looks up its own, and B takes them to d_out. A starts at zero and B at random.
Dropout does not apply: there is no input to drop. What is tied to the weight (an output layer) keeps the base's values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec.config import LoraConfig
from .base import LoraLayer


class LoraEmbedding(LoraLayer, nn.Embedding):
    """An `nn.Embedding` that carries adapters."""

    bias = None
    zero_A = True
    takes_bias = False
    drops = False
    embedding_keys = True
    token_dim = 1

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return None if layer.max_norm is None else "its max_norm rescales rows of the weight as they are read"

    @classmethod
    def unsupported(cls, layer: nn.Module, config: LoraConfig, r: int) -> str | None:
        return "is an embedding, which has no bias; leave lora_bias out" if config.lora_bias else None

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim

    def as_matrix(self, W: Tensor) -> Tensor:  # d_in d_out -> d_out d_in
        return W.t()

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # ... -> ... d_out; an embedding has no bias
        return nn.Embedding.forward(self, x)

    def product(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        rows = F.embedding(x, A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)  # ... r
        dtype = torch.promote_types(rows.dtype, self.weight.dtype)  # there is no input whose dtype would decide
        return scaling * (rows.to(dtype) @ B.to(dtype).t())

    def add_to_tokens(self, y: Tensor, x: Tensor, ids: Tensor, change: Tensor) -> Tensor:  # ... d_out, ... -> ... d_out
        return (y + self.changes(x, ids, change)).to(y.dtype)

    def changes(self, x: Tensor, ids: Tensor, change: Tensor) -> Tensor:  # ... -> ... d_out
        """What is added to the embeddings of x, where that is one of `ids`."""
        if self.padding_idx is not None:  # which gets no gradient, here as in the base
            change = torch.where((ids == self.padding_idx)[:, None], change.detach(), change)
        ids, order = ids.sort()
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        place = torch.where(ids[place] == x, order[place], len(ids))  # of other tokens a row of zeros, the last one
        rows = torch.cat([change, change.new_zeros(1, change.shape[1])])
        return F.embedding(place, rows, scale_grad_by_freq=self.scale_grad_by_freq)


class LoraScaledEmbedding(LoraEmbedding):
    """transformers' scaled word embeddings with adapters: `embed_scale` multiplies what the update adds too, as in PEFT."""

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # ... -> ... d_out
        return self.lora_base_class.forward(self, x)

    def product(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        return self._scaled(super().product(x, A, B, scaling, dropout))

    def changes(self, x: Tensor, ids: Tensor, change: Tensor) -> Tensor:  # ... -> ... d_out
        return self._scaled(super().changes(x, ids, change))

    def _scaled(self, y: Tensor) -> Tensor:
        scale = self.embed_scale
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
