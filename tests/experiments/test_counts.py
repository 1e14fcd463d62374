"""The closed forms against models: built, injected, quantised and counted tensor by tensor."""

import pytest

from experiments.counts import Architecture, Counts, counted, halved
from experiments.expected import architectures
from experiments.models import resolve
from experiments.precision import cast_frozen
from lora_core import LoraConfig, base_weight_bytes, count_parameters, inject, quantize_int8, quantize_nf4
from tests.support import tiny

SMALL = {
    "bert": Architecture("bert", layers=2, width=32, feed_forward=64, vocabulary=99, positions=512, segments=2),
    "distilbert": Architecture("distilbert", layers=2, width=32, feed_forward=64, vocabulary=99, positions=512),
    "mpnet": Architecture("mpnet", layers=2, width=32, feed_forward=64, vocabulary=99, positions=512, buckets=32, heads=2),
}
BY_ARCHITECTURE = pytest.mark.parametrize("name", SMALL)


def model_counts(model):
    found = count_parameters(model)
    return Counts(found.adapter, found.trainable, found.total)


@BY_ARCHITECTURE
def test_a_model_as_loaded(name):
    model = tiny.build(name)
    assert counted(SMALL[name], "everything", {}) == model_counts(model)
    assert counted(SMALL[name], "nothing", {}) == Counts(0, 0, model_counts(model).total)
    head = sum(p.numel() for path, p in model.named_parameters() if "classifier" in path)
    assert counted(SMALL[name], "head", {}).trained == SMALL[name].head == head


@BY_ARCHITECTURE
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("targets", [slice(0, 1), slice(0, 4)])
def test_adapters_of_any_rank_and_their_biases(name, bias, targets):
    model, chosen = tiny.build(name), tiny.projections(name)[targets]
    inject(model, LoraConfig(r=3, target_modules=chosen, bias=bias, task_type="SEQ_CLS"))
    assert counted(SMALL[name], "adapter", {"r": 3, "target_modules": chosen, "bias": bias}) == model_counts(model)


@BY_ARCHITECTURE
def test_a_magnitude_for_each_output(name):
    model, chosen = tiny.build(name), tiny.projections(name)
    inject(model, LoraConfig(r=2, target_modules=chosen, use_dora=True, task_type="SEQ_CLS"))
    found = counted(SMALL[name], "adapter", {"r": 2, "target_modules": chosen, "use_dora": True})
    assert found == model_counts(model)


@BY_ARCHITECTURE
def test_bytes_of_the_base(name):
    model = tiny.build(name)
    assert SMALL[name].base_bytes(quantize=False) == base_weight_bytes(model)
    report = quantize_nf4(model)
    assert SMALL[name].quantized == report.parameters
    assert SMALL[name].quantized_bytes == report.bytes_after
    assert SMALL[name].base_bytes(quantize=True) == base_weight_bytes(model)
    model = tiny.build(name)
    assert quantize_int8(model).bytes_after == SMALL[name].int8_bytes
    assert SMALL[name].base_bytes(quantize="int8") == base_weight_bytes(model)


@BY_ARCHITECTURE
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "lora_only"}])
def test_adapters_on_every_linear_layer(name, settings):
    model = tiny.build(name)
    inject(model, LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS", **settings))
    found = counted(SMALL[name], "adapter", {"r": 3, "target_modules": ["all-linear"], **settings})
    assert found == model_counts(model)


@BY_ARCHITECTURE
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}])
def test_bytes_of_a_base_in_bfloat16(name, settings):
    model, targets = tiny.build(name), tiny.projections(name)
    inject(model, LoraConfig(r=3, target_modules=targets, task_type="SEQ_CLS", **settings))
    cast_frozen(model, ["classifier", "pre_classifier"])
    settings = settings | {"target_modules": targets, "precision": "bf16"}
    assert SMALL[name].base_bytes(False, halved(SMALL[name], "adapter", settings)) == base_weight_bytes(model)
    assert halved(SMALL[name], "everything", settings) == halved(SMALL[name], "adapter", settings | {"quantize": True}) == 0
    assert halved(SMALL[name], "adapter", settings | {"precision": "fp32"}) == 0


def test_other_targets_have_no_closed_form_here():
    assert counted(SMALL["bert"], "adapter", {"r": 2, "target_modules": ["query", "intermediate.dense"]}) is None


def test_the_known_numbers():
    minilm = architectures()["sentence-transformers/all-MiniLM-L6-v2"]
    assert (minilm.body, minilm.head) == (22_713_216, 770)
    distilbert = architectures()["distilbert-base-uncased"]
    assert (distilbert.body, distilbert.head) == (66_362_880, 592_130)  # as its card and transformers say
    mpnet = architectures()["sentence-transformers/all-mpnet-base-v2"]
    assert (mpnet.body, mpnet.head) == (108_895_872, 592_130)  # test_packaged_base counts them
    # The count that the study's text gives, and the total it gives it of.
    high = counted(distilbert, "adapter", {"r": 32, "target_modules": ["q_lin", "k_lin", "v_lin", "out_lin"]})
    assert high == Counts(1_179_648, 1_771_778, 68_726_788)


def test_the_sizes_are_those_of_the_packaged_model():
    config = resolve("packaged").config
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
    sizes = [config[name] for name in (*names, "type_vocab_size")]
    assert architectures()["sentence-transformers/all-MiniLM-L6-v2"] == Architecture(config["model_type"], *sizes)
