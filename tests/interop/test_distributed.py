"""Two processes on this machine, over gloo: the adapter of one process, nothing twice, and an end when one of them dies."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from experiments import parallel, sst2
from experiments.errors import ExperimentError
from experiments.parallel import Processes
from tests.support.processes import finish, metrics_of, small_base, start, trained

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base"), dropout=0.0)


@pytest.fixture(scope="module")
def argv(base, small_data):
    settings = [
        "--batch-size",
        "10",
        "--train-samples",
        "91",
        "--dropout",
        "0",
        "--max-length",
        "32",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    model = ["--method", "lora", "--target-modules", "query,value", "--model", str(base), "--data", str(small_data)]
    return [*model, *settings, "--epochs", "2"]


def test_two_processes_make_the_adapter_of_one(argv, tmp_path):
    two = start(*argv, "--output-dir", tmp_path / "two", count=2)
    assert sst2.main([*argv, "--output-dir", str(tmp_path / "one")]) == 0
    code, said = finish(two)
    assert code == 0, said
    one, both = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == both.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=TOLERANCE)
    alone, together = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for key in ("accuracy", "f1", "accuracy_by_epoch", "hyperparameters", "trainable_parameters"):
        assert together[key] == alone[key]
    assert together["loss"] == pytest.approx(alone["loss"], abs=TOLERANCE)
    steps, losses = zip(*together["loss_history"], strict=True)
    assert steps == tuple(range(1, 21))  # 91 sentences: the last batch of an epoch has one, and one process has none of it
    assert losses == pytest.approx([loss for _, loss in alone["loss_history"]], abs=2e-4)  # they are rounded
    assert together["device"].startswith("2 processes, each on cpu")
    for line in ("base model: ", "training 4,162 of ", "epoch 1 of 2: ", "lora: accuracy ", "results: "):
        assert said.count(line) == 1


def test_a_dead_process_ends_the_job_with_a_message(argv, tmp_path):
    output = tmp_path / "out"
    job = start(*argv, "--epochs", "200", "--save-steps", "5", "--output-dir", output, count=2)
    try:
        wait_for(lambda: list(output.glob("checkpoints/step-*")), job)
        os.kill(worker(job, rank=1), signal.SIGKILL)
        killed = time.monotonic()
        code, said = finish(job, timeout=60)
    finally:
        job.kill()
    assert code and time.monotonic() - killed < 60
    (line,) = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert line.startswith("error: lost another process: ") or line.startswith("error: terminated; ")
    assert "--resume" in line and "checkpoints/step-" in line
    assert not (output / "metrics.json").exists()


def wait_for(ready, job, seconds=120):
    deadline = time.monotonic() + seconds
    while not ready():
        assert job.poll() is None and time.monotonic() < deadline, finish(job)[1]
        time.sleep(0.05)


def worker(job, rank):
    """The process of this rank that torchrun started."""
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    (found,) = [c for c in children if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{c}/environ").read_bytes()]
    return int(found)


def test_a_sharded_model_is_trained_saved_and_loaded_as_a_whole_one(tmp_path):
    code, said = finish(start(tmp_path, count=2, module="tests.support.sharded"))
    assert code == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "dora", "nf4", "pissa", "vera"]


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_shares_of_a_batch_average_to_its_mean(rows, count):
    losses = torch.arange(1.0, rows + 1)
    shares = [Processes(count, rank).share({"labels": losses}) for rank in range(count)]
    assert sum(weight * share["labels"].mean() for share, weight in shares) / count == pytest.approx(losses.mean())
    real = [share["labels"] for share, weight in shares if weight]
    assert torch.cat(real).sort().values.tolist() == losses.tolist()
    assert all(len(share["labels"]) for share, _ in shares)


def test_processes_are_those_that_the_launcher_names(monkeypatch):
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert Processes.here() == Processes() and Processes().first
    for name, value in zip(names, "8541", strict=True):
        monkeypatch.setenv(name, value)
    assert Processes.here() == Processes(8, 5, 4, 1) and not Processes.here().first
    monkeypatch.setenv("RANK", "five")
    assert Processes.here() == Processes()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ExperimentError, match="2 processes were started on a machine with 1 GPUs; start one for each"):
        Processes(2, 0, 2, 0).join("cuda")


def test_processes_that_do_not_agree_say_so(monkeypatch):
    monkeypatch.setattr(Processes, "reduce", lambda self, numbers: [number + 1 for number in numbers])
    with pytest.raises(ExperimentError, match="do not have the same settings, data or base model"):
        Processes(2, 0, 2, 0).agree({"seed": 0})
    assert Processes().agree({"seed": 0}) is None


def test_the_first_decides_for_all(monkeypatch):
    def refuse():
        raise ExperimentError("no")

    monkeypatch.setattr(Processes, "reduce", lambda self, numbers: numbers)
    assert Processes(2, 0).first_decides(lambda: 7) == 7
    with pytest.raises(ExperimentError, match="no"):
        Processes(2, 0).first_decides(refuse)
    with pytest.raises(ExperimentError, match="process 0 gave up"):
        Processes(2, 1).first_decides(refuse)


def test_a_process_that_is_lost_in_a_step_is_told_of_as_the_training_does(monkeypatch):
    def closed(*args):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", closed)
    says = "see what that one says, and start with --resume"
    with pytest.raises(ExperimentError, match=says), parallel.lost_processes(then=lambda: "start with --resume"):
        Processes(count=2).reduce([0])


def test_only_the_loss_of_a_process_is_taken_for_one():
    says = "lost another process: Connection closed by peer; see what that one says, and start all of them again"
    with pytest.raises(ExperimentError, match=says), parallel.lost_processes():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), parallel.lost_processes():
        raise RuntimeError("shapes differ")


def test_only_the_first_prints(capsys):
    for rank, local, out, err in ((0, 0, "a\n", "b\n"), (1, 1, "", ""), (2, 0, "", "b\n")):
        with parallel.first_prints(Processes(4, rank, 2, local)):
            print("a")
            print("b", file=parallel.sys.stderr)
        assert tuple(capsys.readouterr()) == (out, err)
