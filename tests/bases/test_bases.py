"""Each way to hold a frozen weight, by one table: packing, multiplying, training, files, merging, pickling, loading."""

import copy
import io
import json
import re
import sys
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lora_core import (
    LoraConfig,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    packed_parameters,
    quantize,
    quantize_int8,
    quantize_nf4,
    register_base,
    save_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.bases import PACKED, base_for, base_of, dense_weight, is_packed, parse_format
from lora_core.bases.dense import Dense, DenseFormat
from lora_core.bases.nf4 import NF4
from lora_core.deploy.recipe import Recipe
from lora_core.deploy.stream import merge_checkpoint
from lora_core.errors import ConfigError, StateError, WrongBaseError
from tests.support import ROOT, tiny

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
EXTENSION = types.ModuleType("a_base")  # the base that the page shows, outside of the package
sys.modules["a_base"] = EXTENSION  # pickle looks there
exec(compile(re.search(r"## Add a base.*?```python\n(.*?)```", PAGE, re.DOTALL)[1], "extend.md", "exec"), vars(EXTENSION))


def quantize_halved(model):
    return EXTENSION.quantize(model, EXTENSION.HalvedFormat())


#: {name: (how a model is quantised, the largest error of a value, as a share of the largest of its row, bits a value)}
BASES = {
    "nf4": (quantize_nf4, 0.16, 4.6),
    "int8": (quantize_int8, 0.5 / 127 + 1e-3, 8.6),
    "halved": (quantize_halved, 2**-8, 16),
}
X = tiny.batch()
EVERY = pytest.mark.parametrize("name", BASES)
KNOWN_TO_TRANSFORMERS = pytest.mark.parametrize("name", ["nf4", "int8"])


def packed(name):
    model = tiny.classifier().eval()
    report = BASES[name][0](model)
    assert report.layers and len(report.layers) == sum(map(is_packed, model.modules()))
    return model


def adapted(name):
    model = packed(name)
    inject(model, LoraConfig(r=4, target_modules=["q", "v"]))
    return tiny.randomize(model)


def test_the_table_has_every_base():
    assert BASES.keys() == PACKED.keys()


@EVERY
def test_a_weight_is_near_the_one_it_was_packed_from(name):
    dense, model = tiny.classifier(), packed(name)
    base = PACKED[name]
    for path, layer in model.named_modules():
        if is_packed(layer):
            W, held = dense.get_submodule(path).weight.detach(), dense_weight(layer)
            assert base_of(layer) is base and held.shape == W.shape and held.dtype == torch.float32
            assert ((held - W).abs() <= BASES[name][1] * W.abs().amax(1, keepdim=True)).all()
            assert 8 * base.nbytes(layer.weight) <= BASES[name][2] * W.numel()


@EVERY
def test_a_format_reads_what_it_prints(name):
    form = PACKED[name].Format()
    assert parse_format(str(form)) == form and base_for(form) is PACKED[name]
    assert parse_format("float32").dtype == torch.float32 and parse_format("nf4/65") is None and parse_format("x") is None


@EVERY
def test_it_multiplies_by_exactly_that_weight_and_passes_gradients_on(name):
    layer = packed(name).layers[0].q
    x, dy = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    y = layer(x)
    y.backward(dy)
    W = dense_weight(layer).double()
    expected = x.detach().double() @ W.t() + layer.bias.detach().double()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)  # sums of 64 terms of size 1
    torch.testing.assert_close(x.grad.double(), dy.double() @ W, rtol=0, atol=1e-5)


@EVERY
def test_adapters_train_and_the_base_stays(name):
    model = adapted(name)
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    optimizer = torch.optim.SGD(trainable_parameters(model), 0.1)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable_parameters(model))
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert packed_parameters(model) == {m.weight for m in model.modules() if is_packed(m)}


@EVERY
def test_merging_in_place_and_back_and_unloading(name):
    model, base = adapted(name), packed(name)
    before, output = copy.deepcopy(model.state_dict()), model(X)
    merge_adapter(model)
    assert (model(X) - output).abs().max() <= 1e-5 * output.abs().max()
    unmerge_adapter(model)
    after = model.state_dict()
    assert torch.equal(model(X), output) and all(torch.equal(t, after[n]) for n, t in before.items())
    unload(model)
    assert torch.equal(model(X), base(X)) and type(model.layers[0].q) is type(base.layers[0].q)


@EVERY
def test_merging_for_good_makes_dense_layers_or_packs_again(name):
    model = adapted(name)
    output = model(X)
    report = merge_and_unload(model)
    assert len(report.dequantized) == 8 and not any(map(is_packed, model.modules()))
    assert (model(X) - output).abs().max() <= 1e-5 * output.abs().max()
    model = adapted(name)
    layer = model.layers[0].q
    W, D = dense_weight(layer), layer.folded_weight(["default"]) - dense_weight(layer)
    report = merge_and_unload(model, requantize=True)
    assert is_packed(model.layers[0].q) and len(report.requantized) == 8
    M = dense_weight(model.layers[0].q)
    assert report.kept["layers.0.q"] == pytest.approx((((M - W) * D).sum() / D.square().sum()).item(), rel=1e-3)


@EVERY
def test_files_know_the_base(name, tmp_path):
    model = adapted(name)
    save_adapter(model, tmp_path)
    again = packed(name)
    load_adapter(again, tmp_path)
    assert torch.equal(again(X), model(X))
    others = [tiny.classifier(), *(packed(other) for other in BASES if other != name)]
    for other in others:
        with pytest.raises(WrongBaseError, match="another base"):
            load_adapter(other, tmp_path)


@EVERY
def test_copies_and_pickles(name):
    model = adapted(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    unpickled = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), unpickled, copy.deepcopy(unpickled)):
        assert torch.equal(other(X), model(X)) and is_packed(other.layers[0].q)
        merge_and_unload(other)
        assert not is_packed(other.layers[0].q)


def test_state_dicts_of_8_bits_load():
    """Those of 4 bits do not: bitsandbytes writes keys there that its layers do not read."""
    model, fresh = adapted("int8"), tiny.randomize(adapted("int8"), seed=7)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_is_that_of_the_dense_weight(name, dtype):
    model = adapted(name).to(dtype)
    held, was = dense_weight(model.layers[0].q), dense_weight(adapted(name).layers[0].q)
    assert torch.equal(held.to(dtype), was.to(dtype))
    merge_and_unload(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


@EVERY
def test_weights_with_nan_are_refused(name):
    model = tiny.classifier()
    model.layers[1].v.weight.data[0, 0] = torch.nan
    with pytest.raises(StateError, match=r"layers\.1\.v has NaN"):
        BASES[name][0](model)
    assert not any(map(is_packed, model.modules()))


@pytest.mark.parametrize("form", ["int8", None, DenseFormat()], ids=str)
def test_what_is_no_packed_format_is_refused(form):
    model = tiny.classifier()
    with pytest.raises(StateError, match="form must be the format of a base that packs weights"):
        quantize(model, form)
    assert not any(map(is_packed, model.modules()))


def test_a_base_that_is_none_or_has_another_s_name_is_refused():
    impostor = type("Impostor", (EXTENSION.Halved,), {"name": "nf4"})
    for base, says in ((EXTENSION.Halved, "takes a Base"), (Dense(), "takes a Base"), (impostor(), "a base 'nf4' already")):
        with pytest.raises(ConfigError, match=says):
            register_base(base)
    register_base(EXTENSION.Halved())  # again, which says nothing new
    assert type(PACKED["nf4"]) is NF4


def test_8_bits_take_no_values_beyond_float16():
    model = tiny.classifier()
    model.layers[0].q.weight.data[0, 0] = 1e5
    with pytest.raises(StateError, match="beyond 65504"):
        quantize_int8(model)
    assert not any(map(is_packed, model.modules()))


@KNOWN_TO_TRANSFORMERS
@pytest.mark.parametrize("repacked", [False, True], ids=["dequantized", "packed"])
def test_over_files_it_is_the_model_that_was_trained(name, repacked, tmp_path):
    model, original = tiny.build("llama"), tiny.build("llama")
    model.save_pretrained(tmp_path / "base")
    BASES[name][0](model)
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    recipe = Recipe(base_as=name, allow_loss=True) if repacked else Recipe()
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", recipe)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert sum(map(is_packed, again.modules())) == len(report.requantized) == (14 if repacked else 0)
    expected = tiny.logits(model)
    if not repacked:
        assert (tiny.logits(again) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A") and repacked:
            D = layer.folded_weight(["default"]) - dense_weight(layer)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = original.get_submodule(path).weight.data + D
            expected = PACKED[name].pack(linear, PACKED[name].Format())
            torch.testing.assert_close(dense_weight(again.get_submodule(path)), dense_weight(expected), rtol=0, atol=1e-6)
    assert all(t.isfinite().all() for t in load_file(tmp_path / "out" / "model.safetensors").values())


@KNOWN_TO_TRANSFORMERS
def test_layers_of_bitsandbytes_that_transformers_loads(name, tmp_path):
    """Also once they have run, which moves and repacks what they hold."""
    wide = transformers.LlamaConfig(**tiny.SMALL | {"hidden_size": 64, "intermediate_size": 128})

    def build():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(wide)

    build().save_pretrained(tmp_path / "base")
    bits = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}[name]
    config = transformers.BitsAndBytesConfig(**bits)
    for run_first in (False, True):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32
        )
        kinds = {path: type(m) for path, m in theirs.named_modules()}
        if run_first:
            tiny.logits(theirs.eval())
        inject(theirs, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        layers = {path: layer for path, layer in theirs.named_modules() if is_packed(layer)}
        assert len(layers) == 14 and all(base_of(layer) is PACKED[name] for layer in layers.values())
        tiny.randomize(theirs)
        dense = build()
        for path, layer in layers.items():
            dense.get_submodule(path).weight.data = dense_weight(layer)
        inject(dense, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        tiny.randomize(dense)
        expected = tiny.logits(dense.eval())
        assert (tiny.logits(theirs.eval()) - expected).abs().max() <= 1e-5 * expected.abs().max()
        merge_adapter(theirs)
        unmerge_adapter(theirs)
        unload(theirs)
        assert {path: type(m) for path, m in theirs.named_modules()} == kinds


@KNOWN_TO_TRANSFORMERS
def test_the_configuration_that_transformers_reads(name):
    base = PACKED[name]
    found = base.quantization_config(base.Format(), ["lm_head"], "float32")
    read = transformers.BitsAndBytesConfig.from_dict(found)
    assert read.llm_int8_skip_modules == ["lm_head"] and json.dumps(found)
    assert (read.load_in_4bit, read.load_in_8bit) == (name == "nf4", name == "int8")


def test_a_layer_without_its_scales_is_refused():
    for name in ("nf4", "int8"):
        layer = packed(name).layers[0].q
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        with pytest.raises(StateError, match="lost its scales"):
            PACKED[name].dense(layer)
