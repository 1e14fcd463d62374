"""LoRA: A and B of the adapter's own (Hu et al., arXiv 2106.09685, equation 3).

    W x + s B A dropout(x)

One that starts from the weight adds s (B A - B0 A0), with A0 and B0 the values of its start (see `start.py`): that is LoRA of
rank 2r, with [A; A0] and [B, -B0], and stands so in its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.forwards import stored_entry
from ..spec.config import LoraConfig
from .base import Method, Table
from .start import check_rank_fits, start


class Lora(Method):
    """Plain LoRA."""

    name = "lora"
    mark = (False, False)  # neither DoRA nor a bias of B
    owns_factors = True
    tables = (
        Table("lora_A", "A", "lora_A.weight", "lora_embedding_A"),
        Table("lora_B", "B", "lora_B.weight", "lora_embedding_B"),
        Table("lora_A0", "A", trained=False),
        Table("lora_B0", "B", trained=False),
    )

    def check(self, config: LoraConfig, path: str, module: nn.Module, shape: tuple[int, int], r: int) -> None:
        check_rank_fits(config.init_lora_weights, path, shape, r)

    def start(self, layer: Any, like: Tensor, r: int, scaling: float, init: bool | str) -> dict[str, Tensor]:
        shape = layer.matrix_shape(layer)
        A, B, from_weight = start(init, like, shape, r, scaling, lambda: layer.as_matrix(layer.dense_weight()), layer.zero_A)
        return {"lora_A": A, "lora_B": B} | ({"lora_A0": A.clone(), "lora_B0": B.clone()} if from_weight else {})

    @torch.no_grad()
    def restart(self, layer: Any, name: str, A: Tensor, B: Tensor, subtracted: bool = False) -> None:
        """Starts an adapter that is on a layer anew.

        Args:
            layer: the layer.
            name: the adapter.
            A: (r, d_in).
            B: (d_out, r).
            subtracted: whether s B A is to be subtracted, so that this start changes nothing.
        """
        for letter, value in (("A", A), ("B", B)):
            parameter, starts = getattr(layer, f"lora_{letter}")[name], getattr(layer, f"lora_{letter}0")
            parameter.data = value.to(parameter).clone(memory_format=torch.contiguous_format)
            if subtracted:
                starts[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            elif name in starts:
                del starts[name]
        self.settle(layer, name)

    def product(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        tables = layer._modules  # `layer.lora_A` goes a long way through torch's `__getattr__`
        A, B = stored_entry(tables["lora_A"], name), stored_entry(tables["lora_B"], name)
        if name in tables["lora_A0"]:
            A0, B0 = stored_entry(tables["lora_A0"], name), stored_entry(tables["lora_B0"], name)
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        return A, B

    def stored(self, layer: Any, name: str) -> dict[str, Tensor]:
        A, B = self.product(layer, name)
        return super().stored(layer, name) | {"lora_A": A, "lora_B": B}

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int]:
        return tensors["lora_A"].flatten(1).shape[1], len(tensors["lora_B"])
