"""Models that can be pickled (`torch.save(model)`), before and after they got adapters; casts after packing; odd weights."""

import io

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lora_core import (
    LoraConfig,
    delete_adapter,
    disable_adapters,
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
from lora_core.errors import MergeError, QuantizationError, TargetError
from lora_core.nf4 import dense_dtype, dequantize
from lora_core.registry import registry_of

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
    assert dense_dtype(model.layers[0].q) == dense_dtype(model.layers[0].k) == dtype
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
    before = dequantize(model[0])
    model.double()
    assert torch.equal(dequantize(model[0]), before) and dense_dtype(model[0]) == torch.float64
    assert merge_and_unload(model).dequantized and model[0].weight.dtype == torch.float64


# --- weights that can't be packed or merged -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_not_packed(value):
    model = tiny.classifier()
    with torch.no_grad():
        model.layers[1].v.weight[3, 5] = value
    before = tiny.snapshot(model)
    with pytest.raises(QuantizationError, match=r"layers\.1\.v has NaN or infinite weights; nothing was quantised"):
        quantize_nf4(model)
    assert {p: t for p, (t, _) in tiny.snapshot(model)["state"].items()} == {p: t for p, (t, _) in before["state"].items()}
    assert quantize_nf4(model, skip=["layers.1.v"]).layers


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


COMPUTED = {
    "pruned": lambda layer, name="weight": prune.l1_unstructured(layer, name, amount=0.3),
    "weight norm": lambda layer, name="weight": torch.nn.utils.weight_norm(layer, name),
    "spectral norm": lambda layer, name="weight": torch.nn.utils.spectral_norm(layer, name),
    "parametrised": lambda layer, name="weight": parametrize.register_parametrization(layer, name, Doubled()),
}
REMEDIES = {
    "pruned": prune.remove,
    "weight norm": torch.nn.utils.remove_weight_norm,
    "spectral norm": torch.nn.utils.remove_spectral_norm,
    "parametrised": parametrize.remove_parametrizations,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("merge", [merge_adapter, merge_and_unload])
def test_a_computed_weight_is_not_merged(kind, when, merge, tmp_path):
    if (kind, when) == ("parametrised", "before"):
        pytest.skip("its class is another, which carries no adapter")
    model = tiny.classifier().eval()  # in training mode spectral norm goes on with every forward
    if when == "before":
        COMPUTED[kind](model.layers[0].q)
    inject(model, LoraConfig(r=2, target_modules=["q", "v"]))
    tiny.randomize(model)
    if when == "after":
        COMPUTED[kind](model.layers[0].q)
    output = model(X)
    with pytest.raises(MergeError, match=r"layers\.0\.q: its weight is computed from other tensors .*prune\.remove"):
        merge(model)
    assert torch.equal(model(X), output)
    model(X).square().sum().backward()  # training goes on
    assert all(p.grad is not None for p in model.layers[0].q.lora_A.parameters())


@pytest.mark.parametrize("merge", [merge_adapter, merge_and_unload])
def test_a_computed_bias_is_not_added_to(merge):
    model = tiny.classifier()
    prune.l1_unstructured(model.layers[0].q, "bias", amount=0.3)
    inject(model, LoraConfig(r=2, target_modules=["q", "v"], lora_bias=True))
    tiny.randomize(model)
    output = model(X)
    message = r"layers\.0\.q: its bias is computed from other tensors .*prune\.remove\(layer, 'bias'\)"
    with pytest.raises(MergeError, match=message):
        merge(model)
    assert torch.equal(model(X), output)
    prune.remove(model.layers[0].q, "bias")
    merge(model)
    assert (model(X) - output).abs().max() <= 1e-6 * output.abs().max()  # sums of a few terms, in another order


def test_a_computed_bias_that_no_adapter_adds_to_is_no_hindrance():
    model = tiny.classifier()
    prune.l1_unstructured(model.layers[0].q, "bias", amount=0.3)
    inject(model, LoraConfig(r=2, target_modules=["q"]))
    tiny.randomize(model)
    output = model(X)
    merge_adapter(model)
    unmerge_adapter(model)
    assert torch.equal(model(X), output)
    merge_adapter(model)
    prune.remove(model.layers[0].q, "bias")
    unmerge_adapter(model)
    assert torch.equal(model(X), output)


def test_a_computed_bias_is_not_trained_in_a_copy():
    model = tiny.classifier()
    prune.l1_unstructured(model.layers[0].q, "bias", amount=0.3)
    with pytest.raises(TargetError, match=r"layers\.0\.q: its bias is computed from other tensors .*bias='none'"):
        inject(model, LoraConfig(r=2, target_modules=["q"], bias="lora_only"))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("take_off", [unmerge_adapter, unload, merge_and_unload], ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_what_was_pruned_while_merged_is_not_unmerged(kind, tensor, take_off):
    if "norm" in kind and tensor == "bias":
        pytest.skip("norms are of matrices")
    model = tiny.classifier().eval()
    base = model(X)
    inject(model, LoraConfig(r=2, target_modules=["q", "v"], lora_bias=tensor == "bias"))  # else its bias is not merged
    tiny.randomize(model)
    adapted = model(X)
    merge_adapter(model)
    COMPUTED[kind](model.layers[1].v, tensor)
    output = model(X)
    with pytest.raises(MergeError, match=rf"its {tensor} is computed from other tensors"):
        take_off(model)
    assert torch.equal(model(X), output)
    REMEDIES[kind](model.layers[1].v, tensor)
    take_off(model)
    # The values from before the merge are back: pruning went with those that it was done to.
    expected = base if take_off is unload else adapted
    assert (model(X) - expected).abs().max() <= 1e-6 * expected.abs().max()  # sums of a few terms, in another order


@pytest.mark.parametrize("take_off", [unload, lambda model: delete_adapter(model, "default")], ids=["unload", "delete"])
def test_what_was_parametrised_with_an_adapter_keeps_its_weight(take_off):
    model = tiny.classifier()
    inject(model, LoraConfig(r=2, target_modules=["q"]))
    tiny.randomize(model)
    with disable_adapters(model):
        base = model(X)
    nn.utils.parametrizations.weight_norm(model.layers[0].q)
    output = model(X)
    with pytest.raises(MergeError, match=r"Linear .*parametrised .*remove_parametrizations"):
        take_off(model)
    assert torch.equal(model(X), output)
    parametrize.remove_parametrizations(model.layers[0].q, "weight")
    take_off(model)
    assert type(model.layers[0].q) is nn.Linear
    assert (model(X) - base).abs().max() <= 1e-6 * base.abs().max()  # g v / |v| rounds the weight anew


def test_a_pruned_layer_is_not_packed():
    model = tiny.classifier()
    prune.l1_unstructured(model.layers[0].q, "weight", amount=0.3)
    assert "layers.0.q" in quantize_nf4(model).skipped
