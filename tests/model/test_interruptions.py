"""Every verb that changes a model, interrupted at its lines: it leaves the model as it was, or is finished."""

import copy
import random

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    combine_adapters,
    delete_adapter,
    disable_adapters,
    extract_adapter,
    initialize_corda,
    initialize_eva,
    initialize_loftq,
    initialize_lora_ga,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    rename_adapter,
    save_adapter,
    scale_adapter,
    set_adapter,
    share_dropout_masks,
    unload,
    unmerge_adapter,
)
from lora_core.errors import TargetError
from tests.support import tiny
from tests.support.interruptions import Lines, difference, state

WIDTH = 16
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
SAMPLES = 60  # of the lines of each case: with these cases more than 1,500 in all
ERRORS = (KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError)
TOKENS = LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[3, 7])
ACTIVATED = LoraConfig(r=2, target_modules=["c_attn"], alora_invocation_tokens=[3, 7])
REPLICATED = LoraConfig(r=2, target_modules=["query"], layer_replication=[[0, 1], [0, 1]])
HEAD = {"r": 2, "target_modules": ["q", "v"], "modules_to_save": ["classifier"]}

pytestmark = pytest.mark.filterwarnings("ignore:.*trains it apart:UserWarning")


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return tiny.Classifier(WIDTH).to(dtype).eval()


def packed():
    model = plain()
    quantize_nf4(model)
    return model


def adapted(build=plain, names="ab", **settings):
    model = build()
    for i, name in enumerate(names):
        inject(model, LoraConfig(**{**HEAD, **settings}), name)
        tiny.randomize(model, name, seed=i)
    return model


def merged(**settings):
    model = adapted(**settings)
    merge_adapter(model)
    return model


def tied():
    model = tiny.build("gpt2")
    inject(model, LoraConfig(r=2, target_modules=["c_attn", "lm_head"], modules_to_save=["wte"]), "a")
    return tiny.randomize(model, "a")


def tied_merged():
    model = tied()
    merge_adapter(model)
    return model


def with_tokens():
    model = tiny.build("gpt2")
    inject(model, LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[3, 7]), "a")
    return tiny.randomize(model, "a")


def activated():
    model = tiny.build("gpt2")
    inject(model, ACTIVATED, "a")
    return tiny.randomize(model, "a")


def replicated():
    model = tiny.build("bert")
    inject(model, REPLICATED, "a")
    return tiny.randomize(model, "a")


def disabled(model):
    with disable_adapters(model):
        model(X)


def mixed(model):
    with torch.no_grad(), mixed_batch(model, ["a", "b", None, "a", "b"]):
        model(X)


def fine_tuned():
    model = plain()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.01)
    return model


def bf16():
    return plain(torch.bfloat16)


def sharing():
    model = adapted()
    share_dropout_masks(model)
    return model


def just_a():
    return adapted(names="a")


#: {case: (the model before, the verb)}
CASES = {
    "inject": (plain, lambda m: inject(m, LoraConfig(**HEAD))),
    "inject dora": (plain, lambda m: inject(m, LoraConfig(use_dora=True, **HEAD))),
    "inject pissa": (plain, lambda m: inject(m, LoraConfig(init_lora_weights="pissa", **HEAD))),
    "inject biases": (plain, lambda m: inject(m, LoraConfig(r=2, target_modules=["q"], bias="all"))),
    "inject a second": (just_a, lambda m: inject(m, LoraConfig(**HEAD), "b")),
    "inject in 4 bits": (packed, lambda m: inject(m, LoraConfig(**HEAD))),
    "inject in 16 bits": (bf16, lambda m: inject(m, LoraConfig(**HEAD))),
    "quantize_nf4": (plain, quantize_nf4),
    "set_adapter": (adapted, lambda m: set_adapter(m, "b")),
    "set_adapter, none": (adapted, lambda m: set_adapter(m, [])),
    "set_adapter in 16 bits": (lambda: adapted(bf16), lambda m: set_adapter(m, "b")),
    "disable_adapters": (adapted, disabled),
    "inject with tokens": (lambda: tiny.build("gpt2"), lambda m: inject(m, TOKENS)),
    "inject activated": (lambda: tiny.build("gpt2"), lambda m: inject(m, ACTIVATED)),
    "unload activated": (activated, unload),
    "inject replicated": (lambda: tiny.build("bert"), lambda m: inject(m, REPLICATED)),
    "unload replicated": (replicated, unload),
    "merge_and_unload replicated": (replicated, merge_and_unload),
    "merge_adapter with tokens": (with_tokens, merge_adapter),
    "merge_and_unload with tokens": (with_tokens, merge_and_unload),
    "unload with tokens": (with_tokens, unload),
    "scale_adapter": (adapted, lambda m: scale_adapter(m, "b", 0.5) and None),
    "rename_adapter": (adapted, lambda m: rename_adapter(m, "a", "c")),
    "delete_adapter, active": (adapted, lambda m: delete_adapter(m, "a")),
    "delete_adapter, the last": (just_a, lambda m: delete_adapter(m, "a")),
    "merge_adapter": (adapted, merge_adapter),
    "merge_adapter in 4 bits": (lambda: adapted(packed), merge_adapter),
    "merge_adapter tied": (tied, merge_adapter),
    "unmerge_adapter": (merged, unmerge_adapter),
    "unmerge_adapter tied": (tied_merged, unmerge_adapter),
    "merge_and_unload": (adapted, merge_and_unload),
    "merge_and_unload dora": (lambda: adapted(use_dora=True), merge_and_unload),
    "merge_and_unload merged": (merged, merge_and_unload),
    "merge_and_unload cast": (adapted, lambda m: merge_and_unload(m, dtype=torch.float16)),
    "merge_and_unload in 4 bits": (lambda: adapted(packed), merge_and_unload),
    "merge_and_unload into 4 bits": (lambda: adapted(packed), lambda m: merge_and_unload(m, requantize=True)),
    "merge_and_unload in 16 bits": (lambda: adapted(bf16), merge_and_unload),
    "merge_and_unload tied": (tied, merge_and_unload),
    "unload": (adapted, unload),
    "unload merged": (merged, unload),
    "unload merged tied": (tied_merged, unload),
    "combine_adapters": (adapted, lambda m: combine_adapters(m, ["a", "b"], [1, 1], "new")),
    "combine_adapters ties": (adapted, lambda m: combine_adapters(m, ["a", "b"], [1, 1], "new", "ties", density=0.5)),
    "extract_adapter": (plain, lambda m: extract_adapter(m, fine_tuned(), LoraConfig(**HEAD))),
    "initialize_eva": (just_a, lambda m: initialize_eva(m, [X], "a")),
    "initialize_corda": (just_a, lambda m: initialize_corda(m, [X], "a")),
    "initialize_lora_ga": (just_a, lambda m: initialize_lora_ga(m, [X], "a", loss=lambda y, _: y.square().mean())),
    "initialize_loftq": (lambda: adapted(packed, names="a"), lambda m: initialize_loftq(m, plain(), "a")),
    "mixed_batch": (adapted, mixed),
    "share_dropout_masks": (adapted, share_dropout_masks),
    "unload with shared masks": (sharing, unload),
}


def check(build, verb, samples=SAMPLES):
    """Interrupts the verb at `samples` of its lines, spread evenly; returns how many."""
    original = build()
    verb(copy.deepcopy(original))  # what is imported, or worked out once for all, has no lines afterwards
    done = copy.deepcopy(original)
    torch.manual_seed(5)
    lines = Lines()
    assert lines.run(lambda: verb(done))
    after, points = state(done), sorted(random.Random(0).sample(range(lines.count), min(samples, lines.count)))
    for i, point in enumerate(points):
        model = copy.deepcopy(original)
        before, interruption = state(model, identity=True), Lines(point, ERRORS[i % len(ERRORS)])
        torch.manual_seed(5)
        finished = interruption.run(lambda model=model: verb(model))
        assert interruption.raised and torch.is_grad_enabled()
        found = state(model)
        if finished or found == after:
            assert found == after, (point, difference(found, after))
        else:
            again = state(model, identity=True)
            assert again == before, (point, difference(again, before))
    return len(points)


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_verb_leaves_the_model_as_it_was_or_is_done(case):
    assert check(*CASES[case]) > 0


def test_an_interrupted_load_with_embeddings(tmp_path):
    base, grown = tiny.build("llama"), tiny.build("llama")
    grown.model.embed_tokens.weight.data[90:] += 1
    inject(grown, LoraConfig(r=2, target_modules=["q_proj"]), "a")
    save_adapter(grown, tmp_path, "a", save_embedding_layers=True)
    assert check(lambda: base, lambda m: load_adapter(m, tmp_path, "a")) == SAMPLES


def test_an_interrupted_replacement(tmp_path):
    save_adapter(adapted(names="a", r=4), tmp_path, "a")
    assert check(adapted, lambda m: load_adapter(m, tmp_path, "a", replace=True)) == SAMPLES


@pytest.mark.parametrize("into", ["a new one", "one that is there"])
def test_an_interrupted_load(into, tmp_path):
    save_adapter(adapted(names="a"), tmp_path, "a")
    build = plain if into == "a new one" else adapted
    assert check(build, lambda m: load_adapter(m, tmp_path, "a")) == SAMPLES


def test_an_interrupted_merge_adds_nothing_twice():
    """What was added in place before the interruption is not added again by the next call."""
    model = adapted(names="a")
    expected, calls, original = model(X), [0], torch.Tensor.addmm_

    def stop(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "addmm_", stop)
        merge_and_unload(model)
    assert type(model.layers[0].q) is nn.Linear  # it was finished: there was no way back
    torch.testing.assert_close(model(X), expected)


def test_the_last_steps_tell_whether_they_are_done():
    from lora_core.model.atomic import LastSteps

    for interrupted_at in range(5):
        tensors, steps = [torch.zeros(2), torch.zeros(2)], LastSteps()
        for tensor in (tensors[0], tensors[0], tensors[1], tensors[0]):
            steps.add(tensor, lambda tensor=tensor: tensor.add_(1))
        assert not steps.begun
        for _, _, step in steps._steps[:interrupted_at]:
            step()
        assert steps.begun == (interrupted_at > 0)
        steps.run()
        steps.run()
        assert [t.tolist() for t in tensors] == [[3, 3], [1, 1]]


def test_an_interruption_while_things_are_put_back_waits():
    from lora_core.model.atomic import insist

    calls = []

    def step():
        calls.append(1)
        if len(calls) < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        insist(step)
    assert len(calls) == 3


class Frozen(dict):
    """As diffusers' configurations are."""

    def _refuse(self, *_args, **_fields):
        raise TypeError("this can't be changed")

    update = clear = __setitem__ = __delitem__ = _refuse


def test_a_configuration_that_can_not_be_changed_hides_no_error():
    model = plain()
    model._internal_dict = Frozen(width=WIDTH)
    before = state(model)
    with pytest.raises(TargetError, match="matched no module"):
        inject(model, LoraConfig(r=2, target_modules=["nothing"]))
    assert state(model) == before and model._internal_dict == {"width": WIDTH}
