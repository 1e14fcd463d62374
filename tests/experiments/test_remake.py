"""Every committed result is made again, what is done is left, and the hours are those that earlier runs recorded."""

import csv
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from experiments import data, documents, measured, packaged_base, precision, predictions, provenance, record, remake, sweep
from experiments.compare import parser as comparison, planned
from experiments.methods import Schedule
from experiments.models import PACKAGED
from experiments.recipes import METHODS
from experiments.several import Several
from experiments.sweep import parser as sweeping
from tests.support import fabricated

LARGER_IS_ABSENT = len(packaged_base.packed_files()) < packaged_base.PARTS


@pytest.fixture
def sst2_by_name(monkeypatch):
    """Sentences of SST-2's name and sizes, without SST-2."""
    load = data.load

    def other(choice):
        if choice == "packaged":
            return load(choice)
        train, validation = (data.Split(("a film",) * n, np.arange(n, dtype=np.uint8) % 2) for n in (67_349, 872))
        return data.SentimentData("SST-2", "here", "test", train, validation)

    monkeypatch.setattr(data, "load", other)


@pytest.fixture
def call(capsys, sst2_by_name, monkeypatch, tmp_path):
    """Runs the command with nothing trained; returns (exit code, standard output, what would have been done)."""
    made = []
    swept = (fabricated.COMMITTED / "sweep" / "sweep.csv").read_text()
    labels = np.arange(4000, dtype=np.uint8) % 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Several, "run", lambda self: made.append([one.name for one in self.todo]) or [])

    def no_command(command):
        made.append(command[2])
        if command[2] == "experiments.sweep":
            (tmp_path / remake.SWEPT).mkdir(parents=True)
            (tmp_path / remake.SWEPT / "sweep.csv").write_text(run.swept)
            for name, wrong in run.wrong.items():
                trial = tmp_path / remake.SWEPT / "trials" / name
                trial.mkdir(parents=True)
                predictions.write(trial, labels, np.where(np.isin(np.arange(4000), wrong), 1 - labels, labels))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(remake.subprocess, "run", no_command)

    def run(*argv):
        return remake.main([str(arg) for arg in argv]), capsys.readouterr(), made

    run.swept, run.wrong = swept, {}
    return run


def test_every_committed_result_is_among_them(sst2_by_name):
    args = remake.parser().parse_args([])
    outputs = {one.output for part in remake.PARTS for one in remake._part(part, args)}
    committed = {run.path.parent: run["base_model"]["name"] for run in measured.read(fabricated.COMMITTED)}
    missing = {committed[directory] for directory in committed.keys() - outputs}
    assert missing <= ({packaged_base.NAME} if LARGER_IS_ABSENT else set())


def test_what_is_missing_is_known_without_data_or_base(sst2_by_name):
    args = remake.parser().parse_args([])
    lines = set()
    for one in (one for part in remake.PARTS for one in remake._part(part, args)):
        found, base, settings = one.plan["data"], one.plan["base_model"]["name"].rpartition("/")[2], one.plan["hyperparameters"]
        where = f"{found['train']:,} of {found['name']} x {settings['epochs']}, {base}, {settings['precision']}"
        lines.add(f"{one.name}, {where}: missing")
    missing = remake.absent([])
    assert lines == {line for line in missing if not LARGER_IS_ABSENT or "mpnet" not in line} and len(missing) == 81


def test_the_rows_that_claims_are_made_of_have_five_seeds_or_ten_and_all_have_three(sst2_by_name):
    seeds = {}
    for part in remake.PARTS[:3]:
        for one in planned(comparison().parse_args(part.split()), fabricated.COMMITTED):
            seeds.setdefault(one.method.name, set()).add(one.schedule.seed)
    numbers = {name: len(found) for name, found in seeds.items()}
    assert {name: n for name, n in numbers.items() if n != 3} == {"lora": 5, "qlora": 5, "full": 10, "best": 10}


def test_all_have_one_precision_and_what_is_beside_it_a_place_of_its_own(sst2_by_name, tmp_path):
    args = remake.parser().parse_args(["--output-dir", str(tmp_path)])
    runs = [one for part in remake.PARTS for one in remake._part(part, args)]
    assert len({one.output for one in runs}) == len(runs)
    beside = [one for one in runs if tmp_path / remake.FLOAT32 in one.output.parents]
    for one in runs:
        assert one.plan["hyperparameters"]["precision"] == ("fp32" if one in beside else "bf16")
    same = {one.method.name for one in beside if one.plan["base_model"]["name"] == PACKAGED}
    assert "--precision bf16" in remake.SWEEP and same == {"lora", "qlora"}


@pytest.mark.parametrize(("speed", "said"), [(0.125, True), (1.9, False)])
def test_a_processor_without_bfloat16_is_told_of_it(call, monkeypatch, speed, said):
    monkeypatch.setattr(precision, "speed_of_bf16", lambda: speed)
    _, (out, _), _ = call("--plan")
    assert ("here a product in it takes 8.0 times\n      as long as in float32" in out) == said


def test_the_sweep_is_the_one_that_the_study_shows():
    study = (fabricated.ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    (shown,) = [line for line in study.splitlines() if "--trials 14" in line]
    parsed = [sweeping().parse_args(flags.split()) for flags in (remake.SWEEP, shown.partition("sweep ")[2])]
    parsed[1].data = parsed[0].data
    assert vars(parsed[0]) == vars(parsed[1])


def test_the_plan_says_how_long_and_does_nothing(call):
    code, (out, _), made = call("--plan")
    assert code == 0 and made == ["bench"]  # which says what peft's runs will take
    assert re.search(r"of (76|81) runs are done by the present code\nthe others take about \d", out)  # 81 with the larger base
    assert "the sweep is done by the present code" in out or "the sweep takes about" in out


def test_what_is_done_is_left_and_the_rest_follows_in_order(call, tmp_path):
    results = fabricated.write(tmp_path / "results", fabricated.metrics("lora"))
    code, (out, _), made = call("--output-dir", results, "--data", "DIR")
    assert code == 0 and [one for one in made if isinstance(one, str)] == ["bench", "experiments.sweep", "bench"]
    assert made[2][:4] == ["base, seed 0", "head-only, seed 0", "full, seed 0", "lora, seed 0"]
    assert (results / "sweep" / "sweep.csv").is_file() and (results / "report.md").is_file() and "report: " in out


@pytest.mark.parametrize(
    ("change", "left"),
    {
        "as it is": (lambda rows: rows, True),
        "another first, within the interval": (lambda rows: [rows[1] | {"accuracy": "0.865"}, rows[0], *rows[2:]], True),
        "with best far from the best": (lambda rows: [rows[0] | {"accuracy": "0.7"}, *rows[1:]], False),
        "of other code": (lambda rows: [rows[0] | {"engine": "0"}, *rows[1:]], False),
        "without a trial": (lambda rows: rows[:-1], False),
        "without any": (lambda rows: [], False),
    }.values(),
)
def test_a_sweep_of_the_present_code_is_left(call, tmp_path, change, left):
    rows = [row | provenance.sources() for row in csv.DictReader(call.swept.splitlines())]
    table = tmp_path / "results" / "sweep" / "sweep.csv"
    table.parent.mkdir(parents=True)
    sweep.write_csv(table, change(rows))
    fabricated.write(tmp_path / "results", fabricated.metrics("lora"))
    code, (out, _), made = call("--output-dir", tmp_path / "results")
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    assert code == 0 and ("experiments.sweep" not in made) == left
    assert ("the sweep is done by the present code" if left else f"the sweep takes about {hours:.1f} hours") in out


@pytest.mark.parametrize(
    ("own", "code"),
    [(range(560), 0), (range(10, 575), 0), (range(620), 2)],  # what `best` is wrong about; the first is about 0 to 558
)
def test_a_recipe_that_is_not_what_the_sweep_finds_is_said_before_hours_of_runs(call, tmp_path, own, code):
    results = fabricated.write(tmp_path / "results", fabricated.metrics("lora"))
    best = "r32-alpha16-dropout0.09-lr0.00038-plus4-all-linear"
    first = "r32-alpha16-dropout0.2-lr0.00089-plus4-all-linear"
    for rate, accuracy in (("0.00038", 1 - len(own) / 4000), ("0.00089", 0.86025)):
        call.swept = re.sub(rf"({rate},.*all-linear),0\.\d+,", rf"\g<1>,{accuracy},", call.swept)
    call.wrong = {first: range(559), best: list(own)}
    found, (out, errors), made = call("--output-dir", results)
    assert found == code and (results / "sweep").exists() == (code == 0) and len(made) == (4 if code == 0 else 2)
    assert (f"note: {first} is first in the sweep, and 'best' within the interval: " in out) == (code == 0)
    assert (f"error: the sweep found {first}, and 'best' is {best}: change it" in errors) == (code == 2)


def test_without_sst_2_it_is_refused(call, monkeypatch, tmp_path):
    load = data.load
    monkeypatch.setattr(data, "load", lambda choice: load("packaged"))
    code, (_, errors), made = call("--plan")
    assert code == 2 and "--data: the study is of SST-2, all of it, and Rotten Tomatoes was found" in errors and not made


@pytest.mark.parametrize("there", [True, False])
def test_into_another_directory_nothing_that_is_committed_is_touched(call, monkeypatch, tmp_path, there):
    commands, results = [], tmp_path / "again"
    run = remake.subprocess.run
    monkeypatch.setattr(remake.subprocess, "run", lambda command: commands.append(command) or run(command))
    if there:
        fabricated.write(results, fabricated.metrics("lora"))
        monkeypatch.setattr(documents, "write", lambda *args: pytest.fail("README was written"))
    code, (out, errors), made = call("--output-dir", results, *([] if there else ["--plan"]))
    assert code == 0 and "experiments.notebook" not in made, errors
    benches = [command[3:] for command in commands if command[2] == "bench"]
    assert len(benches) == (2 if there else 1) and "about 0.0 hours" not in out
    assert all(command[command.index("--output") + 1] == str(results / "reference.json") for command in benches)
    assert (results / "sweep" / "sweep.csv").exists() == there


def test_what_ran_on_another_device_is_done_again(tmp_path, sst2_by_name):
    args = comparison().parse_args(["--model", "packaged", "--methods", "base", "--device", "cpu"])
    (one,) = planned(args, tmp_path)
    metrics = {**one.plan, "provenance": provenance.sources(), "peak_cuda_mb": None}
    for peak, done in ((None, True), (5.0, False)):
        one.output.mkdir(parents=True, exist_ok=True)
        record.write_json(one.output / "metrics.json", metrics | {"peak_cuda_mb": peak})
        assert one.done(refresh=True) is done


def test_a_recipe_that_the_sweep_did_not_try_is_said(call, tmp_path):
    call.swept = "\n".join(line for line in call.swept.splitlines() if "0.00038" not in line)
    code, (_, errors), _made = call("--output-dir", fabricated.write(tmp_path / "results", fabricated.metrics("lora")))
    assert code == 2 and "and 'best' is r32-alpha16-dropout0.09-lr0.00038-plus4-all-linear" in errors


def test_the_hours_are_those_of_runs_like_it(tmp_path):
    recorded = [fabricated.metrics("lora"), fabricated.metrics("full", train_seconds=1.0)]
    for one, seconds in zip(recorded, (3600.0, 7200.0), strict=True):
        one["provenance"] = {**one["provenance"], "seconds": seconds}
    runs = measured.read(fabricated.write(tmp_path, *recorded))

    def plan(method, base="sentence-transformers/all-MiniLM-L6-v2"):
        known = {"base_model": {"name": base}, "data": {"train": 67_349}}
        return SimpleNamespace(plan=known, method=METHODS[method], schedule=Schedule(epochs=6))

    assert remake.expected_hours([plan("lora")], runs, 1) == (pytest.approx(2), 0)
    assert remake.expected_hours([plan("lora"), plan("full")], runs, 2) == (pytest.approx(3), 0)
    assert remake.expected_hours([plan("dora")], runs, 1) == (pytest.approx(3), 0)  # never ran: like the others on average
    assert remake.expected_hours([plan("lora", "another")], runs, 1) == (0, 1)
