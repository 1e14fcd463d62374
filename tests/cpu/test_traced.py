"""torch.func's transforms go through what is written for the CPU: frozen products, dropout, packed weights, shared masks."""

import runpy

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    inject,
    quantize_int8,
    quantize_nf4,
    share_dropout_masks,
    use_fast_dropout,
    use_fast_linear,
)
from lora_core.cpu import traced
from tests.support import tiny


def dense(model):
    return model


@pytest.mark.parametrize("prepare", [dense, use_fast_linear, quantize_nf4, quantize_int8])
def test_gradients_of_each_sample(prepare):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    prepare(model)
    inject(model, LoraConfig(r=4, target_modules=["0"]))
    tiny.randomize(model).eval()
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 64)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(model(x[i : i + 1]).sin().sum(), list(trained.values()))
        for path, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(found[path][i], gradient, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_of_torch_func():
    torch.manual_seed(0)
    model = nn.Linear(8, 8).double()
    root = nn.Sequential(model)
    inject(root, LoraConfig(r=2, target_modules=["0"]))
    tiny.randomize(root).eval()
    W = root[0].weight + root[0].lora_scaling["default"] * root[0].lora_B["default"] @ root[0].lora_A["default"]
    x = torch.randn(8, dtype=torch.float64)
    found = torch.func.hessian(lambda x: root(x).square().sum())(x)
    torch.testing.assert_close(found, 2 * W.t() @ W)


def test_each_sample_has_a_mask_of_its_own():
    model = nn.Sequential(nn.Dropout(0.5), nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(64, 64)}))
    use_fast_dropout(model)
    inject(model, LoraConfig(r=4, target_modules=["q", "k"], lora_dropout=0.5))
    tiny.randomize(model).train()
    share_dropout_masks(model)

    def run(x):
        return model[1]["q"](x) + model[1]["k"](x), model[0](x)

    updates, dropped = torch.func.vmap(run, randomness="different")(torch.ones(8, 64))
    assert len(updates.unique(dim=0)) == len(dropped.unique(dim=0)) == 8
    assert 0.3 < (dropped == 0).double().mean() < 0.7


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_program_that_is_traced_with_one_token_takes_more():
    model = nn.Sequential(nn.Linear(8, 6))
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    tiny.randomize(model).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        program = torch.jit.trace(model, x[:1])
        torch.testing.assert_close(program(x), model(x))


def test_an_older_torch_takes_every_compiler_for_an_export(monkeypatch):
    monkeypatch.delattr(torch.compiler, "is_exporting", raising=False)
    assert runpy.run_path(traced.__file__)["_may_export"] is torch.compiler.is_compiling
