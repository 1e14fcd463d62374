"""The figures show what was measured, all of it, and no text lies on another."""

import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from experiments import figures, measured
from experiments.recipes import METHODS
from experiments.sweep import Setting
from tests.support import fabricated


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Every method, with accuracies of their own; LoRA with two seeds."""
    made = [fabricated.metrics(name, 0.5 + i / 30, peak_rss_mb=500.0 + 100 * i) for i, name in enumerate(METHODS)]
    made.append(fabricated.metrics("lora", 0.7, seed=1))
    (found,) = measured.grouped(measured.read(fabricated.write(tmp_path_factory.mktemp("runs"), *made)))
    return found


@pytest.fixture
def close():
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def texts(figure):
    """Every text that is drawn: of ticks, those within the limits."""
    found = [*figure.texts, figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        found += [axes.xaxis.label, axes.yaxis.label, axes._left_title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)  # a shared axis has no labels
            found += [label for place, label in ticks if low <= place <= high and label.get_visible()]
    return [text for text in found if text is not None and text.get_text().strip()]


def overlapping(figure):
    """Pairs of texts whose boxes share more than a pixel."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in texts(figure)]
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


@pytest.mark.parametrize("plot", figures.FIGURES, ids=lambda plot: plot.__name__)
def test_no_text_lies_on_another_and_axes_are_labelled(group, plot, close):
    figure = plot(group)
    assert not overlapping(figure)
    assert {row.label for row in group.rows[1:]} <= {text.get_text().partition("  ")[0] for text in texts(figure)}
    assert all(axes.get_xlabel() for axes in figure.axes) or figure._supxlabel


def test_accuracies_stand_where_they_belong(group, close):
    figure = figures.accuracy_comparison(group)
    (axes,) = figure.axes
    points = [container[0].get_xydata()[0] for container in axes.containers]
    assert [tuple(point) for point in points] == [(row.accuracy, y) for y, row in enumerate(group.rows)]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(METHODS)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row on top
    low, high = group.rows[3].interval
    (segment,) = axes.containers[3][2][0].get_segments()
    assert np.allclose(segment[:, 0], (low, high))


def test_each_method_stands_where_it_is_with_its_name_beside_it(group, close):
    figure = figures.parameter_efficiency(group)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    points = {line.get_label(): tuple(line.get_xydata()[0]) for line in axes.lines}
    assert points == {row.label: (295_682, row.accuracy) for row in group.rows[1:]}  # the fabricated runs all say so
    assert {text.get_text(): text.xy for text in axes.texts} == points
    names = sorted(axes.texts, key=lambda text: text.get_position()[1])
    assert [name.get_text() for name in names] == sorted(points, key=lambda name: points[name][1])


@pytest.mark.parametrize(
    ("heights", "found"),
    [([1, 2, 3], [1, 2, 3]), ([1, 1], [0.75, 1.25]), ([0, 0.1, 5], [-0.2, 0.3, 5]), ([1, 1, 1, 1.2], [0.3, 0.8, 1.3, 1.8])],
)
def test_names_are_moved_as_little_as_it_takes(heights, found):
    assert figures._spread(heights, 0.5) == pytest.approx(found)


def test_names_that_would_meet_are_spread_together():
    assert figures._clusters([300, 10, 310, 80, 12]) == [[1, 4], [3], [0, 2]]


def test_bars_are_the_memory_that_was_measured(group, close):
    figure = figures.memory_usage(group)
    weights, peaks = figure.axes
    assert [bar.get_width() for bar in peaks.patches] == [row.most("peak_rss_mb") for row in group.rows]
    assert [bar.get_width() for bar in weights.patches] == pytest.approx([90_855_944 / 2**20] * len(group.rows))


def test_a_gpu_gets_a_panel(tmp_path, close):
    made = [fabricated.metrics("lora", peak_cuda_mb=321.0), fabricated.metrics("qlora", peak_cuda_mb=300.0)]
    (found,) = measured.grouped(measured.read(fabricated.write(tmp_path, *made)))
    axes = figures.memory_usage(found).axes[2]
    assert "GPU" in axes.get_xlabel() and [bar.get_width() for bar in axes.patches] == [321, 300]


def test_each_method_has_a_panel_of_its_own_and_the_others_behind_it(group, close):
    panels = [axes for axes in figures.training_curves(group).axes if axes.get_visible()]
    assert [axes.lines[-1].get_label() for axes in panels] == [row.label for row in group.rows[1:]]
    for axes, row in zip(panels, group.rows[1:], strict=True):
        assert len(axes.lines) == len(METHODS) and axes.lines[-1].get_xdata()[-1] == 6300
        assert len({line.get_color() for line in axes.lines}) == 2  # its own over the others' grey
        assert axes.get_title("left") == f"{row.label}  85.0, 86.0, {100 * row.accuracy:.1f} %"


def test_a_spread_of_peaks_is_shown(group, close, tmp_path):
    made = [fabricated.metrics("lora", seed=seed, peak_rss_mb=peak) for seed, peak in ((0, 900.0), (1, 1000.0))]
    (found,) = measured.grouped(measured.read(fabricated.write(tmp_path, *made)))
    _, axes = figures.memory_usage(found).axes
    assert axes.patches[0].get_width() == 1000
    assert axes.collections[0].get_segments()[0][:, 0].tolist() == [900, 1000]


def test_smoothing_keeps_ends_and_means():
    assert figures._smooth(np.arange(9.0), width=3).tolist() == [0.5, 1, 2, 3, 4, 5, 6, 7, 7.5]


def test_every_method_has_a_look_of_its_own():
    assert set(figures.STYLES) == set(METHODS)
    for looks in zip(*figures.STYLES.values(), strict=True):
        assert len(set(looks)) == len(METHODS)  # colours and markers


def test_a_sweep_s_figure_marks_the_best(tmp_path, close):
    rows = [
        Setting(r, a, 0.1, 1e-4 * r).cells() | {"accuracy": 0.8 + r / 100 - a / 1e4}
        for r, a in itertools.product((4, 8), (16, 32))
    ]
    figure = figures.sweep(rows)
    assert not overlapping(figure)
    assert [axes.get_xlabel() for axes in figure.axes] == ["rank", "alpha", "dropout", "learning rate / 1e-4"]
    stars = [tuple(axes.collections[1].get_offsets()[0]) for axes in figure.axes]
    assert np.allclose(stars, [(x, 0.8784) for x in (8, 16, 0.1, 8)])
    figures.draw_sweep(rows, tmp_path / "sweep.png")
    assert imread(tmp_path / "sweep.png").shape[1] > 800


def test_a_sweep_over_targets_and_lora_plus_shows_them(close):
    rows = [
        Setting(8, 16, 0.1, 1e-4, plus, targets).cells() | {"accuracy": 0.8 + plus / 100}
        for plus, targets in itertools.product((1, 4, 16), ((), ("query", "value"), ("all-linear",)))
    ]
    figure = figures.sweep(rows)
    assert not overlapping(figure)
    assert figure.axes[-1].get_xlabel() == "LoRA+ ratio"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["the method's layers", "all-linear", "query value", "best trial"]


def test_files_are_named_after_what_they_show(group, tmp_path):
    paths = figures.draw(group, tmp_path / "figures")
    names = ["accuracy_comparison", "parameter_efficiency", "memory_usage", "training_curves"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        image = imread(path)
        assert image.shape[1] > 800 and image[..., :3].std() > 0.05  # wide enough for a README, and not blank
