"""4-bit bases: what is packed and what never is, exact equality with the dequantised weight, bytes, and training."""

import copy
import math

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
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.bases import base_of, dense_weight, is_packed, weight_bytes
from lora_core.errors import LoraError, MissingDependencyError, StateError, TargetError
from lora_core.layers import LoraLayer
from lora_core.model.registry import adapter_parameters
from tests.support import oracle, tiny

bnb = pytest.importorskip("bitsandbytes")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dequantized(layer):
    """The dense weight by bitsandbytes itself."""
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def packed(shape=(48, 64), dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]).to(dtype))
    report = quantize_nf4(model, **settings)
    return model[0], report


def dense_twin(layer):
    """A plain layer that holds the dequantised weight."""
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.weight = nn.Parameter(dequantized(layer).to(layer.compute_dtype), requires_grad=False)
    twin.bias = nn.Parameter(layer.bias.detach().to(layer.compute_dtype), requires_grad=False)
    return twin


# --- values -----------------------------------------------------------------------------------------------------------


def quantiles():
    """The 16 values of NF4, as the QLoRA paper constructs them (appendix E): quantiles of a normal distribution."""
    from statistics import NormalDist

    offset = 0.9677083  # 1 - (1/30 + 1/32) / 2, the paper's code

    def half(n):
        return [NormalDist().inv_cdf(offset + (0.5 - offset) * i / (n - 1)) for i in range(n - 1)]

    values = sorted([*half(9), 0.0, *(-v for v in half(8))])
    return torch.tensor([v / values[-1] for v in values], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(48, 64), (24, 80), (64, 16), (8, 96)], ids=str)
def test_each_block_is_rounded_to_the_nearest_nf4_value_times_its_largest_magnitude(shape):
    """Also where blocks and rows end at different places."""
    layer, _ = packed(shape, double_quant=False)
    torch.manual_seed(0)
    weight = nn.Linear(*reversed(shape)).weight.detach().double().view(-1, 64)
    scale = weight.abs().amax(1, keepdim=True)
    table = quantiles()
    nearest = table[((weight / scale)[..., None] - table).abs().argmin(-1)] * scale
    # The packed table has a few digits less than a float64 quantile.
    torch.testing.assert_close(dense_weight(layer).double().view(-1, 64), nearest, rtol=0, atol=1e-4 * scale.max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_forward_and_input_gradient_are_those_of_the_dequantised_layer_exactly(dtype, compute_dtype, adapted):
    layer, _ = packed(dtype=dtype, compute_dtype=compute_dtype)
    twin = dense_twin(layer)
    if adapted:
        model = nn.Sequential(layer)
        inject(model, LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(5, 64).to(dtype).requires_grad_()
    x_twin = x.detach().to(layer.compute_dtype).requires_grad_()
    y, expected = layer(x), twin(x_twin)
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    dy = torch.randn(5, 48).to(dtype)
    y.backward(dy)
    expected.backward(dy.to(expected.dtype))
    if not adapted:
        assert torch.equal(x.grad, x_twin.grad.to(dtype))
    # With an adapter on top the sum g A + dy W is added up in another order.
    bound = torch.matmul(dy.double().abs(), twin.weight.double().abs())
    coarse = x.grad if torch.finfo(dtype).eps > torch.finfo(layer.compute_dtype).eps else x.grad.to(layer.compute_dtype)
    oracle.assert_within_rounding(coarse, torch.matmul(dy.double(), twin.weight.double()), bound, 50)


@pytest.mark.parametrize("tokens", [3, 200], ids=["few-tokens", "many-tokens"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_the_adapter_are_those_on_the_dequantised_layer(tokens, dropout):
    outcomes = []
    for dense in (False, True):
        layer, _ = packed()
        model = nn.Sequential(dense_twin(layer) if dense else layer)
        inject(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=["0"]))
        tiny.randomize(model).train()
        torch.manual_seed(1)
        x = torch.randn(tokens, 64, requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        outcomes.append([y.detach(), x.grad, *(p.grad for p in trainable_parameters(model))])
    for packed_one, dense_one in zip(*outcomes, strict=True):
        # The same float32 sums of at most 200 terms; the two may fold at different sizes.
        torch.testing.assert_close(packed_one, dense_one, rtol=1e-4, atol=2e-5 * dense_one.abs().max().item())


def test_autocast_decides_the_compute_dtype():
    layer, _ = packed()
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    twin = dense_twin(layer).bfloat16()
    assert y.dtype == torch.bfloat16 and torch.equal(y, twin(x.bfloat16()))


@pytest.mark.parametrize("shape", [(1, 64), (3, 5), (7, 13), (1, 1), (65, 127)], ids=str)
def test_odd_shapes(shape):
    layer, report = packed(shape)
    x = torch.randn(2, shape[1])
    torch.testing.assert_close(layer(x), dense_twin(layer)(x), rtol=0, atol=0)
    assert dense_weight(layer).shape == shape and report.parameters == math.prod(shape)


def test_an_empty_batch():
    layer, _ = packed()
    assert layer(torch.empty(0, 64)).shape == (0, 48)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_evaluating_changes_no_packed_byte(adapted):
    """bitsandbytes' own eval-mode forward repacks the weight on CPUs with AVX-512 BF16."""
    layer, _ = packed((64, 64), torch.bfloat16)
    model = nn.Sequential(layer)
    if adapted:
        inject(model, LoraConfig(r=2, target_modules=["0"]))
    data, W = layer.weight.data.clone(), dequantized(layer).clone()
    x = torch.randn(4, 64).bfloat16()
    train = model.train()(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), train)
    assert torch.equal(layer.weight.data, data) and torch.equal(dequantized(layer), W)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_that_bitsandbytes_repacked_is_still_read(double_quant):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.bfloat16, compress_statistics=double_quant).to(
        "cpu"
    )
    W = dequantized(layer).clone()
    with torch.no_grad():
        layer.eval()(torch.randn(2, 128).bfloat16())
    # Repacking, where the CPU does it, rounds the scales to bfloat16 (by at most 2^-8), and double quantisation then
    # rounds their differences from the mean to 8 bits again.
    torch.testing.assert_close(dense_weight(layer), W, rtol=0.01, atol=0)
    assert base_of(layer).to_dense(layer).weight.dtype == torch.float32


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_deep_copies_are_equal_and_independent(adapted):
    layer, _ = packed()
    model = nn.Sequential(layer)
    if adapted:
        inject(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 64)
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    twin[0].weight.data.zero_()
    twin[0].weight.quant_state.absmax.zero_()
    assert torch.equal(model(x), before)


def test_the_backward_keeps_no_dense_weight():
    layer, _ = packed((256, 256))
    model = nn.Sequential(layer)
    inject(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(1, 256, requires_grad=True))
    assert kept and max(t.untyped_storage().nbytes() for t in kept) <= 256 * 256 / 2


# --- which layers -----------------------------------------------------------------------------------------------------


def test_it_replaces_linear_layers_but_heads_and_names_in_skip():
    model = tiny.classifier()
    report = quantize_nf4(model, skip=["out", "layers.1.k"])
    assert report.layers == ("layers.0.q", "layers.0.k", "layers.0.v", "layers.1.q", "layers.1.v")
    assert report.skipped == ("layers.0.out", "layers.1.k", "layers.1.out", "classifier")
    assert {path for path, m in model.named_modules() if is_packed(m)} == set(report.layers)
    assert all(isinstance(model.get_submodule(path), bnb.nn.Linear4bit) for path in report.layers)


def test_what_transformers_keeps_in_float32_is_left_as_it_is():
    others = {"wo": nn.Linear(64, 8), "parts": nn.ModuleDict({"wo": nn.Linear(64, 8)})}  # the model names its own layers only
    model = nn.ModuleDict({"part": tiny.build("t5"), **others})
    report = quantize_nf4(model)
    kept = {path for path, _ in model["part"].named_modules(prefix="part") if path.endswith(".wo")}
    assert kept and kept <= set(report.skipped) and {"wo", "parts.wo"} <= set(report.layers)


def test_a_layer_without_weights_is_left_as_it_is():
    report = quantize_nf4(nn.Sequential(nn.Linear(0, 4), nn.Linear(64, 8)))
    assert report.layers == ("1",) and report.skipped == ("0",)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_packed_model_computes_what_its_unpacked_weights_do(architecture):
    """Some models of transformers cast a layer's input to the dtype of its weight, which packed is that of bytes."""
    model = tiny.build(architecture)
    if not any(isinstance(m, nn.Linear) for m in model.modules()):
        pytest.skip("has no nn.Linear layer to pack")
    if architecture == "gpt2":
        pytest.skip("its only nn.Linear layer is the head")
    quantize_nf4(model)
    packed = tiny.logits(model)
    for path, module in list(model.named_modules()):
        if is_packed(module):
            model.set_submodule(path, base_of(module).to_dense(module))
    dense = tiny.logits(model)
    # Both sum in float32, in some order: a few hundred roundings of a value's size at most.
    torch.testing.assert_close(packed, dense, rtol=0, atol=500 * torch.finfo(torch.float32).eps * dense.abs().max().item())


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_an_input_of_whole_numbers_is_refused(adapted):
    layer, _ = packed()
    model = nn.Sequential(layer)
    if adapted:
        inject(model, LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, 64)
    with pytest.raises(StateError, match=r"an input of torch.uint8: .*skip"):
        model(x.to(layer.weight.dtype))
    assert model(x).dtype == torch.float32


def test_skip_names_a_whole_subtree():
    assert quantize_nf4(tiny.classifier(), skip=["layers.0"]).layers == tuple(f"layers.1.{n}" for n in ("q", "k", "v", "out"))


@pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
def test_no_part_of_a_new_head_is_packed(architecture):
    model = tiny.build(architecture)
    report = quantize_nf4(model)
    assert not [path for path in report.layers if "classifier" in path]
    inject(model, LoraConfig(target_modules=tiny.projections(architecture), task_type="SEQ_CLS"))
    model(input_ids=tiny.TOKENS).logits.square().sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "default"))


@pytest.mark.parametrize("model_class", [transformers.BertForMaskedLM, transformers.LlamaForCausalLM])
def test_no_language_models_head_is_packed_and_ties_survive(model_class):
    model = model_class((transformers.BertConfig if "Bert" in model_class.__name__ else transformers.LlamaConfig)(**tiny.SMALL))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    quantize_nf4(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_trained_layers_are_not_packed_once_something_is_frozen():
    model = tiny.classifier()
    model.layers[0].requires_grad_(False)
    assert quantize_nf4(model).layers == tuple(f"layers.0.{n}" for n in ("q", "k", "v", "out"))


def test_layers_with_an_adapter_or_trained_whole_are_not_packed():
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"], modules_to_save=["out"]))
    assert quantize_nf4(model).layers == tuple(f"layers.{i}.{n}" for i in (0, 1) for n in ("k", "v"))


def test_a_layer_under_two_names_stays_one_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    model.append(model[0])
    report = quantize_nf4(model)
    assert report.layers == ("0", "2") and model[0] is model[2] and report.parameters == 64 * 64


def test_bias_training_mode_and_flags_are_kept():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8, bias=False)).eval()
    bias = model[0].bias
    quantize_nf4(model)
    assert model[0].bias is bias and model[1].bias is None and not model[0].training
    assert not model[0].weight.requires_grad


REFUSALS = {
    "unknown name in skip": (tiny.classifier, {"skip": ["clasifier"]}, TargetError, "skip: 'clasifier'.*'classifier'"),
    "skip is a string": (tiny.classifier, {"skip": "classifier"}, StateError, r"\['classifier'\]"),
    "float64 compute": (tiny.classifier, {"compute_dtype": torch.float64}, StateError, "compute_dtype.*float64"),
    "block size": (tiny.classifier, {"block_size": 63}, StateError, "block_size.*64, 128.*63"),
    "float64 weight": (lambda: tiny.classifier(torch.float64), {}, StateError, "layers.0.q.*float64"),
    "meta weight": (lambda: tiny.classifier().to("meta"), {}, StateError, "meta"),
    "nothing to pack": (lambda: nn.Sequential(nn.ReLU()), {}, StateError, "no dense nn.Linear"),
    "all skipped": (tiny.classifier, {"skip": ["layers"]}, StateError, "no dense nn.Linear"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_leaves_the_model_as_it_was(case):
    build, settings, error, message = REFUSALS[case]
    model = build()
    before = {path: (id(m), type(m)) for path, m in model.named_modules()}
    with pytest.raises(error, match=message) as caught:
        quantize_nf4(model, **settings)
    assert isinstance(caught.value, LoraError) and "\n" not in str(caught.value)
    assert {path: (id(m), type(m)) for path, m in model.named_modules()} == before


def test_twice_is_an_error():
    model = tiny.classifier()
    quantize_nf4(model)
    with pytest.raises(StateError, match="packed already"):
        quantize_nf4(model)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    from lora_core.bases.bnb import bitsandbytes

    bitsandbytes.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    try:
        with pytest.raises(MissingDependencyError, match="lora-core.nf4."):
            bitsandbytes()
    finally:
        bitsandbytes.cache_clear()


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)])
def test_bits_a_parameter(double_quant, bits):
    layer, report = packed((512, 512), double_quant=double_quant)
    # Besides the packed values and the scales one float32: the mean that double quantisation takes off the scales.
    constant = 32 / 512**2 if double_quant else 0
    assert report.bits_per_parameter == pytest.approx(bits + constant, rel=1e-12)
    assert report.bytes_before == 512 * 512 * 4 and report.bytes_after == weight_bytes(layer.weight)
    assert f"{report.bits_per_parameter:.3f}" in str(report)
    if double_quant:
        assert f"{bits:.3f}" == "4.127"


@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_block_sizes(block_size):
    _, report = packed((256, 256), double_quant=False, block_size=block_size)
    assert report.bits_per_parameter == 4 + 32 / block_size


def test_bytes_of_a_dense_parameter():
    assert weight_bytes(nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))) == 30


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{architecture: directory} of tiny pretrained models."""
    directories = {}
    for architecture in ("bert", "llama"):
        directories[architecture] = tmp_path_factory.mktemp(architecture)
        wide(architecture).save_pretrained(directories[architecture])
    return directories


def wide(architecture):
    """A tiny model of widths that bitsandbytes' eval-mode forward for CPUs can repack, and without dropout."""
    config, model_class, _ = copy.deepcopy(tiny.ARCHITECTURES[architecture])
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 32
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(1)
    return model_class(config).eval()


def load_in_4_bits(directory, architecture, compute_dtype=torch.float32, dtype=torch.float32):
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["classifier", "lm_head"],  # without it transformers packs a new classifier too
    )
    model_class = tiny.ARCHITECTURES[architecture][1]
    return model_class.from_pretrained(directory, quantization_config=quantization, device_map="cpu", dtype=dtype).eval()


def projection_config(architecture, **settings):
    task = "SEQ_CLS" if architecture in tiny.CLASSIFIERS else None
    return LoraConfig(r=4, target_modules=tiny.projections(architecture), task_type=task, **settings)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_model_that_transformers_loaded_in_4_bits_is_like_one_quantised_here(saved, architecture):
    # In training mode, where bitsandbytes' own forward does not repack.
    theirs, ours = load_in_4_bits(saved[architecture], architecture).train(), wide(architecture).train()
    paths = {path for path, m in theirs.named_modules() if is_packed(m)}
    dense_here = [p for p, m in ours.named_modules() if type(m) is nn.Linear and p not in paths]
    quantize_nf4(ours, skip=dense_here)
    for model in (theirs, ours):
        inject(model, projection_config(architecture))
        tiny.randomize(model)
    assert {p for p, m in theirs.named_modules() if isinstance(m, LoraLayer)} == {
        p for p, m in ours.named_modules() if isinstance(m, LoraLayer)
    }
    # Layers without an adapter use bitsandbytes' own forward there, whose sums may run in another order.
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(ours), rtol=1e-4, atol=1e-5)
    for model in (theirs, ours):
        model(input_ids=tiny.TOKENS).logits.square().sum().backward()
    for a, b in zip(trainable_parameters(theirs), trainable_parameters(ours), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_transformers_loaded_trains_evaluates_and_merges(saved, dtype, compute_dtype):
    model = load_in_4_bits(saved["bert"], "bert", compute_dtype, dtype).train()  # in eval mode it would repack
    before = tiny.logits(model)
    inject(model, projection_config("bert", lora_dropout=0.1))
    # 16-bit kernels may differ between bitsandbytes' forward and ours in the last place; float32 ones by order alone.
    eps = torch.finfo(torch.bfloat16 if torch.bfloat16 in (dtype, compute_dtype) else torch.float32).eps
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=16 * eps * before.abs().max().item())
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model.train()(input_ids=tiny.TOKENS, labels=torch.tensor([0, 1, 0])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        tiny.logits(model.eval())  # after which bitsandbytes' own layers would pass no gradients on
    assert losses[-1] < losses[0]
    adapted = tiny.logits(model.eval())
    report = merge_and_unload(model)
    assert report.dequantized and not any(is_packed(m) for m in model.modules())
    scale = 64 * eps * adapted.abs().max().item()
    torch.testing.assert_close(tiny.logits(model), adapted, rtol=0, atol=scale)


def test_a_model_that_transformers_loaded_is_left_as_it_was(saved):
    model = load_in_4_bits(saved["bert"], "bert")
    before = tiny.snapshot(model)
    inject(model, projection_config("bert"))
    tiny.logits(model)
    unload(model)
    assert tiny.snapshot(model) == before


def test_gradients_are_the_same_after_an_evaluation(saved):
    """On a Llama, whose layers have no bias, bitsandbytes' own layers would lose them without an error."""
    model = load_in_4_bits(saved["llama"], "llama").train()
    inject(model, projection_config("llama"))
    tiny.randomize(model)

    def gradients():
        model.zero_grad()
        model.train()(input_ids=tiny.TOKENS).logits.square().sum().backward()
        return [p.grad.clone() for p in trainable_parameters(model)]

    first = gradients()
    tiny.logits(model.eval())
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_a_model_that_transformers_loaded_is_cast_when_merged(saved):
    """PreTrainedModel.to refuses a dtype while the model says that it is 4-bit."""
    model = load_in_4_bits(saved["bert"], "bert")
    inject(model, projection_config("bert"))
    tiny.randomize(model)
    merge_and_unload(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tiny.logits(model).isfinite().all()


def test_a_merged_model_no_longer_says_that_it_is_4_bit(saved, tmp_path):
    """Else transformers would write a configuration by which the dense checkpoint loads as 4-bit."""
    model = load_in_4_bits(saved["bert"], "bert")
    inject(model, projection_config("bert"))
    tiny.randomize(model)
    merge_and_unload(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert not any(is_packed(m) for m in again.modules())
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_unmerging_restores_every_packed_byte(compute_dtype):
    model = tiny.classifier()
    quantize_nf4(model, compute_dtype=compute_dtype)
    inject(model, LoraConfig(r=4, target_modules="all-linear"))
    tiny.randomize(model)
    before, outputs = tiny.snapshot(model), model(tiny.batch())
    merge_adapter(model)
    assert not torch.equal(model(tiny.batch()), outputs)
    unmerge_adapter(model)
    assert tiny.snapshot(model) == before and torch.equal(model(tiny.batch()), outputs)


def test_to_dense_holds_the_weight_in_the_dtype_of_the_model_around_it():
    layer, _ = packed(compute_dtype=torch.bfloat16)
    dense = base_of(layer).to_dense(layer)
    assert type(dense) is nn.Linear and dense.bias is layer.bias
    assert dense.weight.dtype == torch.float32 and torch.equal(dense.weight, dense_weight(layer))


def test_unloading_leaves_the_packed_model():
    model = tiny.classifier()
    quantize_nf4(model)
    before = tiny.snapshot(model)
    inject(model, LoraConfig(target_modules=["q"]))
    model(tiny.batch())
    unload(model)
    assert tiny.snapshot(model) == before


def test_what_transformers_keeps_in_float32_is_left_dense():
    """T5 casts what it multiplies by `wo` to that weight's dtype: in 4 bits to uint8."""
    model, same, tokens = tiny.build("t5"), tiny.build("t5"), tiny.TOKENS
    report = quantize_nf4(model)
    assert {path.rpartition(".")[2] for path in report.skipped} == {"wo", "lm_head"}
    with torch.no_grad():
        for path in report.layers:
            same.get_submodule(path).weight.copy_(dense_weight(model.get_submodule(path)))
        expected, found = (m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (same, model))
    # The same products, in another order of sums.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
