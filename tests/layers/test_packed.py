"""Fused experts in 4 bits: they compute what the dequantised ones do, keep nothing dense, and carry adapters."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_core import (
    LoraConfig,
    base_weight_bytes,
    count_parameters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    packed_parameters,
    quantize_int8,
    quantize_nf4,
    save_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.bases import dense_weight, is_packed
from lora_core.bases.nf4 import NF4
from lora_core.errors import StateError, TargetError, WrongBaseError
from lora_core.layers.packed import PackedHost, packed_names
from lora_core.maths.packed import PackedWeight
from tests.support import experts, tiny
from tests.support.experts import MODELS, TOKENS, build, config, logits

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
EVERY_WAY = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])


def packed(name="mixtral", *args, **settings):
    model = build(name, *args)
    quantize_nf4(model, **settings)
    return model


def twin(name="mixtral", *args, **settings):
    """The same model with dense weights: those that bitsandbytes makes of the packed ones, all at once."""
    import bitsandbytes

    model, dense = packed(name, *args, **settings), build(name, *args)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_packed(module):
            dense.get_submodule(path).weight.data = dense_weight(module)
        for parameter in packed_names(module):
            held = copy.deepcopy(module._parameters[parameter])
            shape, held.quant_state.shape = held.quant_state.shape, (math.prod(held.quant_state.shape),)
            whole = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
            dense.get_submodule(path)._parameters[parameter].data = whole.view(shape)
    return dense


def adapted(model, name="mixtral", **settings):
    inject(model, config(name, **settings))
    return tiny.randomize(model)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama4"])
@EVERY_WAY
def test_they_compute_what_the_dequantised_ones_do(name, implementation):
    check_a_step(name, implementation)


def test_so_do_llama_4_s_which_multiply_in_a_way_of_their_own():
    check_a_step("llama4", None)


def check_a_step(name, implementation):
    ours, dense = packed(name, implementation), twin(name, implementation)
    assert torch.equal(logits(ours), logits(dense))
    assert not torch.equal(logits(dense), logits(build(name, implementation)))
    for model in (adapted(ours, name), adapted(dense, name)):
        model.train()
        model(TOKENS, labels=TOKENS).loss.backward()
    torch.testing.assert_close(logits(ours), logits(dense), rtol=0, atol=1e-5)
    for a, b in zip(trainable_parameters(ours), trainable_parameters(dense), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"double_quant": False}, {"block_size": 128}, {"compute_dtype": torch.bfloat16}], ids=str)
def test_other_formats(settings):
    ours, dense = packed("gpt-oss", **settings), twin("gpt-oss", **settings)
    # bfloat16 rounds each product to 2^-9 of its value.
    atol = 0.2 if "compute_dtype" in settings else 0
    torch.testing.assert_close(logits(ours), logits(dense), rtol=0, atol=atol)


def test_the_report_and_the_counts_say_what_was_packed():
    model = build("mixtral")
    before = base_weight_bytes(model)
    report = quantize_nf4(model, skip=["lm_head"])
    stacks = [path for path in report.layers if "experts" in path]
    assert stacks == [f"model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")]
    assert not report.dense and report.parameters == 2 * 4 * 3 * 16 * 24 + 2 * (2 * 16 * 32 + 2 * 16 * 16)
    assert base_weight_bytes(model) == before - report.bytes_before + report.bytes_after
    assert report.bits_per_parameter < 4.3
    assert {p.dtype for p in packed_parameters(model)} == {torch.uint8} and len(packed_parameters(model)) == 12
    assert count_parameters(model).total == count_parameters(build("mixtral")).total


@pytest.mark.parametrize("case", ["8 bits", "skipped", "one parameter", "blocks of two matrices", "another name", "adapted"])
def test_what_is_left_dense_is_told_with_its_bytes(case):
    model = build("mixtral")
    if case == "adapted":
        inject(model, LoraConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    if case == "another name":
        model.model.layers[1].mlp.experts.stack = nn.Parameter(torch.randn(3, 8, 8))
    calls = {
        "8 bits": (lambda: quantize_int8(model), 4, 36864, "int8 has no form for several matrices of this shape"),
        "skipped": (lambda: quantize_nf4(model, skip=["experts"]), 4, 36864, "skipped"),
        "one parameter": (lambda: quantize_nf4(model, skip=["experts.down_proj"]), 2, 12288, "skipped"),
        "blocks of two matrices": (lambda: quantize_nf4(model, block_size=256), 2, 12288, "NF4 has no form"),
        "another name": (lambda: quantize_nf4(model), 1, 768, "not known to be experts"),
        "adapted": (lambda: quantize_nf4(model), 4, 36864, "it carries an adapter"),
    }
    call, count, size, why = calls[case]
    report = call()
    assert len(report.dense) == count and report.bytes_dense == size
    said = f"; {count} parameters with several matrices left dense, {size / 2**20:.1f} MiB: model.layers."
    assert said in str(report) and why in str(report)


def test_what_can_t_be_packed_is_refused_and_changes_nothing():
    model = build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = torch.nan
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match=r"layers\.1\.mlp\.experts\.down_proj has NaN"):
        quantize_nf4(model)
    assert tiny.snapshot(model) == before and not any(isinstance(m, PackedHost) for m in model.modules())
    with pytest.raises(TargetError, match="is quantised and can't be trained"):
        inject(packed("mixtral"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))


@EVERY_WAY
def test_a_training_step_keeps_nothing_dense(implementation):
    model = packed("mixtral", implementation)
    inject(model, config())
    layer = nn.ModuleDict({"experts": model.model.layers[0].mlp.experts})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts.run(layer, torch.randn(5, 16, requires_grad=True))
    floats = [t.numel() for t in kept if t.is_floating_point()]
    assert floats and max(floats) <= 10 * 48 * 2  # of ten rows; the matrices that they meet have 7,680 values


def test_one_expert_at_a_time_is_made_dense_where_one_is_asked_for(monkeypatch):
    model = packed("mixtral", "eager")
    host = model.model.layers[0].mlp.experts
    read = host.gate_up_proj[-1]
    assert isinstance(read, PackedWeight) and torch.equal(read.dense(), host.gate_up_proj.dense()[3])
    monkeypatch.setattr(NF4, "dequantizer", lambda *args: pytest.fail("all of them were"))
    experts.run(nn.ModuleDict({"experts": host}), torch.randn(5, 16, requires_grad=True)).sum().backward()


def test_files_and_fingerprints(tmp_path):
    model = adapted(packed())
    expected = logits(model)
    save_adapter(model, tmp_path)
    other = packed()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    with pytest.raises(WrongBaseError, match=r"experts\.gate_up_proj was nf4/64/double 4x48x16, is float32 4x48x16"):
        load_adapter(build(), tmp_path)
    with pytest.raises(WrongBaseError, match="was nf4/64/double 4x48x16, is nf4/64 4x48x16"):
        load_adapter(packed(double_quant=False), tmp_path)
    changed = build()
    changed.model.layers[0].mlp.experts.gate_up_proj.data *= -1
    quantize_nf4(changed)
    with pytest.raises(WrongBaseError, match="has other values"):
        load_adapter(changed, tmp_path)


@EVERY_MODEL
def test_unloading_gives_every_byte_back(name):
    model = packed(name)
    before, kinds = tiny.snapshot(model), [type(m) for m in model.modules()]
    adapted(model, name)
    logits(model)
    merge_adapter(model)
    unmerge_adapter(model)
    unload(model)
    assert tiny.snapshot(model) == before and [type(m) for m in model.modules()] == kinds


@EVERY_MODEL
def test_merged_they_are_dense_and_the_model_is_plain_again(name):
    model = adapted(packed(name), name)
    expected = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    unmerge_adapter(model)
    assert torch.equal(logits(model), expected)
    report = merge_and_unload(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    plain = build(name)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {k: v.dtype for k, v in model.state_dict().items()} == {k: v.dtype for k, v in plain.state_dict().items()}
    assert sum("experts." in path for path in report.dequantized) >= 4


def test_merged_without_an_adapter_on_them_they_are_dense_too():
    model = packed()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    expected = logits(tiny.randomize(model))
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert not any(isinstance(m, PackedHost) for m in model.modules())


def test_merged_into_four_bits_again():
    model = adapted(packed())
    report = merge_and_unload(model, requantize=True, allow_loss=True)
    assert len(report.requantized) == 12 and not report.dequantized
    assert all(report.layers[path] > 0 for path in report.requantized if "experts" in path)
    expected = build()
    merged = adapted(twin())
    merge_and_unload(merged)
    for path, module in expected.named_modules():
        if isinstance(module, MixtralExperts):
            for name in ("gate_up_proj", "down_proj"):
                module._parameters[name].data = merged.get_parameter(f"{path}.{name}").data
    quantize_nf4(expected)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same(how, with_adapter):
    model = packed()
    model = adapted(model) if with_adapter else model
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other), logits(model))
    if with_adapter:
        unload(other)
    assert type(other.model.layers[0].mlp.experts).__mro__[1] is PackedHost


def test_a_state_dict_has_the_scales_beside_them():
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = packed()
    path = "model.layers.1.mlp.experts.down_proj"
    state = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(path)}
    theirs = build().model.layers[1].mlp.experts
    replace_parameter_4bit(theirs, "down_proj", compress_statistics=True)
    expected = {f"model.layers.1.mlp.experts.{key}": t for key, t in theirs.state_dict().items() if "down_proj" in key}
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_a_model_that_is_cast_computes_in_that():
    model = packed().bfloat16()
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    adapted(model)
    merge_and_unload(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@EVERY_WAY
def test_under_autocast_gradients_are_as_near_to_the_exact_ones(implementation):
    gradients = []
    for built, autocast in ((packed, True), (twin, True), (twin, False)):
        model = adapted(built("mixtral", implementation))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(model)]))
    ours, dense, exact = gradients
    assert (ours - exact).norm() <= 1.05 * (dense - exact).norm() and not torch.equal(ours, exact)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointed in (False, True):
        model = adapted(packed()).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad for p in trainable_parameters(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_compiled_model_computes_the_same():
    model = adapted(packed("mixtral", "grouped_mm"))
    expected = logits(model)
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), expected, rtol=0, atol=1e-5)


def test_a_loss_of_the_adapter_falls():
    model = packed()
    inject(model, config(r=4))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_all_linear_still_says_that_they_are_left_out():
    with pytest.warns(UserWarning, match=r"target_parameters=\['experts.gate_up_proj'\]"):
        inject(packed(), LoraConfig(r=2, target_modules="all-linear"))
