"""A run that is stopped goes on as if it had not been: same tensors, same numbers; and only where it can."""

import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch

from experiments import checkpoints, record, resumable, sst2, trainer
from experiments.checkpoints import Saving
from experiments.errors import ExperimentError
from experiments.random_states import random_states, set_random_states
from lora_core import LoraConfig, LoraError, inject
from lora_core.files.locks import alone
from tests.support import tiny
from tests.support.processes import metrics_of, small_base, whole_run

METHODS = ("lora", "qlora", "dora", "head-only", "full")
NUMBERS = {"settings": {"seed": 1}, "seconds": 1.0, "peaks": {}}
PER_EPOCH = 5  # 96 sentences in batches of 20, the last of 16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, small_data, tmp_path_factory):
    """The outputs of uninterrupted runs, by method, made when first asked for."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def output(method):
        if method not in done:
            assert sst2.main([*argv(base, small_data, method), "--output-dir", str(root / method)]) == 0
            done[method] = root / method
        return done[method]

    return output


@pytest.fixture
def call(base, small_data, tmp_path, capfd, monkeypatch):
    """Runs the command, told to stop while it does a step if one is given; (exit code, output, errors)."""
    step_as_it_is = trainer.SentimentTrainer.training_step

    def run(*more, method="lora", stop_at=None):
        def training_step(self, *args):
            if self.state.global_step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_as_it_is(self, *args)

        monkeypatch.setattr(trainer.SentimentTrainer, "training_step", training_step)
        capfd.readouterr()
        code = sst2.main([*argv(base, small_data, method), "--output-dir", str(tmp_path / "out"), *more])
        return code, *capfd.readouterr()

    return run


def argv(base, data, method):
    settings = [
        "--batch-size",
        "20",
        "--epochs",
        "2",
        "--max-length",
        "32",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--method",
        method,
    ]
    targets = ["--target-modules", "query,value"] if sst2.METHODS[method].adapts else []
    return ["--model", str(base), "--data", str(data), *settings, *targets]


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_ends_as_one_that_was_not(call, whole, tmp_path, method):
    code, _, err = call(method=method, stop_at=PER_EPOCH - 2)
    assert code == 143 and "step 3 is done and saved as" in err
    code, out, err = call("--resume", method=method)
    assert code == 0, err
    assert f"going on from step 3: {tmp_path / 'out' / 'checkpoints' / 'step-00000003'}" in out
    assert whole_run(tmp_path / "out") == whole_run(whole(method))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_stopped_in_the_first_step_at_an_epoch_s_end_and_before_the_last(call, whole, tmp_path):
    seconds = []
    for step in (1, PER_EPOCH, 2 * PER_EPOCH - 1):
        code, _, err = call("--resume", stop_at=step)
        assert code == 143 and f"step {step} is done and saved as" in err
        seconds.append(record.read_json(tmp_path / "out" / "checkpoints" / f"step-{step:08d}" / "checkpoint.json")["seconds"])
    assert call("--resume")[0] == 0
    assert whole_run(tmp_path / "out") == whole_run(whole("lora"))
    assert 0 < seconds[0] < seconds[1] < seconds[2] < metrics_of(tmp_path / "out")["train_seconds"]


def test_a_signal_in_the_last_step_lets_the_run_finish(call, whole, tmp_path):
    assert call(stop_at=2 * PER_EPOCH)[0] == 0
    assert whole_run(tmp_path / "out") == whole_run(whole("lora"))


def test_the_newest_stay_and_nothing_of_the_base(call, tmp_path):
    assert call("--save-steps", "2", "--keep-checkpoints", "3", stop_at=7)[0] == 143
    assert kept(tmp_path) == ["step-00000004", "step-00000006", "step-00000007"]
    path = tmp_path / "out" / "checkpoints" / "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "tensors.safetensors", "trainer_state.json"]
    names = {name for name in checkpoints.read(path).tensors() if name.startswith("model.")}
    assert len(names) == 2 * 2 * 2 + 2  # A and B of two layers' two projections, weight and bias of the head
    assert all("lora_" in name or "classifier" in name for name in names)


def test_adapters_that_start_from_the_weight_keep_their_start():
    model = tiny.classifier()
    inject(model, LoraConfig(r=4, target_modules=["q"], init_lora_weights="pissa", modules_to_save=["classifier"]))
    own = set(resumable.own_parameters(model))
    tables = {f"layers.{i}.q.{table}.default" for i in range(2) for table in ("lora_A", "lora_B", "lora_A0", "lora_B0")}
    assert own == tables | {"classifier.weight", "classifier.bias"}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(call, tmp_path):
    """The checkpoints of a run that was stopped after step 4: of steps 2 and 4."""
    assert call("--save-steps", "2", stop_at=4)[0] == 143
    return tmp_path / "out" / "checkpoints"


def refused(result, *says):
    code, _, err = result
    assert code == 2 and err.splitlines()[-1].startswith("error: ")
    assert all(text in err for text in says), err


def test_other_settings_are_named(call, stopped):
    more = ("--resume", "--learning-rate", "1e-3", "--seed", "1", "--rank", "8", "--keep-checkpoints", "5")
    refused(call(*more), "learning_rate (0.0005 then, 0.001 now)", "seed (0 then, 1 now)", " r (16 then, 8 now)")
    assert kept(stopped.parents[1]) == ["step-00000002", "step-00000004"]


def test_other_sentences_are_noticed(call, stopped, small_data, tmp_path):
    other = shutil.copytree(small_data, tmp_path / "data")
    text = (other / "train.tsv").read_text(encoding="utf-8")
    (other / "train.tsv").write_text(text.replace("the", "teh"), encoding="utf-8")
    refused(call("--resume", "--data", str(other)), "other settings: data.sha256 (")


def test_an_unfinished_run_is_not_lost_by_mistake(call, stopped):
    refused(call(), "holds checkpoints of a run that was not finished; pass --resume to go on, or --overwrite")
    refused(call("--resume", "--overwrite"), "leave one out")
    assert call("--overwrite")[0] == 0 and not stopped.exists()


def test_a_broken_checkpoint_is_passed_over(call, stopped, whole, tmp_path):
    newest = stopped / "step-00000004" / "tensors.safetensors"
    data = newest.read_bytes()
    newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(call("--resume", str(newest.parent)), "tensors.safetensors is not what was written (its hash differs)")
    code, out, err = call("--resume")
    assert code == 0 and "note: passed over: " in err and "going on from step 2" in out
    assert whole_run(tmp_path / "out") == whole_run(whole("lora"))


@pytest.mark.parametrize("name", ["tensors.safetensors", "trainer_state.json", "checkpoint.json"])
def test_a_checkpoint_without_a_file_is_none(stopped, name):
    (stopped / "step-00000004" / name).unlink()
    with pytest.raises(ExperimentError, match=name):
        checkpoints.read(stopped / "step-00000004")
    assert checkpoints.newest(stopped).step == 2


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": "x"}', '{"step": 4, "sha256": {}, "settings": {}}'])
def test_a_checkpoint_with_other_numbers_is_none(stopped, content):
    (stopped / "step-00000004" / "checkpoint.json").write_text(content)
    with pytest.raises(ExperimentError, match=r"checkpoint\.json"):
        checkpoints.read(stopped / "step-00000004")


def remove(*path):
    """A change to a checkpoint's numbers: one is gone."""

    def change(numbers):
        for name in path[:-1]:
            numbers = numbers[name]
        del numbers[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        remove("optimizer"),
        remove("optimizer", "state"),
        remove("optimizer", "param_groups"),
        remove("optimizer", "state", "0"),
        remove("scheduler"),
        remove("last_logged"),
        lambda numbers: numbers["optimizer"].update(param_groups=[]),
        lambda numbers: numbers.update(scheduler=[1]),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(call, stopped, change):
    path = stopped / "step-00000004" / "checkpoint.json"
    numbers = json.loads(path.read_text())
    change(numbers)
    path.write_text(json.dumps(numbers))
    refused(call("--resume"), f"--resume: {path.parent} is not as written here (")


def test_a_place_without_a_checkpoint(call, tmp_path):
    refused(call("--resume", str(tmp_path / "nowhere")), "nowhere is no checkpoint: it has no checkpoint.json")
    code, out, _ = call("--resume")
    assert code == 0 and "no checkpoint to go on from: starting anew" in out


@pytest.mark.parametrize(("flag", "value"), [("--save-steps", "0"), ("--keep-checkpoints", "-1")])
def test_a_number_that_makes_no_sense(call, flag, value):
    refused(call(flag, value), f"{flag} must be at least 1, not {value}")


# --- the files --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    tensors, path = {"model.a": torch.ones(2)}, checkpoints.place(tmp_path / "checkpoints", 3)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", full)
        with pytest.raises(LoraError, match="step-00000003 can't be written: no space left on device; nothing was left"):
            checkpoints.write(path, 3, tensors, NUMBERS, "{}")
    assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / "checkpoints" / ".step-00000002.0123.tmp").mkdir()  # of a process that was killed
    for _ in range(2):
        checkpoints.write(path, 3, tensors, NUMBERS, "{}")
    found = checkpoints.newest(tmp_path / "checkpoints")
    assert (found.step, found.path) == (3, path) and found.tensors()["model.a"].tolist() == [1, 1]
    checkpoints.prune(tmp_path / "checkpoints", Saving().keep)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    checkpoints.prune(tmp_path / "checkpoints", 0)
    assert not (tmp_path / "checkpoints").exists()


def test_the_newest_is_that_of_the_most_steps(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        checkpoints.write(checkpoints.place(tmp_path, step), step, {"a": torch.ones(1)}, NUMBERS, "{}")
    assert checkpoints.newest(tmp_path).step == 100_000_000


def test_every_random_generator_goes_on_where_it_was():
    def draw():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), [random.gauss(0, 1) for _ in range(3)]

    draw()  # an odd number of normal variates: the second of a pair waits
    states = random_states()
    first = draw()
    draw()
    set_random_states(states)
    assert draw() == first
    assert all(torch.equal(state, states[name]) for name, state in states.items())


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(call, tmp_path, monkeypatch):
    loss_as_it_is = resumable.ResumableTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = loss_as_it_is(self, *args, **kwargs)
        self.loss = loss * float("inf") if self.state.global_step == 6 else loss
        return self.loss

    monkeypatch.setattr(resumable.ResumableTrainer, "compute_loss", compute_loss)
    code, _, err = call("--save-steps", "3")
    assert code == 2
    last = tmp_path / "out" / "checkpoints" / "step-00000006"
    where, todo = "step 7, learning rate 0.000222222", "lower --learning-rate; the last good checkpoint is"
    assert err.splitlines()[-1] == f"error: the loss is inf at {where}: training diverged; {todo} {last}"
    assert kept(tmp_path) == ["step-00000003", "step-00000006"] and not (tmp_path / "out" / "adapter").exists()


def test_a_gradient_that_is_not_finite_does_not_reach_the_adapter(call, tmp_path, monkeypatch):
    norm = trainer.SentimentTrainer._clip_grad_norm
    monkeypatch.setattr(trainer.SentimentTrainer, "_clip_grad_norm", lambda self, model: norm(self, model) * float("nan"))
    code, _, err = call()
    assert code == 2 and "error: the gradient is nan at step 1, learning rate 0: training diverged" in err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_broken_numbers_is_not_written(call, tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "own_parameters", lambda model: {"a": torch.nn.Parameter(torch.tensor([1.0, torch.inf]))})
    code, _, err = call("--save-steps", "1")
    assert code == 2 and "error: model.a has NaN or infinite values at step 1" in err
    assert not (tmp_path / "out").exists()


def test_the_settings_of_a_checkpoint_are_those_of_the_run(stopped, small_data):
    settings = json.loads((stopped / "step-00000004" / "checkpoint.json").read_text())["settings"]
    assert (settings["processes"], settings["device"], settings["seed"]) == (1, "cpu", 0)
    assert settings["hyperparameters"]["r"] == 16 and len(settings["data"]["sha256"]) == 16


def test_a_second_run_in_one_output_directory_is_told_so_and_the_first_is_left_alone(call, tmp_path):
    """It would remove what the first is writing."""
    begun = tmp_path / "out" / checkpoints.CHECKPOINTS / ".step-00000001.0123.tmp"
    begun.mkdir(parents=True)
    with alone(tmp_path / "out"):
        code, _, err = call()
    assert code == 2 and f"error: {tmp_path / 'out'} is in use: another process writes there" in err and err.count("\n") == 1
    assert begun.is_dir()
    assert call("--max-steps", "1")[0] == 0 and not begun.exists()
