"""What one layer needs for a batch whose rows use different adapters; see `mixed_batch`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import StateError


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of a batch whose rows use different ones, on one layer; see `mixed_batch`.

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
    """

    index: Tensor
    grouped: Tensor
    place: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor | None
    bias: Tensor | None


def check_rows(x: Tensor, index: Tensor) -> None:
    """Raises a StateError unless the first dimension of x is the rows of the batch."""
    if x.shape[:1] != index.shape:
        several = x.dim() > 0 and len(x) > len(index) and not len(x) % len(index)
        beams = f"; with num_beams or num_return_sequences name each row {len(x) // len(index)} times on end" if several else ""
        raise StateError(
            f"a mixed batch of {len(index)} rows reached a layer with an input of {tuple(x.shape)}, whose first dimension "
            f"must be the rows{beams}"
        )
