"""The chart of `overhead`: forward + backward over the frozen layer, against rank, width and tokens.

One column for each of the three, one row without dropout and one with; each line moves one of them and leaves the others
in the middle of the grid (768x768, r=16, 1,024 tokens). The floor is what the multiplications alone would cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from .measure import Measure
from .peers import PEFT_16

matplotlib.use("Agg")
from matplotlib import pyplot

#: Okabe and Ito's colours, which stay apart for the colour-blind; markers and dashes say the same again.
STYLES = {
    "peft": ("peft", "#D55E00", "s", "-"),
    PEFT_16: ("peft, adapters in 16 bits", "#56B4E9", "v", "-"),
    "loralib": ("loralib", "#CC79A7", "^", "-"),
    "full": ("full fine-tuning", "#E69F00", "D", "-"),
    "ours": ("lora_core", "#0072B2", "o", "-"),
    "floor": ("floor: multiplications alone", "#555555", "", "--"),
}
AXES = {"r": "rank", "width": "width (d_in x d_out)", "tokens": "tokens"}


def draw(measures: Sequence[Measure], path: Path) -> bool:
    """Writes the chart to `path` (.png or .svg); returns whether `measures` had anything to draw."""
    points = [_point(m) for m in measures if "backward" in m.setting and m.setting["backward"] and not m.setting["nf4"]]
    if not points:
        return False
    middle = {axis: _middle([p[axis] for p in points]) for axis in AXES}
    dropouts = sorted({p["dropout"] for p in points})
    figure, grid = pyplot.subplots(
        len(dropouts), len(AXES), figsize=(9.5, 3.1 * len(dropouts)), sharey="row", squeeze=False, layout="constrained"
    )
    for row, dropout in zip(grid, dropouts, strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            others = [a for a in AXES if a != axis]
            line = [p for p in points if p["dropout"] == dropout and all(p[a] == middle[a] for a in others)]
            _panel(axes, axis, sorted(line, key=lambda p: p[axis]), f"dropout {dropout:g}" if dropout else "no dropout")
        row[0].set_ylabel("time over the frozen layer")
        row[0].set_ylim(bottom=min(0.95, *(p[name] - 0.05 for p in points for name in STYLES if name in p)))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _point(measure: Measure) -> dict:
    """Where a measure lies on the axes, and its ratios; a width sorts by the size of its matrix."""
    s = measure.setting
    ratios = {name.removesuffix(" / frozen"): r.value for name, r in measure.ratios.items() if name.endswith("/ frozen")}
    width = (s["d_in"] * s["d_out"], s["d_in"], s["d_out"])
    return {"r": s["r"], "width": width, "tokens": s["tokens"], "dropout": s["dropout"], **ratios}


def _middle(values: list) -> object:
    """The value that most measures share: the one through which the lines run."""
    return max(sorted(set(values)), key=values.count)


def _panel(axes: pyplot.Axes, axis: str, line: list[dict], title: str) -> None:
    ticks = [f"{p[axis][1]}x{p[axis][2]}" if axis == "width" else f"{p[axis]:,}" for p in line]
    for name, (label, colour, marker, dashes) in STYLES.items():
        drawn = [(i, p[name]) for i, p in enumerate(line) if name in p]
        if not drawn:
            continue
        look = {"color": colour, "marker": marker, "linestyle": dashes, "linewidth": 1.8, "markersize": 5}
        axes.plot(*zip(*drawn, strict=True), label=label, **look)
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_xlabel(AXES[axis], fontsize=9)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
