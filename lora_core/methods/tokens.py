"""Rows of embeddings, one for each of some tokens, trained by themselves: `trainable_token_indices`.

    W'[i] = t_i for each token i of the list        W: (V, d), the embeddings, or the output layer;  t: (k, d), trained

So k d values are trained and kept in the file, and not V d. What is stored is the row and not its difference from the base's:
a vocabulary that grew has other random rows there each time. The forward adds what the rows change, t_i - W[i], to the base's
output, and makes no copy of W.

An output layer that the base ties to the embeddings holds the same t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.forwards import stored_entry, stored_weight
from ..errors import TargetError
from ..spec.config import LoraConfig
from .base import Method, Table


class TokenRows(Method):
    """What an adapter has on the embeddings of which it trains some rows, besides A and B on other layers."""

    name, label, asked = "tokens", "trained tokens", "trainable_token_indices"
    is_product, replaces_rows, adds_itself = False, True, True
    tables = (
        Table("lora_tokens", "rows", "token_adapter.trainable_tokens_delta", tied=True),
        Table("lora_token_ids", "rows", trained=False),
    )

    def asked_by(self, config: LoraConfig) -> bool:
        return False  # it goes with another method, on layers of its own

    def start(self, layer: Any, like: Tensor, r: int, scaling: float, init: Sequence[int]) -> dict[str, Tensor]:
        ids = torch.tensor(init, device=like.device)
        rows = stored_weight(layer).detach()[ids.to(layer.weight.device)]
        return {"lora_tokens": rows.to(like), "lora_token_ids": ids}

    def change(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        """(ids, t - W[ids]), (k,) and (k, d), the second with gradients of t, in its dtype."""
        rows, ids = stored_entry(layer.lora_tokens, name), stored_entry(layer.lora_token_ids, name)
        return ids, rows - layer.weight.detach()[ids].to(rows.dtype)

    def add(self, layer: Any, name: str, y: Tensor, x: Tensor) -> Tensor:
        return layer.add_to_tokens(y, x, *self.change(layer, name))

    def fold_(self, layer: Any, name: str, W: Tensor) -> Tensor:
        rows, ids = layer.lora_tokens[name].to(W), layer.lora_token_ids[name].to(W.device)
        dim = layer.token_dim  # of W as a matrix, (d_out, d_in): an embedding's rows are its columns
        return W.index_copy_(dim, ids, rows.detach() if dim == 0 else rows.detach().t())

    def product(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        ids, change = self.change(layer, name)
        chosen = nn.functional.one_hot(ids, layer.matrix_shape(layer)[1 - layer.token_dim]).to(change)  # k V
        return (change, chosen.t()) if layer.token_dim == 0 else (chosen, change.t())

    def check_layer(self, layer: Any, path: str, name: str) -> None:
        """Raises a TargetError if the layer, which is at `path`, has no rows any more for these tokens."""
        (V, d), rows = layer.weight.shape, layer.lora_tokens[name]
        if (last := int(layer.lora_token_ids[name].max())) >= V or d != rows.shape[1]:
            raise TargetError(
                f"{path} has {V} rows of {d} values, and adapter {name!r} trains token {last}, {rows.shape[1]} values: it was "
                "resized since; resize a model before it gets adapters"
            )
