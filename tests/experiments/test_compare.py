"""The comparison: each run in a process of its own, what is done skipped, what fails named, and the check's verdict."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

pytest.importorskip("matplotlib")

from experiments import compare, measured, provenance, record, reference, reporting, several, sweep
from experiments.recipes import METHODS
from experiments.several import Several
from tests.support import fabricated


@pytest.fixture
def call(capfd):
    """Runs the command; returns (exit code, standard output, standard error)."""

    def run(*argv):
        capfd.readouterr()
        try:
            code = compare.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def common(small_data):
    return (
        "--model",
        "packaged",
        "--data",
        small_data,
        "--epochs",
        1,
        "--max-length",
        64,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--max-steps",
        1,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory, common):
    """What the documented command leaves and prints, as a process of its own."""
    directory = tmp_path_factory.mktemp("compare") / "out"
    argv = ["--methods", "lora,base", *common, "--output-dir", directory]
    command = [sys.executable, "-m", "experiments.compare", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory, done


def test_every_run_is_recorded_and_reported(compared, small_data):
    directory, done = compared
    runs = directory / f"{small_data.name}-all-minilm-l6-v2-96x1"
    assert sorted(path.name for path in runs.iterdir()) == ["base-seed0", "lora-seed0"]
    metrics = record.read_json(runs / "lora-seed0" / "metrics.json")
    assert metrics["method"] == "lora" and metrics["hyperparameters"]["max_steps"] == 1
    assert (runs / "lora-seed0" / "adapter" / "adapter_model.safetensors").is_file()
    assert (directory / "report.md").is_file() and len(list((directory / "figures").iterdir())) == 4
    out = done.stdout.splitlines()
    assert out[0].startswith("base model: sentence-transformers/all-MiniLM-L6-v2")
    assert out[1].startswith("base: accuracy") and out[2].startswith("lora: accuracy")  # in the order of METHODS
    assert f"check it: python -m experiments.compare --check --output-dir {directory}" in out
    assert "2/2 lora, seed 0" in done.stderr and "32/32" in done.stderr  # one step of 32 sentences
    assert "Warning" not in done.stderr + done.stdout


def test_what_is_done_is_skipped_and_the_rest_goes_on(compared, common, call, tmp_path, monkeypatch):
    directory = shutil.copytree(compared[0], tmp_path / "out")
    started = []

    def no_process(self, one):
        started.append((one.method.name, one.schedule.seed))
        path = shutil.copytree(one.output.with_name("base-seed0"), one.output) / "metrics.json"
        record.write_json(path, record.read_json(path) | one.plan)

    monkeypatch.setattr(Several, "_one", no_process)
    again = ("--methods", "base,lora", *common, "--output-dir", directory)
    code, out, _ = call(*again)
    assert code == 0 and not started and "2 of 2 runs are done already" in out
    assert call(*again, "--seeds", "0,1")[0] == 0
    assert started == [("base", 1), ("lora", 1)]


def test_overwrite_does_it_again_and_other_settings_need_it(compared, common, call, tmp_path, monkeypatch):
    directory = shutil.copytree(compared[0], tmp_path / "out")
    started = []
    monkeypatch.setattr(Several, "_one", lambda self, one: started.append(one.method.name))
    argv = ("--methods", "base", *common, "--output-dir", directory)
    code, _, err = call(*argv, "--batch-size", 16)
    assert code == 2 and "holds another run (its hyperparameters differ); pass --overwrite" in err and not started
    assert call(*argv, "--overwrite")[0] == 0 and started == ["base"]


def test_refresh_does_again_what_other_code_or_other_settings_made(compared, common, call, tmp_path, monkeypatch, small_data):
    directory = shutil.copytree(compared[0], tmp_path / "out")
    started = []
    monkeypatch.setattr(Several, "_one", lambda self, one: started.append(one.method.name))
    argv = ("--methods", "base,lora", *common, "--output-dir", directory, "--refresh")
    assert call(*argv)[0] == 0 and not started
    path = directory / f"{small_data.name}-all-minilm-l6-v2-96x1" / "lora-seed0" / "metrics.json"
    metrics = record.read_json(path)
    record.write_json(path, metrics | {"provenance": {**metrics["provenance"], "engine": "0" * 16}})
    assert call(*argv)[0] == 0 and started == ["lora"]
    assert call(*argv, "--batch-size", 16)[0] == 0 and started[1:] == ["base", "lora"]


def test_a_run_that_fails_is_named(common, call, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.Planned, "command", [sys.executable, "-c", "import sys; sys.exit('error: no such thing')"])
    code, _, err = call("--methods", "head-only", *common, "--output-dir", tmp_path / "out")
    assert code == 2
    assert err.splitlines()[-1] == "error: 1 of 1 runs failed: head-only, seed 0 (no such thing)"


def test_runs_that_are_fine_are_reported_beside_one_that_fails(compared, common, call, tmp_path, monkeypatch):
    directory = shutil.copytree(compared[0], tmp_path / "out")
    (directory / "report.md").unlink()
    monkeypatch.setattr(Several, "_one", lambda *_: "no space left")
    code, out, err = call("--methods", "base,head-only", *common, "--output-dir", directory)
    assert code == 2 and err.splitlines()[-1] == "error: 1 of 2 runs failed: head-only, seed 0 (no space left)"
    assert "| base " in out and (directory / "report.md").is_file()


def test_an_interruption_stops_the_runs_and_says_how_to_go_on(call, common, tmp_path, monkeypatch):
    processes = []
    popen = subprocess.Popen

    def start(*args, **settings):
        processes.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **settings))
        return processes[-1]

    def interrupted(waiting):
        while len(processes) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(several.subprocess, "Popen", start)
    monkeypatch.setattr(several, "as_completed", interrupted)
    code, _, err = call("--methods", "lora,base,full", "--jobs", 2, *common, "--output-dir", tmp_path)
    assert code == 130 and "interrupted; what is finished is kept" in err
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)  # and the third never started


def test_runs_at_a_time_share_the_cores(tmp_path):
    class One:
        name, examples = "one", 10

        def __init__(self, number):
            self.command = [
                sys.executable,
                "-c",
                f"import os; open({str(tmp_path / str(number))!r}, 'w').write(os.environ['OMP_NUM_THREADS'])",
            ]

        def outcome(self):
            return "done"

    class Bad(One):
        def __init__(self):
            self.command = [sys.executable, "-c", "import sys; sys.exit('error: no such thing')"]

    assert several.Several([One(0), Bad(), One(1)], 0, 2).run() == ["one (no such thing)"]
    shares = {path.read_text() for path in tmp_path.iterdir()}
    assert shares == {str(max(1, os.cpu_count() // 2))} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--methods", "lora,qlorra"], "--methods: there is no 'qlorra'; there are base, head-only"),
        (["--methods", "lora,"], "'lora,' is no comma-separated list of names"),
        (
            ["--data", "packaged", "--model", "packaged", "--max-length", "513"],
            "max_length is 513, and this model reads at most",
        ),
        (["--jobs", "0"], "'0' is no whole number above 0"),
        (["--seeds", "0,one"], "'0,one' is no comma-separated list of numbers"),
        (["--seeds", "0,-1"], "seed must lie in [0, 2^32), not -1"),
        (["--epochs", "0"], "epochs must be at least 1, not 0"),
        (["--data", "nowhere"], "'nowhere' is no directory"),
        (["--check", "--output-dir", "nowhere"], "'nowhere' is no directory"),
    ],
)
def test_a_mistake_is_one_line(call, argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*argv)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not list(tmp_path.iterdir())


def test_every_method_runs_by_default():
    args = compare.parser().parse_args([])
    assert [m.name for m in compare.methods_of(args.methods or METHODS)] == list(METHODS) and args.seeds == (0,)


# --- the check --------------------------------------------------------------------------------------------------------


def test_the_committed_results_meet_what_is_expected_and_the_check_says_whose_code_made_them(call):
    code, out, err = call("--check")
    other = reporting.outdated(measured.read(fabricated.COMMITTED), fabricated.COMMITTED)
    assert code == (1 if other else 0) and not err
    assert "| NOT MET" not in out and "| met " in out and "| not run" in out
    assert all(f"- {line}" in out for line in other) and not any("missing" in line for line in other)


def test_results_of_other_code_fail_the_check(call, tmp_path):
    made = fabricated.metrics("lora")
    assert call("--check", "--output-dir", fabricated.write(tmp_path / "present", made))[0] == 0
    made["provenance"] = {**made["provenance"], "experiments": "0" * 16}
    code, out, _ = call("--check", "--output-dir", fabricated.write(tmp_path / "other", made))
    assert code == 1 and "| NOT MET" not in out and "run0, fp32: other experiments (version 0)" in out


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A copy of the committed results in their place, as if the present code had made all of them."""
    directory = shutil.copytree(fabricated.COMMITTED, tmp_path / "results", ignore=shutil.ignore_patterns("figures"))
    for path in directory.rglob("metrics.json"):
        record.write_json(path, json.loads(path.read_text()) | {"provenance": provenance.sources()})
    table = directory / "sweep" / "sweep.csv"
    sweep.write_csv(table, [row | provenance.sources() for row in sweep.read_csv(table)])
    present = provenance.sources() | {"bench": reference.bench_code()}
    reference.write(directory / "reference.json", [row | {"provenance": present} for row in reference.read()])
    monkeypatch.setattr(reporting, "RESULTS", directory)
    return directory


def of_peft_s(change):
    """Damage to what stands beside: `change` takes all rows and returns them."""

    def damage(directory):
        path = directory / "reference.json"
        reference.write(path, change(reference.read(path)))

    return damage


def of_the_sweep(change):
    def damage(directory):
        path = directory / "sweep" / "sweep.csv"
        sweep.write_csv(path, change(sweep.read_csv(path)))

    return damage


def of_the_run(change):
    def damage(directory):
        path = directory / RUN / "metrics.json"
        metrics = json.loads(path.read_text())
        record.write_json(path, metrics | change(metrics))

    return damage


def of_its_predictions(change):
    def damage(directory):
        path = directory / RUN / "predictions.txt"
        path.write_text("\n".join(change(*path.read_text().split())) + "\n")

    return damage


def other(text):
    return text.translate(str.maketrans("01", "10"))


RUN, WHOSE = "sst-2-all-minilm-l6-v2-12000x2/lora-seed0", "lora, seed 0, 12,000 of SST-2 x 2, all-MiniLM-L6-v2, bf16"
OUGHT = "as many right as the accuracy says | not in"
PEFT_S = "lora, all of SST-2 x 3, bf16, seed 0, peft in plain"


@pytest.mark.parametrize(
    ("damage", "says"),
    {
        "a run": (lambda d: shutil.rmtree(d / RUN), f"- {WHOSE}: missing"),
        "its method": (of_the_run(lambda m: {"method": "another"}), f"- {WHOSE}: missing"),
        "its data": (of_the_run(lambda m: {"data": m["data"] | {"sha256": "0"}}), "lora-seed0: other bytes of its data"),
        "its base": (of_the_run(lambda m: {"base_model": m["base_model"] | {"sha256": "0"}}), "other bytes of its base"),
        "no predictions": (lambda d: (d / RUN / "predictions.txt").unlink(), OUGHT),
        "all right": (of_its_predictions(lambda labels, said: (labels, labels)), OUGHT),
        "other labels": (of_its_predictions(lambda labels, said: (other(labels), other(said))), OUGHT),
        "cut predictions": (of_its_predictions(lambda labels, said: (labels[:-9], said[:-9])), OUGHT),
        "no sweep": (lambda d: (d / "sweep" / "sweep.csv").unlink(), "- sweep/sweep.csv: missing"),
        "an empty sweep": (of_the_sweep(lambda rows: []), "- sweep/sweep.csv: other code, or no trials"),
        "a cut sweep": (
            of_the_sweep(lambda rows: rows[:-1]),
            "- sweep/sweep.csv: other settings than those that are asked for",
        ),
        "a row of peft's": (of_peft_s(lambda rows: rows[1:]), f"reference.json: {PEFT_S}: missing"),
        "rows twice": (of_peft_s(lambda rows: rows * 2), f"reference.json: {PEFT_S}: there besides, or twice"),
        "their bench": (
            of_peft_s(lambda rows: [row | {"provenance": provenance.sources()} for row in rows]),
            f"reference.json: {PEFT_S}: other bench",
        ),
        "their engine": (
            of_peft_s(lambda rows: [row | {"provenance": None} for row in rows]),
            f"reference.json: {PEFT_S}: other engine and experiments and bench",
        ),
        "their accuracies": (
            of_peft_s(lambda rows: [row | {"accuracy": 0.6} for row in rows]),
            "| predictions beside peft's | " + OUGHT,
        ),
        "accuracies of ours beside them": (
            of_peft_s(lambda rows: [row | ({"accuracy": 0.99} if row["engine"] == "ours" else {}) for row in rows]),
            "| predictions beside peft's | " + OUGHT,
        ),
        "their predictions": (
            of_peft_s(lambda rows: [{key: row[key] for key in row if key != "predicted"} for row in rows]),
            f"reference.json: {PEFT_S}: no predictions",
        ),
        "their settings": (
            of_peft_s(lambda rows: [row | {"settings": row["settings"] | {"learning_rate": 1}} for row in rows]),
            "no run of ours has its settings",
        ),
    }.values(),
)
def test_committed_results_that_are_missing_stale_or_changed_fail_the_check(call, committed, damage, says):
    code, out, _ = call("--check", "--output-dir", committed)
    assert code == 0 and "results and peft's 17 rows were made by the present code." in out
    damage(committed)
    code, out, err = call("--check", "--output-dir", committed)
    assert code == 1 and says in " ".join(out.split()) and not err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "reference.json").write_text("{}"), "has no list of rows; run python -m bench reference"),
        (of_peft_s(lambda rows: [{"engine": "peft"}]), "row 0 has no harness, method, data, train"),
        (of_the_run(lambda m: {"accuracy": "0.9"}), "is not as written here"),
        (of_the_run(lambda m: {"accuracy": 1.5}), "the accuracy must be a share, between 0 and 1, not 1.5"),
    ],
)
def test_a_file_that_is_not_as_written_is_one_line(call, committed, damage, says):
    damage(committed)
    code, out, err = call("--check", "--output-dir", committed)
    assert code == 2 and not out and says in err and err.count("\n") == 1


def test_a_run_that_is_there_twice_is_refused(call, committed):
    shutil.copytree(committed / RUN, committed / "again" / "lora-seed0")
    code, out, err = call("--check", "--output-dir", committed)
    assert code == 2 and not out and "are the same run, lora, seed 0" in err


@pytest.mark.parametrize(
    ("run", "key", "worse"),
    [
        ("sst-2-all-minilm-l6-v2-67349x3/lora-seed0", "accuracy", 0.84),
        ("sst-2-all-minilm-l6-v2-67349x3/qlora-seed0", "accuracy", 0.8853),
        ("sst-2-all-minilm-l6-v2-67349x3/lora-seed0", "trainable_parameters", 1_771_778),
        ("sst-2-all-minilm-l6-v2-67349x3/qlora-seed0", "base_weight_bytes", 53_351_905),
    ],
)
def test_a_worse_number_in_a_file_fails_the_check(call, committed, run, key, worse):
    path = committed / run / "metrics.json"
    metrics = json.loads(path.read_text())
    assert call("--check", "--output-dir", committed)[0] == 0
    metrics[key] = worse
    record.write_json(path, metrics)
    code, out, err = call("--check", "--output-dir", committed)
    assert code == 1 and not err
    assert any(line.endswith("| NOT MET |") for line in out.splitlines())


def test_a_check_of_nothing_fails(call, tmp_path):
    """A directory without runs has not passed."""
    (tmp_path / "empty").mkdir()
    code, out, err = call("--check", "--output-dir", tmp_path / "empty")
    assert code == 1 and not out and "0 runs are below" in err and err.count("\n") == 1


def test_a_check_in_which_no_number_is_expected_fails(call, tmp_path):
    """Runs on other data and another base: that their own numbers agree with each other is no number reached."""
    other = {"base_model": {"name": "own", "source": "", "why": "", "model_type": "bert"}}
    made = fabricated.metrics("lora", **other)
    made["data"] |= {"name": "own", "validation": 100}
    untrained = fabricated.metrics("base", **other)
    directory = fabricated.write(tmp_path / "runs", made, untrained)
    code, out, err = call("--check", "--output-dir", directory)
    assert code == 1 and not out and "2 runs are below" in err and err.count("\n") == 1
    made["accuracy_by_epoch"] = [0.1]
    code, out, err = call("--check", "--output-dir", fabricated.write(tmp_path / "wrong", made))
    assert code == 1 and "NOT MET" in out and not err


def test_a_comparison_does_not_take_another_data_sets_runs_for_its_own(call, tmp_path, common, small_data):
    """Same name, same number of sentences: only the hash tells them apart."""
    directory = tmp_path / "out"
    argv = ["--methods", "base", *common, "--output-dir", directory]
    assert call(*argv)[0] == 0
    other = shutil.copytree(small_data, tmp_path / "other" / small_data.name)
    text = (other / "dev.tsv").read_text(encoding="utf-8")
    (other / "dev.tsv").write_text(text.replace("the", "a"), encoding="utf-8")
    argv[argv.index(small_data)] = other
    code, _, err = call(*argv)
    assert code == 2 and "holds another run (its data differ)" in err
