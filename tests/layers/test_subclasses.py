"""Layers of other classes than torch's own: subclasses that keep its forward, and those of transformers that do not.

Outputs may differ by 1e-5 of the largest from peft's: both sum at most 64 float32 terms, in different orders (64 * 6e-8).
"""

import io

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_core import LoraConfig, inject, load_adapter, merge_and_unload, quantize_nf4, save_adapter, unload
from lora_core.errors import TargetError
from lora_core.layers import LoraLinear, lora_class
from tests.support import tiny

peft = pytest.importorskip("peft")


class Named(nn.Linear):
    """A linear layer with a start of its own, as transformers has dozens."""

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


class Widened(nn.Embedding):
    pass


class Counting(nn.Linear):
    """It computes what `nn.Linear` does, and has state besides that a 4-bit layer would not have."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))


IDS = torch.tensor([[0, 3, 3, 8], [2, 1, 0, 5]])
LAYERS = {
    "linear": (lambda: Named(64, 8), torch.randn(5, 64)),
    "embedding": (lambda: Widened(9, 6, padding_idx=0), IDS),
    "falcon": (lambda: FalconLinear(64, 8), torch.randn(5, 64)),
    "falcon without bias": (lambda: FalconLinear(64, 8, bias=False), torch.randn(5, 64)),
    "bart": (lambda: BartScaledWordEmbedding(9, 6, 1, embed_scale=2.5), IDS),
    "gemma3": (lambda: Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=2.5), IDS),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["layer"]}


def build(name):
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": LAYERS[name][0]()})


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))


@EVERY_LAYER
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_go_both_ways_with_peft(name, use_dora, tmp_path):
    ours, x = build(name), LAYERS[name][1]
    inject(ours, LoraConfig(use_dora=use_dora, **CONFIG))
    tiny.randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
    expected = theirs.base_model.model["layer"](x)
    same(ours["layer"](x), expected)
    assert not torch.equal(build(name)["layer"](x), expected)

    theirs.save_pretrained(tmp_path / "theirs")
    other = build(name)
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(other["layer"](x), ours["layer"](x))
    merge_and_unload(other)
    same(other["layer"](x), expected)


@EVERY_LAYER
def test_a_fresh_adapter_changes_no_bit_and_unloading_gives_every_byte_back(name):
    model, x = build(name), LAYERS[name][1]
    expected, before = model["layer"](x), tiny.snapshot(model)
    inject(model, LoraConfig(**CONFIG))
    assert isinstance(model["layer"], type(build(name)["layer"])) and torch.equal(model["layer"](x), expected)
    tiny.randomize(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)["layer"](x), model["layer"](x))
    unload(model)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("name", ["linear", "falcon", "falcon without bias"])
def test_linear_layers_are_packed(name):
    model, plain, x = build(name), nn.Sequential(nn.Linear(64, 8, bias="without" not in name)), LAYERS[name][1]
    plain[0].load_state_dict(model["layer"].state_dict())
    assert quantize_nf4(model).layers == ("layer",)
    quantize_nf4(plain)
    assert torch.equal(model["layer"](x), plain[0](x))
    inject(model, LoraConfig(**CONFIG))
    tiny.randomize(model)
    merge_and_unload(model)
    assert type(model["layer"]) is nn.Linear


def test_a_layer_with_state_of_its_own_is_adapted_and_not_packed():
    model = nn.ModuleDict({"a": Counting(64, 8), "b": nn.Linear(64, 8)})
    assert quantize_nf4(model).skipped == ("a",)
    assert inject(model, LoraConfig(r=2, target_modules="all-linear")).targets == ("a", "b")


def test_falcon_adds_its_bias_in_a_step_of_its_own_in_16_bits():
    model, x = build("falcon").bfloat16(), LAYERS["falcon"][1].bfloat16()
    expected = model["layer"](x)
    inject(model, LoraConfig(**CONFIG))
    assert torch.equal(model["layer"](x), expected)


@pytest.mark.parametrize(
    ("base", "sizes"), [("FalconLinear", (nn.Linear, 4, 4)), ("MyScaledWordEmbedding", (nn.Embedding, 4, 4))]
)
def test_another_class_of_such_a_name_is_not_taken_for_it(base, sizes):
    parent, *sizes = sizes
    module = type(base, (parent,), {"forward": lambda self, x: x, "embed_scale": 1.0})(*sizes)
    assert lora_class(module) is None
    with pytest.raises(TargetError, match=rf"'layer' is a {base}, which can't carry an adapter: its forward may compute"):
        inject(nn.ModuleDict({"layer": module}), LoraConfig(**CONFIG))


def test_plain_layers_keep_their_class():
    assert lora_class(nn.Linear(2, 2)) is LoraLinear
