"""What a cast to 16 bits, or packing in 4 bits, does to an update that was folded into a weight.

The weight W becomes W + D, and what is stored stands for M. Two measures, in Frobenius norms and inner products:

    lost    |M - (W + D)| / |D|        how far off the result is, with what rounding does to W itself
    kept    <M - M0, D> / |D|^2        how much of the update there is: 1 all of it, 0 nothing

M0 is what is stored of W without the update. A weight on a coarse grid snaps back after a small update: then M = M0, and the
model answers as its base, though `lost` is no larger than rounding makes it anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import MergeError

#: Of an update this share must be kept in every layer, unless the user allows less; and below the second nothing is left.
ENOUGH, NOTHING = 0.5, 0.05


class Cost(NamedTuple):
    """The two measures for one layer; those of a sum that was stored as it is by default."""

    lost: float = 0.0
    kept: float = 1.0


def cost(exact: Tensor, base: Tensor, merged: Tensor, before: Tensor) -> Cost:
    """The measures for W + D, W, M and M0, all of one shape; row by row in blocks, without another tensor of their size."""
    rows = max(1, 2**18 // max(1, exact[:1].numel()))
    error = product = size = torch.zeros((), dtype=torch.float64, device=exact.device)
    for total, W, M, M0 in zip(*(t.split(rows) for t in (exact, base, merged, before)), strict=True):
        D, M = total - W, M.to(total.dtype)
        error = error + (M - total).square().sum(dtype=torch.float64)
        product = product + (D * (M - M0.to(total.dtype))).sum(dtype=torch.float64)
        size = size + D.square().sum(dtype=torch.float64)
    return Cost((error / size).sqrt().item(), (product / size).item()) if size > 0 else Cost()


def describe_loss(kept: Mapping[str, float]) -> str | None:
    """In words, in how many layers less than `ENOUGH` of the update is left; None if in none."""
    nothing = sum(share < NOTHING for share in kept.values())
    little = sum(share < ENOUGH for share in kept.values()) - nothing
    parts = [f"nothing of the adapter is left in {_layers(nothing, kept)}"] if nothing else []
    parts += [f"less than half of it in {_layers(little, kept)}"] if little else []
    return " and ".join(parts) or None


def refuse_loss(kept: Mapping[str, float], remedy: str) -> None:
    """Raises a MergeError if in any layer less than `ENOUGH` of the update is kept."""
    if words := describe_loss(kept):
        worst = min(kept, key=kept.get)
        raise MergeError(f"{words} ({worst} keeps {max(kept[worst], 0):.0%}); {remedy}; nothing was merged")


def _layers(count: int, kept: Mapping[str, float]) -> str:
    return f"{count} of {len(kept)} layers"
