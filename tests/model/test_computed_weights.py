"""Weights that are computed from other tensors (pruned, normed, parametrised): nothing is packed or folded into them."""

import pytest
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
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_core.errors import StateError, TargetError
from tests.support import tiny

X = tiny.batch()


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
    with pytest.raises(StateError, match=r"layers\.0\.q: its weight is computed from other tensors .*prune\.remove"):
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
    with pytest.raises(StateError, match=message):
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


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_computed_bias_is_not_trained_in_a_copy(bias):
    model = tiny.classifier()
    prune.l1_unstructured(model.layers[0].q, "bias", amount=0.3)
    with pytest.raises(TargetError, match=r"layers\.0\.q: its bias is computed from other tensors .*bias='none'"):
        inject(model, LoraConfig(r=2, target_modules=["q"], bias=bias))


VERBS = {
    "save": lambda m, d: save_adapter(m, d / "adapter"),
    "disable": lambda m, d: disable_adapters(m).__enter__(),
    "set": lambda m, d: set_adapter(m, []),
    "merge": lambda m, d: merge_and_unload(m),
    "merge in place": lambda m, d: merge_adapter(m),
    "unload": lambda m, d: unload(m),
    "delete": lambda m, d: delete_adapter(m, "default"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", COMPUTED)
def test_what_is_trained_whole_and_computed_since_is_refused(kind, verb, tmp_path):
    model = tiny.classifier().eval()
    inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"]))
    COMPUTED[kind](model.classifier, "weight")
    output = model(X)
    with pytest.raises(TargetError, match="the weight of a .*Linear, which adapters have copies of, is computed"):
        VERBS[verb](model, tmp_path)
    assert torch.equal(model(X), output) and not list(tmp_path.iterdir())
    REMEDIES[kind](model.classifier, "weight")
    unload(model)


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
    with pytest.raises(StateError, match=rf"its {tensor} is computed from other tensors"):
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
    with pytest.raises(StateError, match=r"Linear .*parametrised .*remove_parametrizations"):
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
