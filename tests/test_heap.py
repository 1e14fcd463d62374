"""Freed memory goes back to the system, every so many steps and around evaluations."""

import platform
from types import SimpleNamespace

import pytest
import torch

from experiments import heap


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
