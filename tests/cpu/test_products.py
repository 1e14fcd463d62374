"""`product` and what is made of it, with each of the two libraries, against float64 and against `F.linear`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_core import LoraConfig, inject, merge_and_unload, quantize_nf4, unload, use_fast_linear
from lora_core.cpu import products
from lora_core.cpu.products import FastLinear, faster_by_onednn, frozen_linear, product, tall_product
from lora_core.errors import StateError
from lora_core.layers.linear import LoraFastLinear
from tests.support import oracle


@pytest.fixture(params=["torch", "onednn"])
def library(request, monkeypatch):
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_suits_cpu", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "WORTH", 1)
    return request.param


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (0, 5), (2, 0, 5), (40, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_product_is_that_of_float64_rounded(library, shape, dtype, biased):
    torch.manual_seed(0)
    x, W, b = values(*shape, dtype=dtype), values(3, 5, dtype=dtype), values(3, dtype=dtype) if biased else None
    y = product(x, W, b)
    assert y.dtype == dtype and y.is_contiguous() and y.shape == (*shape[:-1], 3)
    exact = [None if t is None else t.double() for t in (x, W, b)]
    bound = F.linear(*(None if t is None else t.abs() for t in exact))
    oracle.assert_within_rounding(y, F.linear(*exact), bound, 6)  # five products and a bias


@pytest.mark.parametrize("strided", ["x", "W", "both"])
def test_product_takes_strided_matrices(library, strided):
    x, W = values(6, 4).t() if strided != "W" else values(4, 6), values(6, 3).t() if strided != "x" else values(3, 6)
    torch.testing.assert_close(product(x, W), F.linear(x.contiguous(), W.contiguous()), rtol=1e-5, atol=1e-6)  # 6 terms


def forget_cpu():
    products.on_amd_cpu.cache_clear()
    products.onednn_suits_cpu.cache_clear()


def test_only_large_float32_matrices_on_an_amd_cpu_go_to_onednn(monkeypatch):
    monkeypatch.setattr(products, "WORTH", 4 * 5 * 3)
    x, W = values(4, 5), values(3, 5)
    for vendor, expected in [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), ("", False)]:
        monkeypatch.setattr(products, "_cpu_vendor", lambda vendor=vendor: vendor)
        forget_cpu()
        assert faster_by_onednn(x, W) == (expected and torch.backends.mkl.is_available())
    forget_cpu()
    monkeypatch.setattr(products, "onednn_suits_cpu", lambda: True)
    assert faster_by_onednn(x, W)
    others = [(x.double(), W.double()), (x.bfloat16(), W.bfloat16()), (x.to("meta"), W.to("meta"))]
    others += [(x[0], W), (x[:3], W), (x[:0], W)]
    assert not any(faster_by_onednn(*other) for other in others)
    try:
        torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags does, without its warning about TF32
        assert not faster_by_onednn(x, W)
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("shape", [(40, 5), (1, 5), (0, 5), (5, 40)], ids=str)
def test_a_tall_product_is_that_of_float64_rounded_either_way_round(monkeypatch, amd, shape):
    monkeypatch.setattr(products, "on_amd_cpu", lambda: amd)
    x, y = values(*shape), values(shape[0], 3)
    found, bound = tall_product(x, y), x.double().abs().t() @ y.double().abs()
    assert found.shape == (shape[1], 3) and found.is_contiguous() == (amd or not found.numel())
    oracle.assert_within_rounding(found, x.double().t() @ y.double(), bound, max(1, shape[0]))


@pytest.mark.parametrize("dense", [None, torch.clone], ids=["dense", "packed"])
def test_frozen_linear_has_the_gradients_of_linear(library, dense):
    torch.manual_seed(0)
    W = values(3, 5)
    start, outcomes = (values(2, 4, 5), values(3)), []
    for linear in (F.linear, lambda x, W, b: frozen_linear(x, W, b, dense)):
        x, b = (t.clone().requires_grad_() for t in start)
        y = linear(x, W, b)
        y.square().sum().backward()
        outcomes.append((y.detach(), x.grad, b.grad))
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums of at most 8 terms


def test_use_fast_linear_replaces_what_it_says():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False)), Own(2, 2), nn.LayerNorm(2))
    keys = list(model.state_dict())
    assert use_fast_linear(model) == 2 and use_fast_linear(model) == 0
    assert [type(m) for m in (model[0], model[1][0], model[2])] == [FastLinear, FastLinear, Own]
    assert list(model.state_dict()) == keys


def test_a_weight_that_is_trained_gets_its_gradient(library):
    layer = nn.Linear(5, 3)
    use_fast_linear(nn.Sequential(layer))
    x, dy = values(4, 5), values(4, 3)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ x)


def test_a_frozen_layer_under_autocast_returns_what_linear_does(library):
    plain = nn.Linear(5, 3).requires_grad_(False)
    fast = nn.Linear(5, 3).requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    use_fast_linear(nn.Sequential(fast))
    x = values(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x)) and fast(x).dtype == torch.bfloat16


def test_a_second_derivative_is_refused(monkeypatch):
    monkeypatch.setattr(products, "onednn_suits_cpu", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(products, "WORTH", 1)
    layer = nn.Linear(5, 3).requires_grad_(False)
    use_fast_linear(nn.Sequential(layer))
    if not faster_by_onednn(values(4, 5), layer.weight):
        pytest.skip("this torch has no oneDNN")
    with pytest.raises(StateError):
        x = values(4, 5).requires_grad_()
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fresh_adapter_on_a_fast_layer_changes_no_bit(library, quantize, dropout):
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).requires_grad_(False)
    use_fast_linear(model)
    if quantize:
        quantize_nf4(model)
    x = values(100, 64)
    before = model(x)
    inject(model, LoraConfig(r=2, lora_dropout=dropout, target_modules=["0"]))
    assert quantize or type(model[0]) is LoraFastLinear
    assert torch.equal(model.train()(x), before)


def test_a_fast_layer_carries_adapters_like_a_plain_one(library):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4))
    fast = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4))
    fast.load_state_dict(plain.state_dict())
    use_fast_linear(fast)
    outcomes = []
    for model in (plain, fast):
        torch.manual_seed(1)
        inject(model, LoraConfig(r=3, lora_dropout=0.25, target_modules=["0", "2"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        x = values(30, 20).requires_grad_()
        y = model.train()(x)
        y.square().mean().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        merge_and_unload(model)
        outcomes.append([y.detach(), x.grad, *trained, *model.state_dict().values()])
    for expected, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums of at most 30 terms, twice
    assert type(fast[0]) is FastLinear


def test_unloading_gives_the_fast_layer_back():
    model = nn.Sequential(nn.Linear(4, 4))
    use_fast_linear(model)
    inject(model, LoraConfig(r=1, target_modules=["0"]))
    unload(model)
    assert type(model[0]) is FastLinear
