"""Several threads on one model: each with its own mix of adapters, and none can change what another is using."""

import threading
import time

import pytest
import torch

from lora_core import (
    LoraConfig,
    LoraError,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    rename_adapter,
    save_adapter,
    set_adapter,
    unload,
)
from lora_core.errors import StateError
from lora_core.model.registry import registry_of
from tests.support import tiny
from tests.support.mixes import MIX, VARIANTS, logits, one_by_one


def with_variants(architecture, bits=32):
    """A tiny transformer with an adapter of each variant: DoRA, plain, rank-stabilised, PiSSA."""
    model = tiny.build(architecture)
    if bits == 4:
        quantize_nf4(model, skip=["classifier"] if architecture in tiny.CLASSIFIERS else [])
    for i, (name, settings) in enumerate(VARIANTS.items()):
        task = "SEQ_CLS" if architecture in tiny.CLASSIFIERS else None
        inject(model, LoraConfig(target_modules=tiny.projections(architecture)[: 1 + i % 2], task_type=task, **settings), name)
        tiny.randomize(model, name, seed=i)
    return model


def run_in_threads(jobs):
    """Runs the jobs at the same time; raises what the first to fail raised."""
    barrier, failures = threading.Barrier(len(jobs)), []

    def work(job):
        try:
            barrier.wait(timeout=30)
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]


@pytest.mark.parametrize(("architecture", "bits"), [("bert", 32), ("gpt2", 32), ("llama", 32), ("bert", 4)])
def test_eight_threads_with_eight_mixes_each_get_their_own_rows(architecture, bits):
    model = with_variants(architecture, bits)
    tokens = torch.cat([tiny.TOKENS, tiny.TOKENS + 20])
    mixes = [[*MIX[i % 6 :], *MIX[: i % 6]] for i in range(6)] + [["dora"] * 6, [None] * 6]
    expected = [one_by_one(model, names, tokens, logits) for names in mixes]
    assert len({tuple(e.flatten().tolist()) for e in expected}) == 8

    def job(names, want):
        def run():
            for _ in range(3):
                with mixed_batch(model, names):
                    # Batched and single products sum the same 100 or so terms in another order; 4-bit ones likewise.
                    atol = 1e-5 * max(1, want.abs().max().item())
                    torch.testing.assert_close(logits(model, tokens), want, rtol=0, atol=atol)

        return run

    run_in_threads([job(names, want) for names, want in zip(mixes, expected, strict=True)])
    assert not registry_of(model).mixing and not any(m._forward_hooks for m in model.modules())


def test_a_thread_that_runs_the_head_while_another_registers_its_hook(model):
    x = tiny.batch(tokens=2)
    active = model(x).detach()

    def other():
        torch.testing.assert_close(model(x).detach(), active)

    with mixed_batch(model, ["b", None]):
        head = model.classifier
        head._forward_hooks_with_kwargs.clear()  # as torch has it between the two tables that it writes for a hook
        run_in_threads([other])


@pytest.fixture
def model(tmp_path):
    """With two adapters, of which "a" is active, and "a" on disk."""
    model = tiny.classifier().eval()
    for i, name in enumerate(("a", "b")):
        inject(model, LoraConfig(r=2 + i, target_modules=["q", "v"], modules_to_save=["classifier"]), name)
        tiny.randomize(model, name, seed=i)
    save_adapter(model, tmp_path, "a")
    return model


def disable(model):
    with disable_adapters(model):
        pytest.fail("were disabled")


CHANGES = {
    "set_adapter": lambda model, path: set_adapter(model, "b"),
    "disable_adapters": lambda model, path: disable(model),
    "rename_adapter": lambda model, path: rename_adapter(model, "b", "c"),
    "delete_adapter": lambda model, path: delete_adapter(model, "b"),
    "unload": lambda model, path: unload(model),
    "merge_adapter": lambda model, path: merge_adapter(model),
    "merge_and_unload": lambda model, path: merge_and_unload(model),
    "inject": lambda model, path: inject(model, LoraConfig(target_modules=["k"]), "c"),
    "load_adapter, new": lambda model, path: load_adapter(model, path, "c"),
    "load_adapter, into one": lambda model, path: load_adapter(model, path, "a"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["another thread", "this thread"])
def test_the_adapters_can_not_be_changed_while_a_mixed_batch_is_open(model, tmp_path, change, where):
    opened, done = threading.Event(), threading.Event()
    x, before = tiny.batch(tokens=2), tiny.snapshot(model)
    expected = one_by_one(model, ["b", None], x, lambda model, row: model(row).detach())

    def hold():
        with mixed_batch(model, ["b", None]):
            opened.set()
            assert done.wait(timeout=30)
            torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-5)

    def refused():
        with pytest.raises(StateError, match=f"open on this model in {where}; change its adapters after") as caught:
            CHANGES[change](model, tmp_path)
        assert isinstance(caught.value, LoraError)

    def try_it():
        assert opened.wait(timeout=30)
        try:
            refused()
        finally:
            done.set()

    if where == "another thread":
        run_in_threads([hold, try_it])
    else:
        with mixed_batch(model, ["b", None]):
            refused()
    assert tiny.snapshot(model) == before and registry_of(model).active == ("a",)
    if change != "disable_adapters":  # and afterwards it can
        CHANGES[change](model, tmp_path)


def test_adapters_that_were_disabled_before_come_back_though_a_mixed_batch_is_open(model):
    """Else a thread that comes first to the end of its block would leave the model without them."""
    opened, done = threading.Event(), threading.Event()

    def hold():
        assert opened.wait(timeout=30)
        with mixed_batch(model, ["b"]):
            done.set()
            time.sleep(0.1)

    def outer():
        with disable_adapters(model):
            opened.set()
            assert done.wait(timeout=30)
        assert registry_of(model).active == ("a",)

    run_in_threads([hold, outer])


def test_a_mixed_batch_that_fails_to_open_does_not_stay_open(model):
    with pytest.raises(LoraError), mixed_batch(model, ["a", "nobody"]):
        pytest.fail("was opened")
    model.train()
    with pytest.raises(StateError, match="call model.eval"), mixed_batch(model, ["a"]):
        pytest.fail("was opened")
    set_adapter(model, "b")
