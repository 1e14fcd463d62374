"""The reference: every cell is asked for once, and peft trains the same parameters on the same batches in either harness."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("peft")

from bench import __main__ as command, reference, reference_run
from experiments import provenance


def options(*flags):
    return command.parser().parse_args(["reference", *map(str, flags)])


def test_every_row_is_asked_for_once_and_its_flags_are_known(tmp_path):
    asked = reference.runs(reference.RUNS, "DIR", tmp_path, tmp_path / "out.json")
    assert len({tuple(run.key) for run in asked}) == len(asked)
    for run in asked:
        args = reference_run.parser().parse_args(run.command[3:])
        assert (args.engine, args.harness, args.method) == tuple(run.key[:3]) and args.data in ("DIR", "packaged")
    whole = {(run.key[0], run.key[1], run.key[2]) for run in asked if "12000" in run.key}
    assert whole == {(*cell, method) for cell in reference.CELLS for method in ("lora", "qlora")} | {
        ("peft", "ours", "query-only")
    }


def test_what_is_made_is_left_and_each_row_is_kept_at_once(tmp_path, monkeypatch, capsys):
    output, started = tmp_path / "rows.json", []

    def train(several):
        for run in several.todo:
            started.append(run.name)
            found = {"data": "SST-2", "train": 32, "seed": 0, "settings": {"epochs": 1}, "accuracy": 0.5, "peak_rss_mb": 9.0}
            engine, harness, method = run.key[:3]
            found |= {"engine": engine, "harness": harness, "method": method}
            run.row.write_text(json.dumps(found | {"provenance": {**provenance.sources(), "seconds": 3600.0}}))
            run.outcome()
        return []

    monkeypatch.setattr(reference.Several, "run", train)
    assert command.main(["reference", "--quick", "--plan", "--output", str(output)]) == 0 and not started
    assert command.main(["reference", "--quick", "--output", str(output)]) == 0
    assert len(started) == len(json.loads(output.read_text())["rows"]) == 8
    assert command.main(["reference", "--quick", "--output", str(output)]) == 0 and len(started) == 8
    rows = json.loads(output.read_text())["rows"]
    rows[0]["provenance"]["engine"] = "0" * 16
    output.write_text(json.dumps({"rows": rows}))
    capsys.readouterr()
    assert command.main(["reference", "--quick", "--output", str(output)]) == 0 and len(started) == 9
    said = capsys.readouterr().out
    assert "7 rows are made by the present code; 1 are to be made, which took 0.5 hours before, 2 at a time" in said


def test_peft_trains_as_many_parameters_and_sees_the_same_sentences(tmp_path, small_data):
    found = []
    for engine, harness in (("ours", "ours"), ("peft", "plain")):
        flags = ["--engine", engine, "--harness", harness, "--method", "lora", "--data", str(small_data), "--max-steps", "1"]
        args = reference_run.parser().parse_args([*flags, "--max-length", "16", "--output", str(tmp_path / engine)])
        found.append(SimpleNamespace(**reference_run.row(args)))
    ours, theirs = found
    assert ours.trainable_parameters == theirs.trainable_parameters == 295_682
    assert (ours.settings, ours.sha256, ours.base) == (theirs.settings, theirs.sha256, theirs.base)
    assert abs(ours.accuracy - theirs.accuracy) < 0.15 and min(ours.peak_rss_mb, theirs.peak_rss_mb) > 200
