"""The layers of an adapter as lines: one for each kind of module, or one for each layer.

Example:
    modules                      layers  rank  scaling       |D|            effective rank
    layers.*.self_attn.q_proj         4     8        2    0.5213  ########            6.31
    layers.*.mlp.up_proj              4     8        2    0.1303  ##                  7.02
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import printable

#: The longest bar.
WIDTH = 8
#: What the columns mean.
LEGEND = (
    "|D|: how much the adapter changes a weight W, the Frobenius norm of D in W + D, a mean over the layers of a line; "
    "its bar is a share of the largest.\n"
    "effective rank: how many directions of D count, from 1 to the rank."
)


@dataclass(frozen=True)
class LayerView:
    """One layer: its rank, scaling, |D| and effective rank; the last two are NaN if the factors are not finite."""

    path: str
    rank: int
    scaling: float
    norm: float
    effective_rank: float


def kind(path: str) -> str:
    """What layers of the same kind have in common: the path with its numbers left open. fc1 and fc2 are two kinds."""
    return re.sub(r"(?<![^\W_])\d+(?![^\W_])", "*", path)


def by_kind(layers: Iterable[LayerView]) -> str:
    """A line for each kind of module, with means over its layers; and what the columns mean."""
    groups: dict[str, list[LayerView]] = {}
    for layer in layers:
        groups.setdefault(kind(layer.path), []).append(layer)
    norms = {name: statistics.fmean(layer.norm for layer in group) for name, group in groups.items()}
    largest = max(filter(math.isfinite, norms.values()), default=0.0)
    lines = []
    for name, group in groups.items():
        effective = statistics.fmean(layer.effective_rank for layer in group)
        ranks, scalings = _range(v.rank for v in group), _range(v.scaling for v in group)
        bar = "#" * math.ceil(WIDTH * norms[name] / largest) if largest and math.isfinite(norms[name]) else ""
        lines.append((name, str(len(group)), ranks, scalings, f"{norms[name]:.4g}", bar, f"{effective:.2f}"))
    return f"{_table(('modules', 'layers', 'rank', 'scaling', '|D|', '', 'effective rank'), lines)}\n\n{LEGEND}"


def each(layers: Iterable[LayerView]) -> str:
    """A line for each layer."""
    cells = [(v.path, str(v.rank), f"{v.scaling:.4g}", f"{v.norm:.4g}", f"{v.effective_rank:.2f}") for v in layers]
    return _table(("layer", "rank", "scaling", "|D|", "effective rank"), cells)


def _range(values: Iterable[float]) -> str:
    """One value, or the smallest and the largest."""
    numbers = sorted(set(values))
    return " to ".join(f"{number:.4g}" for number in dict.fromkeys((numbers[0], numbers[-1])))


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: names and bars to the left, numbers to the right. Names are out of somebody's file."""
    rows = [header, *([printable(line[0]), *line[1:]] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {i for i, name in enumerate(header) if i == 0 or not name}
    shown = (zip(row, widths, strict=True) for row in rows)
    return "\n".join(
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(row)) for row in shown
    )
