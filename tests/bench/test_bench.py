"""The bench: what it times, counts and compares is what it says. No test looks at how long anything took."""

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("loralib")
pytest.importorskip("matplotlib")

from bench import compiled, goals, job, memory, models, overhead, peers, report, timing
from bench.__main__ import QUESTIONS, main
from bench.measure import Disagreement, Measure, Ratio
from bench.settings import Settings
from experiments import reference
from tests.support import ROOT, fabricated


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `python -m bench --quick` leaves, and its path."""
    path = tmp_path_factory.mktemp("bench") / "cpu.json"
    threads = torch.get_num_threads()
    try:
        assert main(["--quick", "--threads", "1", "--output", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text()), path


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, *seconds):
        """A function that takes the next of `seconds` at each call, then the last again and again."""
        remaining = list(seconds)

        def run(*_):
            self.log.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return run


# --- timing -----------------------------------------------------------------------------------------------------------


def test_every_round_calls_every_candidate_once():
    clock = Clock()
    timing.interleave({n: clock.work(n, 1.0) for n in "abc"}, rounds=20, warmup=2, clock=clock)
    rounds = [clock.log[i : i + 3] for i in range(0, len(clock.log), 3)]
    assert len(rounds) == 22
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # not always in the same order


def test_medians_and_ratios_leave_the_warm_up_out():
    clock = Clock()
    work = {"a": clock.work("a", 99.0, 2.0, 4.0, 9.0), "b": clock.work("b", 50.0, 1.0, 4.0, 3.0)}
    samples = timing.interleave(work, rounds=3, warmup=1, clock=clock)
    assert samples.seconds == {"a": (2.0, 4.0, 9.0), "b": (1.0, 4.0, 3.0)}
    assert samples.medians() == {"a": 4.0, "b": 3.0}
    ratio = samples.ratio("a", "b")
    assert ratio.value == 4 / 3  # of the medians
    assert (ratio.low, ratio.high) == (1.5, 2.5)  # quartiles of 2, 1, 3
    assert samples.ratio_within_rounds("a", "b") == Ratio(2.0, 1.5, 2.5)


def test_short_calls_are_timed_in_bunches_of_the_same_size():
    clock = Clock()
    work = {"short": clock.work("short", 1e-4), "long": clock.work("long", 1e-3)}
    samples = timing.interleave(work, rounds=2, warmup=1, clock=clock)
    calls = round(timing.MIN_SAMPLE / 1e-4)
    assert clock.log.count("short") == clock.log.count("long") == 1 + 2 * calls
    assert samples.median("short") == pytest.approx(1e-4)


def test_preparing_is_off_the_clock_and_once_for_each_call():
    clock = Clock()
    prepare = clock.work("prepare", 7.0)
    candidate = timing.Candidate(clock.work("run", 1e-5), prepare)
    samples = timing.interleave({"a": candidate}, rounds=2, warmup=1, clock=clock)
    assert clock.log == ["prepare", "run"] * 3
    assert samples.median("a") == pytest.approx(1e-5)


def test_the_device_is_waited_for_before_each_look_at_the_clock():
    clock = Clock()

    def synchronize():
        clock.log.append("wait")

    timing.interleave({"a": clock.work("a", 1.0)}, rounds=1, warmup=1, synchronize=synchronize, clock=clock)
    assert clock.log == ["wait", "a", "wait"] * 2


# --- counting ---------------------------------------------------------------------------------------------------------


def test_saved_bytes_of_a_case_that_is_known():
    x = torch.randn(10, 4)
    model = nn.Linear(4, 3)
    # The product keeps x (160 bytes) and the weight, which is the model's own; tanh keeps its output (120 bytes).
    assert memory.saved_bytes(model, lambda: model(x).tanh().sum()) == 160 + 120


def test_saved_bytes_counts_a_shared_storage_once():
    x = torch.randn(8, 8)
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    assert memory.saved_bytes(model, lambda: (model[0](x) + model[1](x)).sum()) == x.nbytes
    assert memory.saved_bytes(model, lambda: (model[0](x[:4]) + model[1](x[4:])).sum()) == x.nbytes


def test_the_floor_counts_multiplications():
    assert overhead.Case().floor == pytest.approx(1.0625)  # 6 T r (d_in + d_out) over 4 T d_in d_out
    assert overhead.Case(384, 384).floor == pytest.approx(1.125)
    assert overhead.Case(backward=False).floor == pytest.approx(1 + 16 * 2 / 768)


# --- the peers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [False, True])
def test_layers_of_all_libraries_compute_the_same_numbers(nf4):
    torch.manual_seed(0)
    candidates = peers.layers(64, 32, r=4, dropout=0.1, device="cpu", dtype=torch.float32, nf4=nf4)
    assert set(candidates) == {"frozen", "full", "ours", "peft"} | (set() if nf4 else {"loralib"})
    assert all(layer.training for layer in candidates.values())
    assert peers.ab(candidates["ours"])[1].abs().min() > 0
    x, dy = torch.randn(7, 64, requires_grad=True), torch.randn(7, 32)
    assert peers.check_layers(candidates, x, dy, tolerance=1e-5) <= 1e-5


def test_layers_that_differ_are_found():
    candidates = peers.layers(64, 32, r=4, dropout=0.0, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        peers.ab(candidates["peft"])[1][0, 0] += 1
    with pytest.raises(Disagreement, match="differ by"):
        peers.check_layers(candidates, torch.randn(7, 64, requires_grad=True), torch.randn(7, 32), tolerance=1e-4)


def test_the_frozen_base_sends_gradients_as_far_down_as_adapters_would():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    peers.freeze(model, targets=[model[1]], head="2")
    reached = []
    for i in (0, 1):
        model[i].register_forward_hook(lambda m, _, y, i=i: reached.append(i) if y.requires_grad else None)
    model(torch.randn(3, 4)).sum().backward()
    assert reached == [1]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["2.weight", "2.bias"]


def test_models_agree_also_on_all_linear_layers():
    ours = models.classifier("ours", models.ALL_LINEAR)
    theirs = models.classifier("peft", models.ALL_LINEAR, like=ours)
    batch = models.tokens(2, 6)
    difference = peers.check_models(
        {"ours": ours, "peft": theirs}, lambda model: models.classification_loss(model, batch), tolerance=1e-4
    )
    assert difference <= 1e-4


# --- the whole --------------------------------------------------------------------------------------------------------


def test_every_goal_but_the_job_is_measured(quick):
    content, _ = quick
    assert set(content["questions"]) == set(QUESTIONS)
    missing = {g["key"] for g in content["goals"] if g["measured"] is None}
    # One is read from a finished experiment; the others need a language model, the second of them more than quick rounds.
    assert missing <= {"job-qlora", "peak-llm-qlora-fp32", "peak-llm-qlora-bf16"}
    assert all(g["verdict"] in ("no verdict", "not measured") for g in content["goals"])


def test_every_value_is_a_positive_number_and_has_its_machine(quick):
    content, _ = quick
    for part in content["questions"].values():
        assert part["machine"]["threads"] == 1
        assert part["machine"]["torch"] == version("torch")
        for measure in part["measures"]:
            assert all(value > 0 for value in measure["values"].values()), measure["title"]
            assert all(ratio["value"] > 0 for ratio in measure["ratios"].values()), measure["title"]


def test_the_chart_is_beside_the_numbers(quick):
    _, path = quick
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_question_again_leaves_the_others_as_they_were(quick, tmp_path):
    content, path = quick
    again = tmp_path / "again.json"
    again.write_bytes(path.read_bytes())
    assert main(["merging", "--quick", "--output", str(again)]) == 0
    after = json.loads(again.read_text())
    assert after["questions"].keys() == content["questions"].keys()
    assert after["questions"]["loading"] == content["questions"]["loading"]
    assert after["questions"]["merging"] != content["questions"]["merging"]
    assert set(tmp_path.iterdir()) == {again, again.with_suffix(".png")}  # and no temporary file


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="inductor needs a C++ compiler")
def test_each_model_is_measured_compiled_and_as_it_is():
    settings = Settings(quick=True)
    for measure in compiled.smollm(False, settings):
        assert set(measure.values) == {f"{name}{after}" for name in compiled.NAMES for after in ("", compiled.AFTER)}
        assert all(value > 0 for value in measure.values.values())
        assert measure.setting["seconds of the first call"]["ours, compiled"] > measure.values["ours, compiled"]


def test_a_measure_survives_the_file(quick):
    _, path = quick
    for measure in report.measures_of(report.read(path)):
        assert isinstance(measure, Measure)
        assert report.show(measure).startswith(measure.title)


@pytest.mark.parametrize(("beyond", "verdict"), [("aim", "met, and the aim"), ("must", "met"), ("", "NOT MET")])
@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.text)
def test_verdicts(goal, beyond, verdict):
    value = getattr(goal, beyond) if beyond else goal.must + (-0.1 if goal.more else 0.1)
    measure = Measure(goal.key, "", "s", {}, {goal.ratio: Ratio(value)})
    rows = {row["goal"]: row for row in goals.judged([measure], comparable=True)}
    assert rows[goal.text]["verdict"] == (verdict if goal.must != goal.aim or not beyond else "met, and the aim")


def test_the_peak_of_the_job_is_read_from_its_metrics(tmp_path, monkeypatch):
    theirs = {"engine": "peft", "harness": "plain", "method": "qlora", "data": "SST-2", "train": 67_349, "seed": 0}
    monkeypatch.setattr(reference, "read", lambda: [theirs | {"settings": {"epochs": 3}, "peak_rss_mb": 2000.0}])
    assert job.peak(tmp_path) is None
    short = fabricated.metrics("qlora", peak_rss_mb=9999.0)
    short["data"]["train"] = 1000
    made = [fabricated.metrics("qlora", seed=seed, peak_rss_mb=peak) for seed, peak in ((0, 900.0), (1, 1100.0))]
    fabricated.write(tmp_path, short, *made, fabricated.metrics("lora", peak_rss_mb=1250.0))
    assert job.peak(tmp_path).ratios == {"ours / peft": Ratio(0.5), "ours / ours, LoRA": Ratio(0.8)}


def test_the_committed_peak_of_the_job_is_that_of_the_committed_runs():
    answers = report.read(ROOT / "bench" / "results" / "cpu.json")
    (measure,) = [m for m in report.measures_of(answers) if m.key == "job-qlora"]
    assert measure == job.peak(ROOT / "experiments" / "results")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["job", "--device", "cuda"], "leave out --device cuda"),
        (["speed"], "no question 'speed'"),
        (["--threads", "0"], "at least 1"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_a_mistake_is_answered_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
