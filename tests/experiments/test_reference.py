"""peft's rows: which replaces which, whose peak is taken, and what a table of engine x harness says."""

import pytest

from experiments import measured, predictions, provenance, reference
from experiments.errors import ExperimentError
from tests.support import fabricated


def row(engine="peft", harness="plain", method="qlora", peak=2000.0, train=12_000, epochs=2, **others):
    """A row as `bench.reference_run` makes it, of what is read."""
    made = {"engine": engine, "harness": harness, "method": method, "data": "SST-2", "train": train, "seed": 0}
    return made | {"settings": {"epochs": epochs}, "peak_rss_mb": peak} | others


def test_a_row_replaces_the_same_work_and_what_has_no_harness():
    new = row()
    assert reference.replaces(new, row(peak=1.0)) and reference.replaces(new, row(harness=None))
    for other in (row(harness="ours"), row("ours"), row(method="lora"), row(train=5), row(epochs=3), row(seed=1)):
        assert not reference.replaces(new, other)


def test_what_stands_beside_is_of_a_plain_trainer_where_there_is_one():
    rows = [row(harness="ours", peak=1800.0), row(peak=2000.0), row("ours", peak=1.0), row(train=5, peak=7.0)]
    assert reference.beside(rows, "qlora", "SST-2", 12_000, 2, "fp32") is rows[1]
    assert reference.beside([row(seed=1), *rows], "qlora", "SST-2", 12_000, 2, "fp32") is rows[1]  # the first seed
    assert reference.beside(rows[:1], "qlora", "SST-2", 12_000, 2, "fp32") is rows[0]
    assert reference.beside(rows, "qlora", "SST-2", 12_000, 3, "fp32") is None  # of as many sentences, and other epochs
    assert reference.beside(rows, "lora", "SST-2", 12_000, 2, "fp32") is None


def test_rows_of_one_precision_are_not_set_beside_those_of_another():
    half = row(settings={"epochs": 2, "precision": "bf16"})
    for computed, theirs in (("fp32", row()), ("bf16", half)):
        assert reference.precision(theirs) == computed
        assert reference.beside([row(), half], "qlora", "SST-2", 12_000, 2, computed) == theirs
    cells = [row(*cell) for cell in (("ours", "ours"), ("ours", "plain"), ("peft", "ours"))]
    assert reference.two_by_two([*cells, half], "qlora") is None and reference.two_by_two([*cells, row()], "qlora")


def test_a_job_of_other_seeds_is_no_cell_of_the_table():
    rows = [row(*cell) for cell in (("ours", "ours"), ("ours", "plain"), ("peft", "ours"), ("peft", "plain"))]
    assert str(reference.two_by_two([*rows, row(seed=1, peak=9.0)], "qlora")) == str(reference.two_by_two(rows, "qlora"))
    assert reference.two_by_two([*rows[:3], row(seed=1)], "qlora") is None


def test_the_gap_is_the_engine_s_and_the_harness_s():
    peaks = {("ours", "ours"): 1000.0, ("ours", "plain"): 1400.0, ("peft", "ours"): 1700.0, ("peft", "plain"): 2300.0}
    rows = [row(*cell, peak=peak) for cell, peak in peaks.items()]
    found = reference.two_by_two([*rows, row("ours", "ours", train=67_349, epochs=3)], "qlora")
    assert (found.engine, found.harness) == (800, 500)
    assert found.engine + found.harness == peaks["peft", "plain"] - peaks["ours", "ours"]
    assert str(found) == (
        "qlora, 12,000 sentences of SST-2 x 2, fp32: peft in a plain Trainer takes +1,300 MiB, of which +800 are the "
        "engine's and +500 the harness's"
    )
    assert reference.two_by_two(rows[:3], "qlora") is None and reference.two_by_two(rows, "lora") is None


def test_rows_survive_the_file(tmp_path):
    rows = [row(), row(harness=None)]
    reference.write(tmp_path / "new" / "reference.json", rows)
    assert reference.read(tmp_path / "new" / "reference.json") == rows
    assert reference.read(tmp_path / "none.json") == []


def test_a_row_says_where_it_comes_from():
    assert reference.source([row(harness=None)]).endswith("seed 0, in a harness that was not kept")
    present = row(versions={"peft": "1.2"}, provenance=provenance.sources())
    assert reference.source([present]) == "peft 1.2, seed 0, in a plain Trainer"
    assert reference.source([present | {"seed": 2}, present]) == "peft 1.2, seeds 0, 2, in a plain Trainer"
    assert reference.source([present, present | {"provenance": None}]).endswith("a plain Trainer, beside other code of ours")


def test_what_a_row_predicted_is_read_strictly():
    assert reference.predicted(row()) is None
    assert reference.predicted(row(validation=3, predicted="011")).tolist() == [0, 1, 1]
    for digits in ("01", "0110", "012", "01é"):
        with pytest.raises(ExperimentError, match="'predicted' must be 3 digits, each 0 or 1"):
            reference.predicted(row(validation=3, predicted=digits))


@pytest.mark.parametrize("made", reference.read(), ids=lambda made: f"{made['engine']}-{made['harness']}-{made['method']}")
def test_the_committed_rows_have_what_is_read(made):
    assert made["engine"] in reference.ENGINES and made["harness"] in (*reference.HARNESSES, None)
    assert 0 < made["accuracy"] < 1 < made["peak_rss_mb"] and made["settings"]["epochs"] and made["base"]
    assert made["validation"] in (872, 853)
    runs = [run for run in measured.read(fabricated.COMMITTED) if run["data"]["sha256"] == made["sha256"]]
    labels, _ = predictions.read(runs[0].path.parent)
    assert (reference.predicted(made) == labels).mean() == pytest.approx(made["accuracy"], abs=1e-6)  # as it was rounded
