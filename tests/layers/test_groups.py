"""Convolutions in groups: their outputs are the float64 equation's and peft's, and what can't be done there is refused.

The equation: y = conv(x, W, groups) + s conv(conv(x, A), B, groups), where A reads every channel and B has the groups.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core import (
    LoraConfig,
    combine_adapters,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    save_adapter,
    unload,
)
from lora_core.errors import ConfigError, StateError, TargetError
from tests.support import tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 0), groups=4), (2, 4, 5, 4)),
    "3d": (lambda: nn.Conv3d(2, 4, 2, groups=2, bias=False), (2, 2, 3, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (3, 4, 5, 5)),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["0"]}


def build(name):
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[name][0]())


def read(name):
    torch.manual_seed(1)
    return torch.randn(LAYERS[name][1])


def adapted(name, **settings):
    model = build(name)
    inject(model, LoraConfig(**CONFIG, **settings))
    return tiny.randomize(model)


def equation(layer, x, s, adapter="default"):
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    x, W, A, B = (t.detach().double() for t in (x, layer.weight, layer.lora_A[adapter], layer.lora_B[adapter]))
    b = None if layer.bias is None else layer.bias.detach().double()
    ones = (1,) * len(layer.kernel_size)
    h = convolve(x, A.view(len(A), layer.in_channels, *layer.kernel_size), stride=layer.stride, padding=layer.padding)
    y = convolve(x, W, b, layer.stride, layer.padding, groups=layer.groups)
    return y + s * convolve(h, B.view(*B.shape, *ones), groups=layer.groups)


@EVERY_LAYER
def test_the_forward_is_the_equation(name):
    model = adapted(name)
    expected = equation(model[0], read(name), 1.5)
    torch.testing.assert_close(model(read(name)).double(), expected, rtol=0, atol=1e-5)
    wide = model.double()
    torch.testing.assert_close(wide(read(name).double()), expected, rtol=0, atol=1e-12)


@EVERY_LAYER
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_files_go_both_ways_with_peft(name, settings, tmp_path):
    ours, x = adapted(name, **settings), read(name)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    other = build(name)
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(other(x), ours(x))


@EVERY_LAYER
def test_it_is_trained_switched_off_and_unloaded(name):
    model, x, before = build(name), read(name), tiny.snapshot(build(name))["state"]
    expected = model(x)
    inject(model, LoraConfig(**CONFIG, lora_dropout=0.1))
    assert torch.equal(model(x), expected)
    tiny.randomize(model)
    model(x).square().sum().backward()
    assert all(p.grad.any() for p in model[0].trained("default"))
    with disable_adapters(model):
        assert torch.equal(model(x), expected)
    assert tiny.snapshot(unload(model))["state"] == before


def test_several_adapters_and_mixed_rows():
    model, x = adapted("1d").eval(), read("1d")
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]), "other")
    tiny.randomize(model, "other", seed=5)
    with mixed_batch(model, ["default", "other"]):
        y = model(x)
    torch.testing.assert_close(y[:1].double(), equation(model[0], x[:1], 1.5), rtol=0, atol=1e-5)
    torch.testing.assert_close(y[1:].double(), equation(model[0], x[1:], 1.0, "other"), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="'default' is on 0, a Conv1d whose A and B"):
        combine_adapters(model, ["default", "other"], [1.0, 1.0], "sum")


@pytest.mark.parametrize("verb", [merge_adapter, merge_and_unload])
def test_merging_is_refused_and_changes_nothing(verb):
    model, x = adapted("2d"), read("2d")
    expected = model(x)
    with pytest.raises(StateError, match="^0: the update of a convolution of 4 groups reaches across them"):
        verb(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 6}, "of 4 groups, and the rank 6 is no multiple"),
        ({"init_lora_weights": "pissa"}, "'pissa' can't start"),
        ({"init_lora_weights": "orthogonal"}, "'orthogonal' can't start"),
    ],
)
def test_what_has_no_meaning_there_is_refused(settings, message):
    with pytest.raises(TargetError, match=message):
        inject(build("2d"), LoraConfig(**CONFIG | settings))
