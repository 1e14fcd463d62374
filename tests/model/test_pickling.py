"""Models that can be pickled (`torch.save(model)`), before and after they got adapters; casts after packing; NaN."""

import io
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from lora_core import (
    LoraConfig,
    inject,
    merge_adapter,
    merge_and_unload,
    quantize_nf4,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
    use_fast_dropout,
    use_fast_linear,
)
from lora_core.bases import base_of, dense_weight
from lora_core.errors import StateError
from lora_core.model.registry import registry_of
from tests.support import tiny

X = tiny.batch()


def again(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# --- pickling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_a_model_comes_back_and_goes_on(architecture, packed):
    model = tiny.build(architecture)
    if packed and architecture in ("gpt2", "convnet"):
        pytest.skip("has no nn.Linear layer to pack")
    if packed:
        quantize_nf4(model)
        assert torch.equal(tiny.logits(again(model)), tiny.logits(model))
    for i, name in enumerate("ab"):
        inject(model, LoraConfig(r=2 + i, target_modules=tiny.projections(architecture), use_dora=i == 1), name)
        tiny.randomize(model, name, seed=i)
    set_adapter(model, "b")
    other = again(model)
    assert registry_of(other).active == ("b",) and torch.equal(tiny.logits(other), tiny.logits(model))
    assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
    set_adapter(other, "a")
    assert trainable_parameters(other)
    unload(other)
    base = tiny.build(architecture)
    if packed:
        quantize_nf4(base)
    assert torch.equal(tiny.logits(other), tiny.logits(base))


def test_fast_layers_and_what_is_trained_whole():
    model = tiny.classifier()
    use_fast_linear(model)
    use_fast_dropout(model)
    inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"]))
    tiny.randomize(model)
    assert torch.equal(again(model)(X), model(X))
    merge_adapter(model)
    other = again(model)
    assert torch.equal(other(X), model(X))
    unmerge_adapter(other)
    unmerge_adapter(model)
    assert torch.equal(other(X), model(X))


def test_bitsandbytes_own_layers():
    import bitsandbytes as bnb

    model = nn.Sequential(nn.Linear(64, 64))
    quantize_nf4(model)
    model[0].__class__ = bnb.nn.Linear4bit  # as transformers loads them
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    other = again(model)
    assert torch.equal(other(X), model(X))
    assert type(unload(other)[0]) is bnb.nn.Linear4bit


LOAD = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
assert all(torch.equal(m(x), y) for m, x, y in zip(model, inputs, expected))
"""


def test_another_process_knows_the_classes(tmp_path):
    """Classes that are made while a model gets its adapters are made again by their names alone."""
    torch.manual_seed(0)
    convolutions = [getattr(nn, f"Conv{n}d")(3, 4, 3) for n in (1, 2, 3)]
    bases = [nn.Linear(64, 64), *convolutions, transformers.pytorch_utils.Conv1D(4, 8)]
    models = [nn.Sequential(base) for base in bases]
    inputs = [torch.randn(2, 64), *(torch.randn(2, 3, *(5,) * n) for n in (1, 2, 3)), torch.randn(2, 8)]
    quantize_nf4(models[0])
    for model in models:
        inject(model, LoraConfig(r=2, target_modules=["0"]))
        tiny.randomize(model)
    torch.save((models, inputs, [model(x) for model, x in zip(models, inputs, strict=True)]), tmp_path / "models.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "models.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- casts after packing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("when", ["packed", "injected", "merged"])
def test_a_model_that_was_cast_is_of_one_dtype_when_it_is_merged(dtype, when):
    model = tiny.classifier()
    quantize_nf4(model)
    if when == "packed":
        model.to(dtype)
    inject(model, LoraConfig(r=2, target_modules=["q", "k"]))
    tiny.randomize(model)
    if when == "merged":
        merge_adapter(model)
        model.to(dtype)
        unmerge_adapter(model)
    elif when == "injected":
        model.to(dtype)
    expected = model(X.to(dtype))
    assert expected.dtype == dtype
    merge_and_unload(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = model(X.to(dtype))
    # Layers round elsewhere; bitsandbytes unpacks to float32 at most, which 4-bit layers compute in under float64 too.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (found - expected).abs().max() <= 20 * eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_is_packed_again_and_keeps_its_dtype(dtype):
    model = tiny.classifier()
    quantize_nf4(model)
    inject(model, LoraConfig(r=2, target_modules=["q"]))
    tiny.randomize(model)
    model.to(dtype)
    merge_and_unload(model, requantize=True, allow_loss=True)
    assert all(base_of(layer).dense_dtype(layer) == dtype for layer in (model.layers[0].q, model.layers[0].k))
    assert model(X.to(dtype)).dtype == dtype


def test_a_layer_that_bitsandbytes_repacked_is_cast():
    """Its own forward in eval mode repacks some layers for the CPU, and notes another dtype."""
    import bitsandbytes as bnb

    model = nn.Sequential(nn.Linear(64, 64)).eval()
    quantize_nf4(model)
    model[0].__class__ = bnb.nn.Linear4bit
    model(torch.randn(2, 64))
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    tiny.randomize(model)
    before = dense_weight(model[0])
    model.double()
    assert torch.equal(dense_weight(model[0]), before) and base_of(model[0]).dense_dtype(model[0]) == torch.float64
    assert merge_and_unload(model).dequantized and model[0].weight.dtype == torch.float64


# --- weights that are no numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_not_packed(value):
    model = tiny.classifier()
    with torch.no_grad():
        model.layers[1].v.weight[3, 5] = value
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match=r"layers\.1\.v has NaN or infinite weights; nothing was quantised"):
        quantize_nf4(model)
    assert {p: t for p, (t, _) in tiny.snapshot(model)["state"].items()} == {p: t for p, (t, _) in before["state"].items()}
    assert quantize_nf4(model, skip=["layers.1.v"]).layers
