"""What an adapter's files have for one layer, and that layer with it on: built from the layer's weight alone.

Example:

    layer = carrier(update.plain_layer(weight, transposed=False))
    update.put_on(layer, "default")
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FileFormatError
from ..layers import LoraLayer, lora_class
from ..layers.experts import unstack
from ..layers.slots import slot_of
from ..methods.base import Method
from ..methods.registry import all_tables
from ..spec.checks import MAX_FACTOR

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class LayerUpdate:
    """What an adapter has for one layer.

    Attributes:
        path: the layer's.
        tensors: {table of a layer: as in the file}.
        scaling: the factor before B A.
        embedding: whether the layer is an embedding.
        method: what the adapter adds.
        rank: of the update.
        is_parameter: whether the path is that of a parameter, and not of a layer.
        matrices: how many matrices the weight is; A and B have the ranks of all of them.
        transposed: of a parameter with square matrices, whether they are stored as (d_in, d_out).
    """

    path: str
    tensors: dict[str, Tensor]
    scaling: float
    embedding: bool
    method: Method
    rank: int
    is_parameter: bool = False
    matrices: int = 1
    transposed: bool = False

    @property
    def weight(self) -> str:
        """The name of the tensor that it updates."""
        return self.path if self.is_parameter else f"{self.path}.weight"

    @property
    def is_square(self) -> bool:
        """Whether d_in and d_out of several matrices are one number, which leaves open how they are stored."""
        d_in, d_out = self.method.sizes(self.tensors)
        return self.matrices > 1 and d_in == d_out

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A, (r, d_in), and B, (d_out, r), float32 or wider, without the scaling; None if the file has no A and B.

        Of a parameter with E matrices (E, r, d_in) and (E, d_out, r).
        """
        if not self.method.owns_factors:
            return None
        A, B = self.tensors["lora_A"].flatten(1), self.tensors["lora_B"].flatten(1)
        A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (A, B))
        return unstack(A, B, self.matrices) if self.is_parameter and self.matrices > 1 else (A, B)

    def put_on(self, layer: LoraLayer, name: str, weight: float = 1.0) -> None:
        """Gives the adapted `layer` this update times `weight`, as the adapter `name`.

        Raises:
            FileFormatError: it is of other shapes.
            ConfigError: `weight` makes the factor before B A larger than float32 holds.
        """
        shared = [table.name for table in self.method.tables if table.shared and table.name not in self.tensors]
        if shared:
            raise FileFormatError(
                f"{self.path}: the file has no {' and '.join(shared)}, which the layers share; load it onto its model, and "
                "save it with them (save_projection=True)"
            )
        if abs(weight * self.scaling) > MAX_FACTOR:
            factor = f"{weight:g} times the scaling {self.scaling:g}"
            raise ConfigError(f"weights: {factor} of {self.path} is more than float32 holds")
        shapes = layer.file_shapes(layer, self.rank)
        layer.add_tables(table.name for table in self.method.tables)
        for table, tensor in self.tensors.items():
            form = all_tables()[table].form
            if form and tuple(tensor.shape) != shapes[form]:
                raise FileFormatError(
                    f"{self.path}: {table} is {tuple(tensor.shape)}, and on this base's weight of "
                    f"{tuple(layer.weight.shape)} it would be {shapes[form]}; use the base it was trained on"
                )
            value = tensor.flatten(1) if form in ("A", "B", "") else tensor.flatten()
            getattr(layer, table)[name] = nn.Parameter(value, requires_grad=False)
        layer.put(name, self.method, weight * self.scaling, 0.0)

    def bias(self) -> Tensor | None:
        """s c, (d_out,), which the update adds to the layer's bias; None if it has none."""
        return None if self.method.bias_table is None else self.tensors[self.method.bias_table] * self.scaling

    def plain_layer(self, weight: Tensor, transposed: bool) -> nn.Module:
        """The base layer that this update is for, with this weight and no bias. A transposed weight is seen upright."""
        if self.is_parameter:
            host = nn.Module()
            host.weight = nn.Parameter(weight, requires_grad=False)
            host.is_transposed = self.is_transposed(weight.shape[1:], self.transposed)
            return slot_of(host, "weight")
        if self.embedding:
            layer = nn.Embedding(*weight.shape, device="meta")
        elif weight.dim() in _CONVOLUTIONS:
            d_out, channels, *size = weight.shape
            layer = _CONVOLUTIONS[weight.dim()](channels, d_out, tuple(size), bias=False, device="meta")
        elif weight.dim() == 2:
            weight = weight.t() if self.is_transposed(weight.shape, transposed) else weight
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        else:
            raise FileFormatError(f"{self.path}: its weight has {weight.dim()} dimensions; no adapter goes on that")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def is_transposed(self, shape: tuple[int, ...], otherwise: bool) -> bool:
        """Whether a weight of this shape is stored as (d_in, d_out); `otherwise` decides for a square one."""
        d_in, d_out = self.method.sizes(self.tensors)
        if d_in is None:  # only d_out is known
            return otherwise if shape[0] == shape[1] else shape[0] != d_out
        return tuple(shape) == (d_in, d_out) if d_in != d_out else otherwise


def carrier(layer: nn.Module) -> LoraLayer:
    """`layer`, turned into one that carries adapters."""
    return lora_class(layer).adopt(layer)
