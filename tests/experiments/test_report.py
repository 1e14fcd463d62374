"""The report says what the metrics say, and trains nothing."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("matplotlib")

from experiments import measured, reference, remake, report, reporting
from experiments.errors import ExperimentError
from tests.support import fabricated


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report on two methods with two seeds and one budget with one run, and its directory."""
    made = [fabricated.metrics(method, 0.86 + seed / 100, seed) for method in ("lora", "base") for seed in (0, 1)]
    made[0]["peak_rss_mb"] = 2000.0
    short = fabricated.metrics("dora", 0.8, train_seconds=42.0)
    short["hyperparameters"]["epochs"] = 1
    directory = fabricated.write(tmp_path_factory.mktemp("runs"), *made, short)
    return reporting.write(directory).read_text(), directory


def row(text, method):
    line = next(line for line in text.splitlines() if line.startswith(f"| {method} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_means_deviation_interval_and_peaks(written):
    text, _ = written
    low, high = (100 * bound for bound in measured.wilson(0.865, 872))
    assert row(text, "lora") == [
        "lora", "86.5 ± 0.7 %", f"{low:.1f} to {high:.1f} %", "0.891", "294,912 (1.28 %)", "295,682 (1.29 %)",
        "86.6 MiB", "1,332 to 2,000 MiB", "-", "33.3 min", "0, 1",
    ]  # fmt: skip
    assert row(text, "base")[4:6] == ["-", "-"]
    assert row(text, "dora")[1] == "80.0 %" and row(text, "dora")[-2:] == ["42 s", "0"]


def test_each_budget_has_its_table_the_fullest_first(written):
    text, _ = written
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "SST-2, 67,349 sentences, 3 epochs, all-MiniLM-L6-v2, fp32",
        "SST-2, 67,349 sentences, 1 epoch, all-MiniLM-L6-v2, fp32",
        "peft beside it",
        "Where the published figures do not add up",
        "Expected and found",
    ]
    assert "On cpu, 1 threads (one); torch " in text


def test_the_findings_and_the_published_faults_are_there(written):
    text, _ = written
    findings = text[text.index("The study's findings:") : text.index("Aims (half a point")]
    assert len(re.findall(r"^- .*\*\*(supported|contradicted|not run|can't be told apart)\*\*", findings, re.MULTILINE)) == 6
    assert "1,771,778 of 68,726,788. That is 2.58 %" in text


def test_the_code_that_made_the_runs_is_told(tmp_path):
    other = fabricated.metrics("lora")
    other["provenance"] = {**other["provenance"], "engine": "0" * 16}
    unknown = fabricated.metrics("lora", seed=1)
    del unknown["provenance"]
    runs = measured.read(fabricated.write(tmp_path, other, unknown, fabricated.metrics("lora", seed=2)))
    told = reporting.made_by(runs, tmp_path)
    assert told.startswith("2 of the results are not what the present code makes; with --refresh the command that made them")
    assert "run0, fp32: other engine (version 0)" in told and "run1, fp32: recorded no code" in told and "run2" not in told
    assert reporting.made_by(runs[2:], tmp_path) == "All 1 results were made by the present code."


def test_of_the_committed_results_other_settings_and_a_sweep_by_other_code_are_told_too(tmp_path, monkeypatch):
    slow = fabricated.metrics("lora")
    slow["hyperparameters"]["learning_rate"] = 1e-4  # as if the recipe had been this one
    runs = measured.read(fabricated.write(tmp_path, slow, fabricated.metrics("qlora")))
    assert reporting.outdated(runs, tmp_path) == []  # a comparison with flags of its own
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    told = f"{runs[0].name}, fp32: other settings: lora (learning rate 0.0001)"
    monkeypatch.setattr(remake, "absent", lambda runs: [])
    monkeypatch.setattr(remake, "other_trials", lambda table: f"as {table.name} has it")
    monkeypatch.setattr(reference, "outdated", lambda rows: ["and peft's"])
    monkeypatch.setattr(reporting, "unmatched", lambda runs, rows: [])
    assert reporting.outdated(runs, tmp_path) == [told, "sweep/sweep.csv: as sweep.csv has it", "and peft's"]
    assert "`make results` makes them again:" in reporting.made_by(runs, tmp_path)


def test_pictures_that_are_shown_are_there(written):
    text, directory = written
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(shown) == 4 and all((directory / path).is_file() for path in shown)


def test_every_table_is_whole(written):
    lines = [line for line in written[0].splitlines() if line.startswith("|")]
    blocks = re.findall(r"(?:^\|.*\n)+", written[0], re.MULTILINE)
    assert len(blocks) == 5 and sum(block.count("\n") for block in blocks) == len(lines)
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_committed_report_and_its_figures_are_those_of_the_committed_runs(tmp_path, monkeypatch):
    """But for what it says of the code that made them, which changes with the code."""
    matplotlib = pytest.importorskip("matplotlib.image")

    def of_the_runs(text):
        text = text[text.index("\n## ") :].replace(", beside other code of ours", "")
        return re.sub(r" +|-+", lambda found: found[0][0], text)  # which makes a column wider

    drawn = tmp_path / "figures"
    draw = reporting._figures
    monkeypatch.setattr(reporting, "_figures", lambda group, _: draw(group, drawn))
    monkeypatch.setattr(reporting, "write_whole", lambda path, data: (tmp_path / "report.md").write_bytes(data))
    reporting.write(fabricated.COMMITTED)
    committed = (fabricated.COMMITTED / "report.md").read_text()
    assert of_the_runs((tmp_path / "report.md").read_text()) == of_the_runs(committed)
    assert {path.name for path in drawn.iterdir()} == {path.name for path in (fabricated.COMMITTED / "figures").iterdir()}
    if f"matplotlib=={version('matplotlib')}\n" not in (fabricated.ROOT / "constraints.txt").read_text():
        return  # another one draws other pixels
    for path in drawn.iterdir():
        ours, theirs = (matplotlib.imread(one) for one in (path, fabricated.COMMITTED / "figures" / path.name))
        assert ours.shape == theirs.shape and abs(ours - theirs).mean() < 1e-3, path.name


def test_without_a_run_there_is_no_report(tmp_path):
    with pytest.raises(ExperimentError, match="there is no run below"):
        reporting.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_reads_only(tmp_path):
    directory = fabricated.write(tmp_path, fabricated.metrics("lora"))
    before = {path: path.read_bytes() for path in directory.rglob("metrics.json")}
    code = (
        "import sys; from experiments.report import main; code = main(['--output-dir', sys.argv[1]]); "
        "sys.exit(code or 'experiments.train' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {directory / 'report.md'}\n"
    assert {path: path.read_bytes() for path in before} == before


def test_a_broken_run_is_one_line(tmp_path, capsys):
    made = fabricated.write(tmp_path, fabricated.metrics())
    (made / "run0" / "metrics.json").write_text(json.dumps([]))
    assert report.main(["--output-dir", str(made)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "metrics.json holds a list" in err
