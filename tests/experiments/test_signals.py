"""Ctrl-C, SIGTERM and SIGKILL: the step is finished and kept, or at worst lost; the run goes on to the same end."""

import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from experiments import beginning, command, sst2, stopping, trainer
from experiments.parallel import Processes
from experiments.stopping import Noted, Stopped, note_signals
from tests.support.processes import finish, small_base, start, whole_run

KILLED = (
    "--model",
    "packaged",
    "--method",
    "lora",
    "--batch-size",
    "8",
    "--max-length",
    "16",
    "--device",
    "cpu",
    "--precision",
    "fp32",
)
KILLED += ("--max-steps", "24", "--epochs", "2")


CASES = ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"))


@pytest.mark.parametrize(("number", "code", "cause"), CASES)
def test_a_signal_finishes_the_step_and_the_printed_command_goes_on(
    number, code, cause, tmp_path, small_data, capfd, monkeypatch
):
    base = small_base(tmp_path / "base")
    argv = [
        "--model",
        str(base),
        "--data",
        str(small_data),
        "--method",
        "head-only",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    step_as_it_is = trainer.SentimentTrainer.training_step

    def training_step(self, *args):
        if self.state.global_step == 1:
            os.kill(os.getpid(), number)
        return step_as_it_is(self, *args)

    monkeypatch.setattr(trainer.SentimentTrainer, "training_step", training_step)
    monkeypatch.chdir(tmp_path)
    assert sst2.main([*argv, "--overwrite"]) == code
    said = capfd.readouterr().err.splitlines()[-1]
    stated, _, to_go_on = said.partition("; go on with: ")
    output = f"runs/head-only-{small_data.name}-base-seed0"
    assert stated == f"error: {cause}; step 2 is done and saved as {output}/checkpoints/step-00000002"
    words = shlex.split(to_go_on)
    assert words == [beginning.interpreter(), "-m", "experiments.sst2", *argv, "--output-dir", output, "--resume"]
    monkeypatch.setattr(trainer.SentimentTrainer, "training_step", step_as_it_is)
    assert sst2.main(words[3:]) == 0 and (tmp_path / output / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--output-dir", "o", "--resume"]),
        (["--resume", "--seed", "1"], ["--seed", "1", "--output-dir", "o", "--resume"]),
        (["--resume", "a/step-00000001", "--seed", "1"], ["--seed", "1", "--output-dir", "o", "--resume"]),
        (["--resume=x", "--overwrite", "--output-dir=p"], ["--output-dir=p", "--resume"]),
        (["--model", "a b"], ["--model", "a b", "--output-dir", "o", "--resume"]),
    ],
)
def test_the_command_to_go_on(argv, words):
    said = sst2.command_to_go_on(argv, Path("o"), Processes())
    assert shlex.split(said) == [beginning.interpreter(), "-m", "experiments.sst2", *words]


@pytest.mark.parametrize(
    ("prefix", "executable", "called"),
    [
        ("/usr", "/usr/bin/python3", "python"),  # no virtual environment: the one that everybody calls so
        ("here/.venv", "here/.venv/bin/python", ".venv/bin/python"),
        ("/elsewhere/a b", "/elsewhere/a b/bin/python", "'/elsewhere/a b/bin/python'"),
    ],
)
def test_the_interpreter_is_called_so_that_the_line_works_as_printed(monkeypatch, tmp_path, prefix, executable, called):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(beginning.sys, "base_prefix", "/usr")
    for name, path in (("prefix", prefix), ("executable", executable)):
        monkeypatch.setattr(beginning.sys, name, path if path.startswith("/") else str(tmp_path / path))
    assert beginning.interpreter() == called


def test_the_command_to_go_on_with_several_processes():
    said = sst2.command_to_go_on([], Path("o"), Processes(8, 0, 4, 0))
    assert said == "torchrun --nproc-per-node 4 --nnodes 2 -m experiments.sst2 --output-dir o --resume"


def test_before_there_is_anything_to_keep(capsys):
    for number, code, cause in CASES:
        before = signal.getsignal(number)
        assert command.run(lambda number=number: os.kill(os.getpid(), number) or time.sleep(5)) == code
        assert capsys.readouterr().err == f"error: {cause}; nothing was saved\n"
        assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_step_but_not_an_echo_of_the_first(monkeypatch):
    noted = Noted()
    with note_signals(noted):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher hands it on
        assert noted.signal == signal.SIGTERM
        monkeypatch.setattr(stopping, "ECHO", -1.0)
        with pytest.raises(Stopped) as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.value.signal == signal.SIGINT


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def kill_and_go_on(times, data, root):
    """Kills a run at so many random moments and lets it go on each time; checks that it ends as one left alone."""
    argv = (*KILLED, "--data", data, "--save-steps", "1", "--resume")
    code, said = finish(start(*argv, "--output-dir", root / "whole"), timeout=500)
    assert code == 0, said
    output, rng = root / "killed", random.Random(time.time_ns())
    for attempt in range(times):
        process = start(*argv, "--output-dir", output)
        before, more, deadline = newest(output), rng.randrange(3), time.monotonic() + 300
        while newest(output) <= before + more and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))  # in a step, or while a checkpoint is being written
        process.kill()
        code, said = finish(process)
        print(f"killed at {newest(output)}", file=sys.stderr)
        assert code in (-signal.SIGKILL, 0), said
        assert code or attempt, "the run ended before it was killed"
    code, said = finish(start(*argv, "--output-dir", output), timeout=500)
    assert code == 0, said
    assert whole_run(output) == whole_run(root / "whole")
    assert not (output / "checkpoints").exists()


def newest(output):
    """The step of the newest checkpoint of a run; 0 where there is none yet."""
    return max((int(path.name[5:]) for path in (output / "checkpoints").glob("step-*")), default=0)


def test_killed_twice_and_resumed_the_run_ends_the_same(small_data, tmp_path):
    kill_and_go_on(2, small_data, tmp_path)


@pytest.mark.slow
def test_killed_ten_times_and_resumed_the_run_ends_the_same(small_data, tmp_path):
    kill_and_go_on(10, small_data, tmp_path)
