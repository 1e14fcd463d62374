"""torch.compile sees one graph whatever adapters are on, computes the same, and traces again only when something changed."""

import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lora_core import (
    LoraConfig,
    inject,
    quantize_int8,
    quantize_nf4,
    scale_adapter,
    set_adapter,
    share_dropout_masks,
    use_fast_linear,
)
from lora_core.cpu import dropout as dropouts
from lora_core.maths import lora
from tests.support import tiny

WIDTH = 64  # a block of 4-bit values
BASES = {"dense": use_fast_linear, "nf4": quantize_nf4, "int8": quantize_int8}
ADAPTERS = {"lora": [{}], "dora": [{"use_dora": True}], "several": [{}, {"r": 3, "lora_alpha": 5}, {"use_dora": True}]}


class Block(nn.Module):
    """Three layers that read one tensor, and one that reads what they make of it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):  # ... WIDTH -> ... WIDTH
        return self.o(self.q(x).tanh() * self.k(x) + self.v(x))


def build(base="dense", adapters="lora", dropout=0.0):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Block()
    BASES[base](model)
    names = [f"a{i}" for i in range(len(ADAPTERS[adapters]))]
    for name, settings in zip(names, ADAPTERS[adapters], strict=True):
        config = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": ["q", "k", "v", "o"], **settings}
        inject(model, LoraConfig(**config), name)
    set_adapter(model, names)
    if dropout:
        share_dropout_masks(model)
    for name in names:
        tiny.randomize(model, name)
    return model.train()


def results(forward, model, x, autocast):
    """y and every gradient, with the same random numbers each time."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        y = forward(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.3, False), (0.3, True)], ids=["", "dropout", "autocast"])
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_one_graph_that_computes_the_same(base, adapters, dropout, autocast, monkeypatch):
    model, x = build(base, adapters, dropout), torch.randn(2, 5, WIDTH)
    found = results(torch.compile(model, backend="aot_eager", fullgraph=True), model, x, autocast)
    if dropout:
        monkeypatch.setattr(lora, "is_traced", lambda: True)  # the fused form draws its seeds in another way
        monkeypatch.setattr(dropouts, "is_compiled", lambda: True)
    expected = results(model, model, x, autocast)
    assert found.keys() == expected.keys()
    # The same products, summed in another order: float32 sums, or some ten that are rounded to 8 bits each.
    tolerance = 10 * 2**-9 if autocast else 1e-5
    for name, tensor in expected.items():
        assert tensor.any()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance * tensor.abs().max().item())


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "not adapted"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_no_dense_weight_is_kept_for_the_backward(base, adapted):
    model, x, kept = build(base), torch.randn(3, WIDTH), {}
    set_adapter(model, "a0" if adapted else [])
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = compiled(x.requires_grad_())
    assert y.requires_grad
    assert kept
    assert max(size for pointer, size in kept.items() if pointer not in own) < WIDTH * WIDTH * 4


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_it_is_exported_by_the_compiler(base, autocast):
    model, x = build(base).eval(), torch.randn(3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        program = torch.export.export(model, (x,), strict=True)
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0.05 if autocast else 1e-5)


def test_it_traces_again_only_for_what_changed():
    """Once for other active adapters, for the first change of a scaling, and for evaluation; never for a step of training."""
    model, x = build("dense", "several"), torch.randn(2, 5, WIDTH)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def traced(change=None):
        before = counter.frame_count
        if change:
            change()
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-4)
        return counter.frame_count - before

    def step():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)

    assert traced() == 1
    assert traced(step) == 0
    assert traced(lambda: set_adapter(model, "a0")) == 1
    assert traced(lambda: set_adapter(model, ["a0", "a1", "a2"])) == 0  # it was there before
    scaled = [traced(lambda factor=factor: scale_adapter(model, "a0", factor)) for factor in (0.5, 0.7, 0.9, 1.1)]
    assert scaled == [1, 0, 0, 0]  # then it is a number that may be any
    assert traced(model.eval) == 1
    assert traced(model.train) == 0
