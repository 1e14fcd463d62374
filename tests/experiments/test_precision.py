"""Which precision a run computes in, and that bfloat16 learns what float32 does."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from experiments import precision
from experiments.errors import ExperimentError
from experiments.models import resolve
from experiments.precision import choose_precision
from experiments.sst2 import main
from lora_core.__main__ import main as lora_core

#: Prints, after a short run that looks what a product takes, by how many bytes products of 240 heights make the process grow.
MANY_SHAPES = """
import random, sys, torch
from experiments.heap import give_back
from experiments.sst2 import main

def resident_bytes():
    give_back()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

assert main(sys.argv[1:]) == 0
x, W = torch.ones(2200, 384, dtype=torch.bfloat16), torch.ones(1536, 384, dtype=torch.bfloat16)
before = resident_bytes()
for rows in random.Random(0).sample(range(256, 2176, 8), 240):
    x[:rows] @ W.t() @ W
print(resident_bytes() - before)
"""


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="holes in the heap are glibc's")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor")
def test_a_run_that_looks_at_the_speed_keeps_few_shapes(tmp_path, small_data):
    flags = ["--model", "packaged", "--data", str(small_data), "--device", "cpu", "--precision", "auto", "--max-steps", "1"]
    capacities = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # which earlier tests of this process may have set
    environment, grown = {name: value for name, value in os.environ.items() if name not in capacities}, {}
    for kept, given in (("few", {}), ("all", dict.fromkeys(capacities, "1024"))):
        command = [sys.executable, "-c", MANY_SHAPES, *flags, "--output-dir", str(tmp_path / kept)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment | given)
        grown[kept] = int(done.stdout.splitlines()[-1])
    assert grown["few"] < 0.25 * grown["all"], grown


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
