"""A batch whose rows use different adapters, on one layer: their A and B, stacked, and the forward with each row's own.

`model/mixed.py` opens such batches, and has the modules that adapters train whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import StateError
from ..maths.lora import update_dtype

if TYPE_CHECKING:
    from .base import LoraLayer


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of the rows of a batch, on one layer.

    K adapters, the last of which changes nothing; R the largest rank, which the others are padded to with zeros; M the
    most rows that one adapter has, which the others are padded to with row 0.

    Attributes:
        index: which of the K each of the N rows uses, (N,).
        grouped: the rows of each adapter, (K, M).
        place: where each row is in `grouped`, flattened, (N,).
        A: (K, R, d_in).
        B: transposed, with the scaling in it, (K, R, d_out).
        scale: f, with which an adapter multiplies the output, (K, d_out); None if no adapter has one.
        bias: with the scaling in it, (K, d_out); None likewise.
        by_text: (which of the K, its name) of those that act on some tokens alone, as `methods/activated.py` does.
    """

    index: Tensor
    grouped: Tensor
    place: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor | None
    bias: Tensor | None
    by_text: tuple[tuple[int, str], ...] = ()

    def forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """What the layer computes of x, whose first dimension is the rows.

        Raises:
            StateError: it is not.
        """
        check_rows(x, self.index)
        y = layer.base_forward(x, None if self.scale is not None else layer.bias)
        dtype = y.dtype
        if self.A.shape[1]:
            x = self._acted_on(layer, x)
            y = self._add_linear(y, x) if layer.is_linear else self._add_any(layer, y, x)
        if self.scale is not None:
            y = y * layer.spread(self.scale[self.index], y)
            y = y if layer.bias is None else y + layer.spread(layer.bias, y)
        y = y if self.bias is None else y + layer.spread(self.bias[self.index], y)
        return y.to(dtype)

    def _acted_on(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """x, with zeros for the tokens on which the adapter of their row does not act: its product is zero there."""
        for k, name in self.by_text:
            acts = layer.lora_method[name].acts(layer, name, x) | (self.index != k)[:, None]  # N T
            x = torch.where(acts[..., None], x, torch.zeros_like(x))
        return x

    def _add_linear(self, y: Tensor, x: Tensor) -> Tensor:
        """y with each row's product added to it, in place where the dtype is that of the update."""
        dtype = update_dtype(x, self.A)
        x3 = x.to(dtype).reshape(len(x), -1, x.shape[-1])  # N T d_in
        y3 = y.to(dtype).view(len(x), -1, y.shape[-1])  # N T d_out
        A, B = self.A.to(dtype), self.B.to(dtype)
        if self.grouped.numel() * x3.shape[1] < len(x) * A.shape[1]:
            # Few tokens: sort the rows by adapter, which moves fewer vectors than giving each row its A and B.
            K, M = self.grouped.shape
            h = x3[self.grouped.view(-1)].reshape(K, -1, x3.shape[-1]) @ A.mT  # K MT R
            return y3.add_((h @ B).view(K * M, -1, y3.shape[-1])[self.place]).view(y.shape)
        return y3.baddbmm_(x3 @ A[self.index].mT, B[self.index]).view(y.shape)

    def _add_any(self, layer: LoraLayer, y: Tensor, x: Tensor) -> Tensor:
        """The same with the product of any kind of layer."""
        own = self.A[self.index], self.B[self.index]  # N R d_in, N R d_out
        return (y + torch.func.vmap(lambda x, A, B: layer.product(x, A, B.t(), 1.0, 0.0))(x, *own)).to(y.dtype)


@torch.no_grad()
def stack(layer: LoraLayer, names: Sequence[str], rows: tuple[Tensor, Tensor, Tensor]) -> RowAdapters:
    """What the rows (`index`, `grouped` and `place`) need of the adapters `names`; those not on the layer change nothing."""
    d_in, d_out = layer.matrix_shape(layer)
    like = layer.factors(next(name for name, method in layer.lora_method.items() if not method.replaces_rows))[0]
    here = [name if name in layer.lora_scaling else None for name in (*names, None)]
    nothing = like.new_zeros(0, d_in), like.new_zeros(d_out, 0)
    pairs = [nothing if name is None else layer.factors(name) for name in here]
    scaling = like.new_tensor([layer.lora_scaling.get(name, 0.0) for name in here])

    def each(value: Callable[[str], Tensor | None], otherwise: Tensor) -> Tensor | None:
        own = [None if name is None else value(name) for name in here]
        if all(tensor is None for tensor in own):
            return None
        return torch.stack([otherwise if tensor is None else tensor.to(like) for tensor in own])

    return RowAdapters(
        *(tensor.to(like.device) for tensor in rows),
        pad_sequence([A for A, _ in pairs], batch_first=True),
        pad_sequence([B.t() for _, B in pairs], batch_first=True).mul_(scaling[:, None, None]),
        each(layer.row_scale, like.new_ones(d_out)),
        each(layer.own_bias, like.new_zeros(d_out)),
        tuple((k, name) for k, name in enumerate(here) if name is not None and layer.lora_method[name].reads_text),
    )


def check_rows(x: Tensor, index: Tensor) -> None:
    """Raises a StateError unless the first dimension of x is the rows of the batch."""
    if x.shape[:1] != index.shape:
        several = x.dim() > 0 and len(x) > len(index) and not len(x) % len(index)
        beams = f"; with num_beams or num_return_sequences name each row {len(x) // len(index)} times on end" if several else ""
        raise StateError(
            f"a mixed batch of {len(index)} rows reached a layer with an input of {tuple(x.shape)}, whose first dimension "
            f"must be the rows{beams}"
        )
