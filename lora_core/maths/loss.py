"""What a cast to 16 bits, or packing in 4 bits, does to an update that was folded into a weight.

The weight W becomes W + D, and what is stored stands for M. Two measures, in Frobenius norms and inner products:

    lost    |M - (W + D)| / |D|        how far off the result is, with what rounding does to W itself
    kept    <M - M0, D> / |D|^2        how much of the update there is: 1 all of it, 0 nothing

M0 is what is stored of W without the update. A weight on a coarse grid snaps back after a small update: then M = M0, and the
model answers as its base, though `lost` is no larger than rounding makes it anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import StateError

#: Of an update this share must be kept in every layer, unless the user allows less; and below the second nothing is left.
ENOUGH, NOTHING = 0.5, 0.05


class Cost(NamedTuple):
    """The two measures for one layer; those of a sum that was stored as it is by default."""

    lost: float = 0.0
    kept: float = 1.0


def cost(exact: Tensor, base: Tensor, merged: Tensor, before: Tensor | None = None) -> Cost:
    """The measures for W + D (float32 or wider), W, M and M0, all of one shape; None: M0 is W.

    In blocks of rows, without another tensor of their size: with E = M - (W + D) and F = W - M0,
    <M - M0, D> = |D|^2 + <E, D> + <F, D>.
    """
    rows = max(1, 2**18 // max(1, exact[:1].numel()))
    parts = zip(*(t.split(rows) for t in (exact, base, merged, base if before is None else before)), strict=True)
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")  # |D|^2, |E|^2, <E + F, D>
    for total, W, M, M0 in parts:
        W = W.to(total.dtype)
        D, E = (total - W).flatten(), (M.to(total.dtype) - total).flatten()
        moved = E if before is None else E + (W - M0.to(total.dtype)).flatten()
        sums += torch.stack([D @ D, E @ E, moved @ D]).double().cpu()
    size, error, product = sums.tolist()
    return Cost(math.sqrt(error / size), 1 + product / size) if size > 0 else Cost()


def cost_of_cast(trained: Tensor, base: Tensor, stored: Tensor) -> Cost:
    """The measures for a tensor that was trained whole, from `base`, and is stored in fewer bits; of one shape."""
    wide = torch.promote_types(trained.dtype, torch.float32)
    exact, base, stored = (t.detach().to(trained.device).flatten() for t in (trained.detach().to(wide), base, stored))
    return cost(exact, base, stored, base.to(stored.dtype))


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in another dtype.

    Raises:
        StateError: it is finite, and would not be in `dtype`.
    """
    result = tensor.to(dtype)
    refuse_overflow(tensor, result, name)
    return result


def refuse_overflow(tensor: Tensor, result: Tensor, name: str) -> None:
    """Raises a StateError if `tensor`, called `name`, is finite, and `result`, the same in another dtype, is not."""
    narrower = result.is_floating_point() and result.dtype.itemsize < tensor.dtype.itemsize
    if narrower and not is_finite(result) and is_finite(tensor):
        raise overflow(name, result.dtype)


def overflow(name: str, dtype: torch.dtype) -> StateError:
    """What is raised for a tensor that does not fit a dtype."""
    return StateError(
        f"{name} overflows {str(dtype).removeprefix('torch.')}; use bfloat16 (dtype=torch.bfloat16, --dtype bfloat16); nothing "
        "was changed or written"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())  # one pass, and NaN comes through


def describe_loss(kept: Mapping[str, float]) -> str | None:
    """In words, in how many layers less than `ENOUGH` of the update is left; None if in none."""
    nothing = sum(share < NOTHING for share in kept.values())
    little = sum(share < ENOUGH for share in kept.values()) - nothing
    parts = [f"nothing of the adapter is left in {_layers(nothing, kept)}"] if nothing else []
    parts += [f"less than half of it in {_layers(little, kept)}"] if little else []
    return " and ".join(parts) or None


def refuse_loss(kept: Mapping[str, float], remedy: str) -> None:
    """Raises a StateError if in any layer less than `ENOUGH` of the update is kept."""
    if words := describe_loss(kept):
        worst = min(kept, key=kept.get)
        raise StateError(f"{words} ({worst} keeps {max(kept[worst], 0):.0%}); {remedy}; nothing was merged")


def _layers(count: int, kept: Mapping[str, float]) -> str:
    return f"{count} of {len(kept)} layers"
