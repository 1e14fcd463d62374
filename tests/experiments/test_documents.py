"""README's tables and those of docs/ are what the committed results say."""

import pytest

from experiments import documents, measured, packaged_base
from experiments.errors import ExperimentError
from tests.support import ROOT, fabricated


@pytest.mark.parametrize("name", documents.FILES)
def test_the_tables_are_those_of_the_committed_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert documents.MARKED.search(text)
    assert documents.filled(text, documents.tables(measured.read(fabricated.COMMITTED))) == text


def test_a_table_is_made_of_the_runs(tmp_path):
    made = [fabricated.metrics("lora", 0.88 + seed / 100, seed, peak_rss_mb=1000.0 + seed) for seed in range(3)]
    found = documents.tables(measured.read(fabricated.write(tmp_path, *made)))
    assert set(found) == {"whole"}
    assert "| `lora` " in found["whole"] and "| 89.0 ± 1.0 % " in found["whole"] and "| 1,000 to 1,002 MiB " in found["whole"]
    assert found["whole"].endswith("Means of 3 seeds, ± one standard deviation; float32, version 0, one, 1 thread a run.")


def test_the_larger_base_has_a_table_of_its_own(tmp_path):
    made = fabricated.metrics("lora")
    made["data"] |= {"train": 12_000}
    made["hyperparameters"]["epochs"] = 1
    made["base_model"] |= {"name": packaged_base.NAME}
    found = documents.tables(measured.read(fabricated.write(tmp_path, made)))
    assert set(found) == {"larger"} and found["larger"].endswith("One seed each; float32, version 0, one, 1 thread a run.")


@pytest.mark.parametrize(("precision", "said"), [("fp32", True), ("bf16", False)])
def test_peft_s_peak_is_beside_and_is_split_between_engine_and_harness(tmp_path, monkeypatch, precision, said):
    peaks = {("ours", "ours"): 1000.0, ("ours", "plain"): 1700.0, ("peft", "ours"): 1300.0, ("peft", "plain"): 2000.0}
    rows = []
    for train, epochs in (documents.WHOLE, documents.PART):
        work = {"data": "SST-2", "train": train, "settings": {"epochs": epochs, "precision": precision}, "seed": 0}
        for (engine, harness), peak in peaks.items():
            cell = {"engine": engine, "harness": harness, "method": "qlora", "accuracy": 0.5, "peak_rss_mb": peak}
            rows.append(work | cell)
    monkeypatch.setattr(documents.reference, "read", lambda: rows)
    found = documents.tables(measured.read(fabricated.write(tmp_path, fabricated.metrics("qlora"))))["whole"]
    assert ("| 50.0 %    | 2,000 MiB" in found) == said
    assert ("are one seed, in a plain Trainer. Of what it takes more, 30 % (`qlora`) is the\nengine's" in found) == said


def test_what_recorded_no_code_is_told(tmp_path):
    made = fabricated.metrics("lora")
    del made["provenance"]
    made["data"] |= {"train": 12_000}
    made["hyperparameters"]["epochs"] = 2
    found = documents.tables(measured.read(fabricated.write(tmp_path, made)))
    assert found["part"].endswith("These were measured with an earlier version of the code, in float32, one seed each.")


def test_only_what_is_marked_changes_and_an_unknown_mark_is_refused():
    text = "before\n<!-- results: a -->\nold\n<!-- end -->\nafter\n"
    assert documents.filled(text, {"a": "new"}) == text.replace("old", "new")
    with pytest.raises(ExperimentError, match="there is no table 'a'"):
        documents.filled(text, {"b": "new"})


def test_files_are_written_where_they_are(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in documents.FILES:
        (tmp_path / name).write_text("<!-- results: whole -->\n<!-- end -->\n")
    runs = measured.read(fabricated.write(tmp_path / "runs", fabricated.metrics("qlora")))
    assert all("| `qlora`, the base in 4 bits " in path.read_text() for path in documents.write(runs, tmp_path))
