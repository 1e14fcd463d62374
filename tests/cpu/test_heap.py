"""Freed memory goes back to the system, every so many steps and around evaluations; and little is kept in between."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import heap
from lora_core.cpu.heap import SHAPES, keep_few_shapes

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

#: Prints by how many bytes a process grows that multiplies matrices of 240 heights.
MANY_SHAPES = """
import random, sys, torch
from lora_core.cpu.heap import keep_few_shapes

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "few":
    keep_few_shapes()
x, W = torch.ones(2200, 16), torch.ones(1536, 16)
torch.ones(8_000_000)  # freed, it lets glibc take blocks of its size from the heap, as a training step does
before = resident_bytes()
for rows in random.Random(0).sample(range(256, 2176, 8), 240):
    torch.ops.mkldnn._linear_pointwise(x[:rows], W, None, "none", [], "")
print(resident_bytes() - before)
"""


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back when asked")
def test_free_pages_between_blocks_in_use_go_back():
    blocks = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each: from the heap, not mapped one by one
    kept = blocks[::2]
    del blocks
    before = resident_bytes()
    assert heap.give_back()
    freed = before - resident_bytes()
    assert freed > 25e6  # of the 50 MB between the blocks that are kept, less what shares a page with them
    assert all(block[0] == 1 for block in kept)


def test_it_is_done_every_so_many_steps_and_around_evaluations(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "give_back", lambda: calls.append(step))
    callback = heap.GiveBack()
    for step in range(1, 2 * heap.STEPS + 2):
        state, control = SimpleNamespace(global_step=step), SimpleNamespace(should_evaluate=step == 7)
        callback.on_step_end(None, state, control)
        if control.should_evaluate:
            callback.on_evaluate(None, state, control)
    assert calls == [7, 7, heap.STEPS, 2 * heap.STEPS]


def test_it_is_done_before_the_first_batch_and_every_large_one(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "give_back", lambda: calls.append(tokens))
    callback = heap.GiveBack()
    for tokens in (900, 100, 299, 301, 1200, 350, 450):
        callback.before_batch(tokens)
    assert calls == [900, 301, 1200, 450]


@pytest.fixture
def unset(monkeypatch):
    for name in CAPACITIES:  # set first, so that what a test sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="holes in the heap are glibc's")
@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
def test_products_of_many_shapes_leave_few_holes(unset):
    grown = {
        kept: int(subprocess.run([sys.executable, "-c", MANY_SHAPES, kept], check=True, capture_output=True, text=True).stdout)
        for kept in ("all", "few")
    }
    assert grown["few"] < 0.75 * grown["all"], grown  # measured: 0.45


def test_a_capacity_that_is_set_stays(unset, monkeypatch):
    monkeypatch.setenv(CAPACITIES[0], "7")
    keep_few_shapes()
    assert [os.environ[name] for name in CAPACITIES] == ["7", str(SHAPES)]


#: Prints what of the environment is not as it was, after the engine was used.
USED = """
import os
before = dict(os.environ)
import torch
from torch import nn
from lora_core import LoraConfig, inject, merge_and_unload, quantize_nf4, use_fast_dropout, use_fast_linear

model = nn.Sequential(nn.Linear(512, 512), nn.Dropout(0.1), nn.Linear(512, 512), nn.Linear(512, 512))
use_fast_linear(model)
use_fast_dropout(model)
quantize_nf4(model, skip=["0"])
inject(model, LoraConfig(target_modules="all-linear", lora_dropout=0.1))
model(torch.randn(64, 512)).sum().backward()
merge_and_unload(model)
print({name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)} or "as it was")
"""


def test_the_engine_leaves_the_environment_alone():
    run = subprocess.run([sys.executable, "-c", USED], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "as it was"
