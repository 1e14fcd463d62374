"""In a compiled graph one operator makes each dropout mask, and an exported program does without it."""

import math
import shutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core import LoraConfig, inject, use_fast_dropout
from lora_core.cpu import dropout as dropouts
from tests.support import tiny

needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_a_compiler)]
P = 0.25


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch):
    """The shapes of the masks that are made."""
    shapes, make = [], dropouts.same_keep_mask
    monkeypatch.setattr(
        dropouts, "same_keep_mask", lambda source, shape, *more: shapes.append(shape) or make(source, shape, *more)
    )
    return shapes


def once(x):
    return dropouts.dropout(x.sin(), P)


def again(x):
    return checkpoint(once, x, use_reentrant=False)


@pytest.mark.parametrize(("function", "times"), [(once, 1), (again, 2)], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_mask_is_the_forward_s_and_the_backward_s(backend, dtype, function, times, made):
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    x = torch.linspace(0.5, 1.5, 100 * 51).reshape(100, 51).to(dtype).requires_grad_()  # no sine or cosine is 0
    dy = torch.ones_like(x)
    torch.manual_seed(1)
    y = compiled(x)
    y.backward(dy)
    assert y.dtype == dtype
    assert list(map(tuple, made)) == [(100, 51)] * times
    kept = (y != 0).double()
    assert abs(kept.mean().item() - (1 - P)) < 5 * math.sqrt(P * (1 - P) / kept.numel())
    tolerance = 4 * torch.finfo(dtype).eps  # of a sine, a product, and two more for the gradient
    torch.testing.assert_close(y.double(), x.double().sin() * kept / (1 - P), rtol=tolerance, atol=0)
    torch.testing.assert_close(x.grad.double(), x.double().cos() * kept / (1 - P), rtol=tolerance, atol=0)
    assert not torch.equal(compiled(x), y)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), y)


def test_any_shape_and_any_probability_in_one_graph():
    compiled = torch.compile(dropouts.dropout, backend="aot_eager", fullgraph=True)
    for shape in [(), (2, 0, 5), (20, 30), (25, 30), (30, 30)]:
        for p in (0.5, 0.01):
            x = torch.ones(shape)
            y = compiled(x, p)
            bits, threshold = dropouts.rounded(p)
            torch.testing.assert_close(y, x * (y != 0) / (1 - threshold / 2**bits))


def test_under_a_transform_of_torch_func_torch_draws(made):
    def masks(x):
        return torch.func.vmap(lambda x: dropouts.dropout(x, 0.5), randomness="different")(x)

    found = torch.compile(masks, backend="aot_eager", fullgraph=True)(torch.ones(8, 64))
    assert len(found.unique(dim=0)) == 8
    assert not made  # one call for each sample


def dropping():
    model = nn.Sequential(nn.Dropout(P), nn.Linear(16, 16))
    use_fast_dropout(model)
    inject(model, LoraConfig(r=2, target_modules=["1"], lora_dropout=P))
    return tiny.randomize(model).train()


def test_adapters_and_the_base_s_own_dropout_call_it(made):
    compiled = torch.compile(dropping(), backend="aot_eager", fullgraph=True)
    compiled(torch.ones(4, 16)).sum().backward()
    assert list(map(tuple, made)) == [(4, 16), (4, 16)]


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_runs_without_it(strict, made):
    program = torch.export.export(dropping(), (torch.ones(4, 16),), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.dropout.default" in called
    assert not any("lora_core" in name for name in called)
    program.module()(torch.ones(4, 16))
    assert not made
