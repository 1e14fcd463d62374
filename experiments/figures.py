"""The study's figures, of the rows of one budget: accuracy, efficiency, memory, and the course of training.

Each is readable at the width of a README. Colours are Okabe and Ito's, which stay apart for the colour-blind; markers and
dashes say the same again. Whiskers are 95 % Wilson intervals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from .measured import Group, Row, percent

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

SIZE = (8, 4.2)
GRID = {"color": "#DDDDDD", "linewidth": 0.8}
#: (colour, marker, dashes) of each method.
STYLES = {
    "base": ("#777777", "x", ":"),
    "head-only": ("#777777", "p", "--"),
    "full": ("#E69F00", "D", "-"),
    "lora": ("#0072B2", "o", "-"),
    "qlora": ("#D55E00", "s", "-"),
    "low-rank": ("#56B4E9", "v", "--"),
    "high-rank": ("#56B4E9", "^", "-"),
    "query-only": ("#009E73", "P", "-"),
    "bias": ("#CC79A7", "X", "-"),
    "rslora": ("#009E73", "<", "--"),
    "dora": ("#CC79A7", "*", "--"),
    "best": ("#000000", ">", "-"),
}
OTHER = ("#000000", "h", "-.")
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
    """Accuracy of each method, one line each."""
    figure, axes = pyplot.subplots(figsize=(SIZE[0], 1.2 + 0.32 * len(group.rows)), layout="constrained")
    for y, row in enumerate(group.rows):
        colour, marker, _ = _style(row)
        axes.errorbar(row.accuracy, y, xerr=_whiskers(row), color=colour, marker=marker, **_POINT)
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
    """Accuracy against the parameters trained, the head included."""
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    rows = [row for row in group.rows if row.mean("trainable_parameters")]
    for row in rows:
        colour, marker, _ = _style(row)
        # Methods of equal size stand side by side, a fifth apart: on one spot each would hide the others.
        same = [other for other in rows if _near(other, row)]
        x = row.mean("trainable_parameters") * 1.22 ** (same.index(row) - (len(same) - 1) / 2)
        axes.errorbar(x, row.accuracy, yerr=_whiskers(row), color=colour, marker=marker, label=row.label, **_POINT)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("trained parameters, head included (log scale; like ones are drawn side by side)")
    axes.set_ylabel("validation accuracy")
    _clean(axes, "both")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def memory_usage(group: Group) -> pyplot.Figure:
    """What the base's weights take, and the peak of the whole process: each panel on a scale of its own."""
    panels = [("base_weight_bytes", "base weights, MiB", 2**20), ("peak_rss_mb", "peak of the process, MiB", 1)]
    if all(row.most("peak_cuda_mb") is not None for row in group.rows):
        panels.append(("peak_cuda_mb", "peak of the GPU, MiB", 1))
    height = 1.2 + 0.32 * len(group.rows)
    figure, grid = pyplot.subplots(1, len(panels), figsize=(SIZE[0], height), sharey=True, layout="constrained")
    for axes, (key, label, unit) in zip(grid, panels, strict=True):
        values = [row.most(key) / unit for row in group.rows]
        bars = axes.barh(range(len(values)), values, color=[_style(row)[0] for row in group.rows], height=0.65)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axes.set_xlim(0, 1.16 * max(values))
        axes.set_xlabel(label)
        _clean(axes, "x")
    _names(grid[0], group)
    return figure


def training_curves(group: Group) -> pyplot.Figure:
    """Training loss over the run, and accuracy after each epoch; the mean of the seeds."""
    figure, (loss, accuracy) = pyplot.subplots(1, 2, figsize=SIZE, layout="constrained", width_ratios=(3, 2))
    for row in group.rows:
        histories = [np.array(run["loss_history"]) for run in row.runs]
        if not all(len(history) for history in histories):
            continue
        colour, marker, dashes = _style(row)
        points = min(map(len, histories))
        steps = histories[0][:points, 0]
        mean = np.mean([history[:points, 1] for history in histories], axis=0)
        loss.plot(steps, _smooth(mean), color=colour, linestyle=dashes, linewidth=1.4, label=row.label)
        epochs = np.mean([run["accuracy_by_epoch"] for run in row.runs], axis=0)
        accuracy.plot(
            range(1, len(epochs) + 1), epochs, color=colour, linestyle=dashes, linewidth=1.4, marker=marker, markersize=5
        )
    loss.set_xlabel("step")
    loss.set_ylabel("training loss, smoothed")
    accuracy.set_xlabel("epoch")
    accuracy.set_ylabel("validation accuracy")
    accuracy.set_xticks(range(1, group.budget.epochs + 1))
    accuracy.set_xlim(0.8, group.budget.epochs + 0.2)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    for axes in (loss, accuracy):
        _clean(axes, "both")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    return figure


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


def _style(row: Row) -> tuple[str, str, str]:
    return STYLES.get(row.label, OTHER)


def _whiskers(row: Row) -> list[list[float]]:
    low, high = row.interval
    return [[row.accuracy - low], [high - row.accuracy]]


def _near(a: Row, b: Row) -> bool:
    """Whether two rows train so nearly the same number that their marks would touch."""
    return abs(np.log(a.mean("trainable_parameters") / b.mean("trainable_parameters"))) < 0.1


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
