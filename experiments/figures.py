"""The study's figures, of the rows of one budget: accuracy, efficiency, memory, and the course of training.

Each is readable at the width of a README. Colours are Paul Tol's, which stay apart for the colour-blind; no two methods share
one, and names beside the marks say the same again. Whiskers are 95 % Wilson intervals.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from .measured import Group, Row, percent

if "matplotlib.pyplot" not in sys.modules:  # a notebook has chosen already where its pictures go
    matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

SIZE = (8, 4.2)
GRID = {"color": "#DDDDDD", "linewidth": 0.8}
#: (colour, marker) of each method, no two alike.
STYLES = {
    "base": ("#777777", "x"),
    "head-only": ("#DDCC77", "p"),
    "full": ("#000000", "D"),
    "lora": ("#332288", "o"),
    "qlora": ("#EE7733", "s"),
    "low-rank": ("#88CCEE", "v"),
    "high-rank": ("#117733", "^"),
    "query-only": ("#CC6677", "P"),
    "bias": ("#AA4499", "X"),
    "rslora": ("#44AA99", "<"),
    "dora": ("#999933", "*"),
    "best": ("#882255", ">"),
}
OTHER = ("#555555", "h")
#: Of a sweep's sets of targets.
TARGETS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00")


def draw(group: Group, directory: Path) -> list[Path]:
    """Writes every figure into `directory`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    return [_figure(plot, group, directory / f"{plot.__name__}.png") for plot in FIGURES]


def _figure(plot: Callable[[Group], pyplot.Figure], group: Group, path: Path) -> Path:
    figure = plot(group)
    figure.suptitle(str(group.budget), fontsize=9, color="#555555")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def accuracy_comparison(group: Group) -> pyplot.Figure:
    """Accuracy of each method, one line each; where there are several seeds, a dot for each."""
    figure, axes = pyplot.subplots(figsize=(SIZE[0], 1.2 + 0.32 * len(group.rows)), layout="constrained")
    for y, row in enumerate(group.rows):
        colour, marker = _style(row)
        axes.errorbar(row.accuracy, y, xerr=_whiskers(row), color=colour, marker=marker, **_POINT)
        if len(row.runs) > 1:
            axes.scatter(row.all("accuracy"), [y + 0.3] * len(row.runs), s=8, color=colour, linewidths=0)
        axes.annotate(
            percent(row.accuracy), (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    _names(axes, group)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("validation accuracy, with its 95 % interval")
    _clean(axes, "x")
    return figure


def parameter_efficiency(group: Group) -> pyplot.Figure:
    """Accuracy against the parameters trained, the head included: each method where it is, with its name beside it."""
    figure, axes = pyplot.subplots(figsize=(SIZE[0], 5.2), layout="constrained")
    rows = [row for row in group.rows if row.mean("trainable_parameters")]
    if not rows:
        axes.text(0.5, 0.5, "no method trained anything", ha="center", transform=axes.transAxes)
        return figure
    places = [(row.mean("trainable_parameters"), row.accuracy) for row in rows]
    heights = [y for _, y in places]
    apart = 0.042 * max(max(heights) - min(heights), 0.02)  # of two names, so that they can be read
    for row, (x, y) in zip(rows, places, strict=True):
        colour, marker = _style(row)
        axes.plot(x, y, color=colour, marker=marker, markersize=6, linestyle="none", markerfacecolor="none", label=row.label)
    for beside in _clusters([x for x, _ in places]):
        alone = len(beside) == 1  # the names of several stand on the left, where fewer marks are
        edge = max(places[i][0] for i in beside) * 1.35 if alone else min(places[i][0] for i in beside) / 1.35
        order = sorted(beside, key=lambda i: places[i][1])
        for i, height in zip(order, _spread([places[i][1] for i in order], apart), strict=True):
            colour = _style(rows[i])[0]
            axes.annotate(
                rows[i].label, places[i], xytext=(edge, height), fontsize=9, va="center", ha="left" if alone else "right",
                color=colour, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(min(x for x, _ in places) / 2, max(x for x, _ in places) * 4)
    axes.margins(y=0.1)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("trained parameters, head included (log scale)")
    axes.set_ylabel("validation accuracy")
    _clean(axes, "both")
    return figure


def memory_usage(group: Group) -> pyplot.Figure:
    """What the base's weights take, and the largest peak of the whole process, with the least: each panel on its own scale."""
    panels = [("base_weight_bytes", "base weights, MiB", 2**20), ("peak_rss_mb", "peak of the process, MiB", 1)]
    if all(row.most("peak_cuda_mb") is not None for row in group.rows):
        panels.append(("peak_cuda_mb", "peak of the GPU, MiB", 1))
    height = 1.2 + 0.32 * len(group.rows)
    figure, grid = pyplot.subplots(1, len(panels), figsize=(SIZE[0], height), sharey=True, layout="constrained")
    for axes, (key, label, unit) in zip(grid, panels, strict=True):
        values = [row.most(key) / unit for row in group.rows]
        least = [min(row.all(key)) / unit for row in group.rows]
        bars = axes.barh(range(len(values)), values, color=[_style(row)[0] for row in group.rows], height=0.65)
        axes.hlines(range(len(values)), least, values, color="white", linewidth=2)  # of one seed it has no length
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axes.set_xlim(0, 1.16 * max(values))
        axes.set_xlabel(label)
        _clean(axes, "x")
    _names(grid[0], group)
    return figure


def training_curves(group: Group) -> pyplot.Figure:
    """Training loss over the run, the mean of the seeds: a panel for each method, the others grey behind it, and above it the
    accuracy after each epoch."""
    rows = [row for row in group.rows if all(len(run["loss_history"]) for run in row.runs)]
    columns = min(4, max(1, len(rows)))
    lines = max(1, math.ceil(len(rows) / columns))
    size = (SIZE[0], 1.0 + 1.5 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    curves = [_loss(row) for row in rows]
    for axes, row, (steps, loss) in zip(grid.flat, rows, curves, strict=False):
        for other_steps, other in curves:
            axes.plot(other_steps, other, color="#DDDDDD", linewidth=0.8)
        axes.plot(steps, loss, color=_style(row)[0], linewidth=1.8, label=row.label)
        epochs = np.mean([run["accuracy_by_epoch"] for run in row.runs], axis=0)
        axes.set_title(f"{row.label}  " + ", ".join(f"{100 * share:.1f}" for share in epochs) + " %", fontsize=8, loc="left")
        axes.tick_params(labelsize=8)
        _clean(axes, "y")
    for axes in list(grid.flat)[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("step; above, accuracy after each epoch", fontsize=9)
    figure.supylabel("training loss, smoothed", fontsize=9)
    return figure


def _loss(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of the seeds' losses there, smoothed."""
    histories = [np.array(run["loss_history"]) for run in row.runs]
    points = min(map(len, histories))
    return histories[0][:points, 0], _smooth(np.mean([history[:points, 1] for history in histories], axis=0))


def draw_sweep(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Writes the figure of a sweep's trials."""
    figure = sweep(rows)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def sweep(rows: Sequence[Mapping[str, float]]) -> pyplot.Figure:
    """Accuracy of a sweep's trials against each setting, the best trial marked; a colour for each set of targets."""
    settings = {name: (name, 1) for name in ("rank", "alpha", "dropout")} | {"learning_rate": ("learning rate / 1e-4", 1e4)}
    if len({row["lora_plus"] for row in rows}) > 1:
        settings["lora_plus"] = ("LoRA+ ratio", 1)
    targets = sorted({row["targets"] for row in rows})
    figure, grid = pyplot.subplots(1, len(settings), figsize=(SIZE[0], 2.8), sharey=True, layout="constrained")
    best = max(rows, key=lambda row: row["accuracy"])
    for axes, (name, (label, unit)) in zip(grid, settings.items(), strict=True):
        values = sorted({row[name] for row in rows})
        for chosen, colour, marker in zip(targets, itertools.cycle(TARGETS), itertools.cycle("osv^"), strict=False):
            some = [row for row in rows if row["targets"] == chosen]
            x, y = [unit * row[name] for row in some], [row["accuracy"] for row in some]
            group = (chosen or "the method's layers") if len(targets) > 1 else None
            axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.7, label=group)
        axes.scatter(unit * best[name], best["accuracy"], s=90, marker="*", color="#D55E00", zorder=3, label="best trial")
        axes.set_xlabel(label)
        if name in ("rank", "alpha", "lora_plus"):  # few values, each a multiple of the last
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.set_xlim(values[0] / 1.4, values[-1] * 1.4)
        _clean(axes, "both")
    grid[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    grid[0].set_ylabel("accuracy on held-out\ntraining sentences")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9)
    return figure


FIGURES = (accuracy_comparison, parameter_efficiency, memory_usage, training_curves)
_POINT = {"markersize": 7, "linestyle": "none", "capsize": 3, "elinewidth": 1.2}


def _style(row: Row) -> tuple[str, str]:
    return STYLES.get(row.label, OTHER)


def _whiskers(row: Row) -> list[list[float]]:
    low, high = row.interval
    return [[row.accuracy - low], [high - row.accuracy]]


def _clusters(values: Sequence[float]) -> list[list[int]]:
    """Indices of positive values, those whose names would meet together: a value within a factor of 1.6 of the one before."""
    found: list[list[int]] = []
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        if found and values[i] < 1.6 * values[found[-1][-1]]:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _spread(heights: Sequence[float], apart: float) -> np.ndarray:
    """Rising heights moved as little as it takes to stand `apart` from each other."""
    rank = np.arange(len(heights)) * apart
    level = np.asarray(heights) - rank  # must rise as well; where it falls, a block shares its mean (isotonic regression)
    blocks: list[list[float]] = []
    for value in level:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return np.concatenate([[np.mean(block)] * len(block) for block in blocks]) + rank


def _smooth(values: np.ndarray, width: int = 7) -> np.ndarray:
    """A running mean over up to `width` points, fewer at the ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _names(axes: pyplot.Axes, group: Group) -> None:
    axes.set_yticks(range(len(group.rows)), [row.label for row in group.rows])
    axes.set_ylim(len(group.rows) - 0.4, -0.6)


def _clean(axes: pyplot.Axes, grid: str) -> None:
    axes.grid(axis=grid, **GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
