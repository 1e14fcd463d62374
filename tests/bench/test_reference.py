"""The reference: every cell is asked for once, and peft trains the same parameters on the same batches in either harness."""

import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest

pytest.importorskip("peft")

from bench import __main__ as command, reference, reference_run
from experiments import provenance
from experiments.reference import bench_code


def options(*flags):
    return command.parser().parse_args(["reference", *map(str, flags)])


@pytest.fixture(autouse=True)
def sentences(monkeypatch, small_data):
    """Whatever is asked for, a few sentences: nothing is trained on them."""
    from experiments import data

    few = data.load(str(small_data))
    monkeypatch.setattr(reference_run, "_data", lambda choice: few)


def test_every_row_is_asked_for_once_and_its_flags_are_known(tmp_path):
    asked = reference.runs(reference.RUNS, "DIR", tmp_path, tmp_path / "out.json")
    parsed = [reference_run.parser().parse_args(run.command[3:]) for run in asked]
    for run, args in zip(asked, parsed, strict=True):
        assert run.cell == {name: getattr(args, name) for name in run.cell} and args.data in ("DIR", "packaged")
    work = {(*run.cell.values(), args.data, args.epochs, args.seed) for run, args in zip(asked, parsed, strict=True)}
    assert len(work) == len(asked)
    part = {(*run.cell.values(), args.seed) for run, args in zip(asked, parsed, strict=True) if args.train_samples == 12_000}
    every = {(*cell, method, 0) for cell in reference.CELLS for method in ("lora", "qlora")}
    more = {("peft", "plain", method, seed) for method in ("lora", "qlora") for seed in (1, 2)}
    assert part == every | more | {("peft", "ours", "query-only", 0)}


def test_every_row_that_is_asked_for_is_committed(tmp_path):
    asked = reference.runs(reference.RUNS, "DIR", tmp_path, tmp_path / "out.json")
    parsed = [reference_run.parser().parse_args(run.command[3:]) for run in asked]
    names = {"DIR": "SST-2", "packaged": "Rotten Tomatoes"}
    work = {(*run.cell.values(), names[args.data], args.epochs, args.seed) for run, args in zip(asked, parsed, strict=True)}
    rows = reference.read(reference.FILE)
    assert {
        (*(row[name] for name in asked[0].cell), row["data"], row["settings"]["epochs"], row["seed"]) for row in rows
    } == work


def test_a_row_is_known_by_the_bench_s_code_without_the_bench():
    assert bench_code() == reference_run.sources()


def test_what_is_made_is_left_and_each_row_is_kept_at_once(tmp_path, monkeypatch, capsys):
    output, started = tmp_path / "rows.json", []

    def train(several):
        for run in several.todo:
            started.append(run.name)
            run.row.write_text(json.dumps(as_made(run)))
            run.outcome()
        return []

    def again(change):
        """What is started after `change` of the first row."""
        rows = json.loads(output.read_text())["rows"]
        change(rows[0])
        output.write_text(json.dumps({"rows": rows}))
        started.clear()
        assert command.main(["reference", "--quick", "--output", str(output)]) == 0
        assert len(json.loads(output.read_text())["rows"]) == 8
        return len(started)

    monkeypatch.setattr(reference.Several, "run", train)
    assert command.main(["reference", "--quick", "--plan", "--output", str(output)]) == 0 and not started
    assert command.main(["reference", "--quick", "--output", str(output)]) == 0
    assert len(started) == len(json.loads(output.read_text())["rows"]) == 8
    assert again(lambda row: None) == 0
    capsys.readouterr()
    assert again(lambda row: row["provenance"].update(engine="0" * 16)) == 1
    said = capsys.readouterr().out
    assert "7 rows are made by the present code; 1 are to be made, which took 0.5 hours before, 2 at a time" in said
    for change in (
        lambda row: row["provenance"].update(bench="0" * 16),  # the code that puts peft's adapters on
        lambda row: row["settings"].update(learning_rate=1e-9),  # a recipe that has changed since
        lambda row: row.update(sha256="0" * 16),
        lambda row: row.update(base_sha256="0" * 16),
        lambda row: row["versions"].update(peft="0.1"),
        lambda row: row.update(seed=5),
    ):
        assert again(change) == 1


def test_a_row_that_no_run_makes_is_left_out(tmp_path, monkeypatch):
    output = tmp_path / "rows.json"

    def train(several):
        for run in several.todo:
            run.row.write_text(json.dumps(as_made(run)))
            run.outcome()
        return []

    monkeypatch.setattr(reference.Several, "run", train)
    old = {"engine": "peft", "harness": None, "method": "query-only", "data": "small_data0", "train": 9, "seed": 0}
    old |= {"settings": {"epochs": 1}}
    output.write_text(json.dumps({"rows": [old, old | {"data": "another"}]}))
    assert command.main(["reference", "--quick", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 9 and [row["data"] for row in rows if not row["harness"]] == ["another"]


def test_without_peft_it_says_so_at_once(monkeypatch, capsys):
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    assert command.main(["reference", "--quick", "--plan"]) == 2
    assert capsys.readouterr().err == "error: the reference needs peft; run pip install 'lora-core[bench]'\n"


def as_made(run):
    """A row as `reference_run` makes it."""
    plan = run.job.plan()
    known = {**provenance.sources(), "bench": reference_run.sources(), "seconds": 3600.0}
    made = {**run.cell, "settings": plan["hyperparameters"], "seed": plan["seed"], "data": plan["data"]["name"]}
    made |= {"train": run.job.schedule.train_samples, "sha256": plan["data"]["sha256"], "accuracy": 0.5, "peak_rss_mb": 9.0}
    made |= {"base_sha256": plan["base_model"]["sha256"], "versions": {"peft": version("peft")}}
    return made | {"provenance": known}


def test_peft_trains_as_many_parameters_and_sees_the_same_sentences(tmp_path, small_data):
    found = []
    for engine, harness in (("ours", "ours"), ("peft", "plain")):
        flags = ["--engine", engine, "--harness", harness, "--method", "lora", "--data", str(small_data), "--max-steps", "1"]
        args = reference_run.parser().parse_args([*flags, "--max-length", "16", "--output", str(tmp_path / engine)])
        found.append(SimpleNamespace(**reference_run.row(args)))
    ours, theirs = found
    assert ours.trainable_parameters == theirs.trainable_parameters == 295_682
    for name in ("settings", "sha256", "base", "base_sha256"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert abs(ours.accuracy - theirs.accuracy) < 0.15 and min(ours.peak_rss_mb, theirs.peak_rss_mb) > 200


@pytest.mark.parametrize("harness", ["ours", "plain"])
def test_peft_trains_on_4_bits_after_an_evaluation(tmp_path, small_data, harness):
    # Where a CPU has AVX512-BF16, bitsandbytes' own layers fail in the second epoch: an evaluation repacks their weights.
    flags = ["--engine", "peft", "--harness", harness, "--method", "qlora", "--data", str(small_data), "--train-samples", "8"]
    args = reference_run.parser().parse_args([*flags, "--epochs", "2", "--max-length", "16", "--output", str(tmp_path / "row")])
    made = reference_run.row(args)
    assert (
        made["settings"]["epochs"] == 2 and set(made["predicted"]) <= set("01") and len(made["predicted"]) == made["validation"]
    )
