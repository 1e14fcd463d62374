"""A base in 16 bits with A and B in float32, without autocast: the update and its gradients are as exact as float32 is.

The yardstick is the same layer in float64 (held to the equations by maths/test_functional.py and test_kinds.py), fed the same
values.
"""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_core import LoraConfig, inject, mixed_batch, quantize_nf4, set_adapter
from lora_core.model.registry import adapter_parameters
from tests.support import tiny

SIXTEEN = [torch.float16, torch.bfloat16]


def conv1d():
    layer = transformers.pytorch_utils.Conv1D(48, 64)
    nn.init.normal_(layer.bias)
    return layer


#: {kind: (layer, shape of the input without the batch)}
KINDS = {
    "linear": (lambda: nn.Linear(64, 48), (5, 64)),
    "Conv1D": (conv1d, (5, 64)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (8, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3), (3, 6, 6)),
    "embedding": (lambda: nn.Embedding(50, 32), None),
}
METHODS = {
    "plain": [{}],
    "dora": [{"use_dora": True}],
    "bias of B": [{"lora_bias": True}],
    "two": [{}, {"r": 3}],
    "dora and plain": [{"use_dora": True}, {}],
}
CASES = [(kind, method) for kind in KINDS for method in METHODS if not (kind == "embedding" and "bias" in method)]


def adapted(kind, method, dtype):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": KINDS[kind][0]()}).to(dtype)
    for i, settings in enumerate(METHODS[method]):
        inject(model, LoraConfig(**{"r": 4, "target_modules": ["layer"], **settings}), f"a{i}")
        tiny.randomize(model, f"a{i}", seed=i)
    set_adapter(model, [f"a{i}" for i in range(len(METHODS[method]))])
    return model


def data(kind, dtype, scale):
    shape = KINDS[kind][1]
    generator = torch.Generator().manual_seed(3)
    if shape is None:
        x = torch.randint(50, (4, 7), generator=generator)
    else:
        x = torch.randn(4, *shape, generator=generator).to(dtype).requires_grad_()
    model = KINDS[kind][0]()
    dy = torch.randn(model(x.detach().float() if shape else x).shape, generator=generator).to(dtype) * scale
    return x, dy.to(dtype)


def run(model, x, dy):
    y = model["layer"](x)
    y.backward(dy)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert names
    return y.detach(), gradients, x.grad


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual gradients", "tiny gradients"])
def test_gradients_are_those_of_float32_and_outputs_are_rounded_once(kind, method, dtype, scale):
    model, exact = adapted(kind, method, dtype), adapted(kind, method, dtype)
    exact = exact.double()
    x, dy = data(kind, dtype, scale)
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y, gradients, dx = run(model, x, dy)
    y64, gradients64, dx64 = run(exact, x64, dy.double())
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    # The base's product is rounded to 16 bits, and the sum again.
    assert (y.double() - y64).abs().max() <= 2 * eps * y64.abs().max()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        error = (gradient.double() - gradients64[name]).norm() / gradients64[name].norm()
        # DoRA's magnitude multiplies the base's rounded product; all else is a few float32 sums.
        assert error < (eps if "magnitude" in name else 3e-6), (name, error)
    if dx is not None:
        assert dx.dtype == dtype and (dx.double() - dx64).abs().max() <= 2 * eps * dx64.abs().max() + torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["as loaded", "in bfloat16"])
def test_4_bit_layers(dtype, use_dora, compute):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(64, 64)}).to(dtype)
    quantize_nf4(model, compute_dtype=compute)
    exact = nn.ModuleDict({"layer": nn.Linear(64, 64)}).double()
    from lora_core.bases import dense_weight

    with torch.no_grad():
        exact["layer"].weight.copy_(dense_weight(model["layer"], dtype).double())
        exact["layer"].bias.copy_(model["layer"].bias.double())
    for m in (model, exact):
        inject(m, LoraConfig(r=4, target_modules=["layer"], use_dora=use_dora))
        tiny.randomize(m)
    x = torch.randn(6, 64).to(dtype)
    dy = (torch.randn(6, 64) * 1e-4).to(dtype)
    _, gradients, _ = run(model, x, dy)
    _, expected, _ = run(exact, x.double(), dy.double())
    for name in gradients:
        error = (gradients[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < (3 * torch.finfo(compute or dtype).eps if "magnitude" in name else 3e-6), (name, error)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_it_is_what_peft_computes(dtype, settings):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["0"], **settings}
    ours, theirs = copy.deepcopy(base), peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    inject(ours, LoraConfig(**config))
    tiny.randomize(ours)
    layer, other = ours[0], theirs.base_model.model[0]
    with torch.no_grad():
        other.lora_A["default"].weight.copy_(layer.lora_A["default"])
        other.lora_B["default"].weight.copy_(layer.lora_B["default"])
        if settings.get("use_dora"):
            other.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude["default"])
    x, dy = torch.randn(32, 64).to(dtype), torch.randn(32, 64).to(dtype)
    y, z = ours(x), theirs(x)
    y.backward(dy)
    z.backward(dy)
    eps = torch.finfo(dtype).eps
    assert (y - z).abs().max() <= 2 * eps * z.abs().max()
    for mine, his in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
        mine, his = mine["default"].grad, his["default"].weight.grad
        # peft takes the norms of DoRA from a weight in 16 bits.
        assert (mine - his).norm() / his.norm() < (eps if settings.get("use_dora") else 1e-6)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_mixed_batches_and_compiled_layers(dtype):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(64, 64)}).to(dtype).eval()
    for i, name in enumerate("ab"):
        inject(model, LoraConfig(r=2 + i, target_modules=["layer"]), name)
        tiny.randomize(model, name, seed=i)
    x = torch.randn(3, 5, 64).to(dtype)
    alone = {name: (set_adapter(model, name), model["layer"](x).detach())[1] for name in "ab"}
    with torch.no_grad(), mixed_batch(model, ["a", "b", None]):
        y = model["layer"](x)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    for i, name in enumerate("ab"):
        assert (y[i] - alone[name][i]).abs().max() <= eps * alone[name].abs().max()
    set_adapter(model, "a")
    torch._dynamo.reset()
    compiled = torch.compile(model["layer"], backend="eager")(x)
    assert compiled.dtype == dtype and (compiled - alone["a"]).abs().max() <= eps * alone["a"].abs().max()


def test_a_float16_update_that_would_overflow_on_the_way_does_not():
    model = nn.Sequential(nn.Linear(64, 64)).half()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    inject(model, LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    for p, value in zip(adapter_parameters(model, "default"), (30.0, 1e-4), strict=True):
        nn.init.constant_(p, value)
    y = model(torch.full((1, 64), 200.0, dtype=torch.float16))  # h = 384,000 is more than float16 has
    assert y[0, 0].item() == pytest.approx(307.2, rel=1e-3)
