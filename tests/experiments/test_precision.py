"""Which precision a run computes in, and that bfloat16 learns what float32 does."""

import json

import pytest
import torch

from experiments import precision
from experiments.errors import ExperimentError
from experiments.models import resolve
from experiments.precision import choose_precision
from experiments.sst2 import main
from lora_core.__main__ import main as lora_core


@pytest.mark.parametrize("faster", [0.3, 4.0])
def test_auto_takes_bfloat16_where_it_is_faster(monkeypatch, faster):
    monkeypatch.setattr(precision, "speed_of_bf16", lambda: faster)
    assert choose_precision("auto", "cpu") == ("bf16" if faster > 1 else "fp32")
    assert choose_precision("bf16", "cpu") == "bf16" and choose_precision("fp32", "cpu") == "fp32"


@pytest.mark.parametrize("has_it", [False, True])
def test_a_gpu_uses_what_it_has(monkeypatch, has_it):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_it)
    assert choose_precision("auto", "cuda") == ("bf16" if has_it else "fp32")
    assert choose_precision("fp32", "cuda") == "fp32"
    if has_it:
        assert choose_precision("bf16", "cuda") == "bf16"
    else:
        with pytest.raises(ExperimentError, match="does not have it; pass fp32 or auto"):
            choose_precision("bf16", "cuda")


def test_looking_at_the_speed_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    assert 0.01 < precision.speed_of_bf16() < 100 and torch.get_num_threads() == before


def test_a_run_in_bfloat16_learns_what_one_in_float32_does(tmp_path, small_data):
    losses = {}
    for kind in ("fp32", "bf16"):
        output = tmp_path / kind
        flags = ["--model", "packaged", "--data", str(small_data), "--device", "cpu", "--precision", kind, "--max-steps", "6"]
        assert main(["--method", "qlora", *flags, "--output-dir", str(output)]) == 0
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["hyperparameters"]["precision"] == kind
        assert lora_core(["verify", str(output / "adapter"), "--base", str(resolve("packaged").directory)]) == 0
        losses[kind] = torch.tensor([loss for _, loss in metrics["loss_history"]])
    # 8 bits of precision in each product; a loss is of the order of 1.
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0, atol=0.02)
    assert not torch.equal(losses["bf16"], losses["fp32"])
