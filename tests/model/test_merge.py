"""Folding adapters into the base: the same outputs, every byte back, or plain modules; never half of it."""

import copy

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    delete_adapter,
    disable_adapters,
    inject,
    is_merged,
    merge_adapter,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_core.errors import StateError
from lora_core.model.registry import registry_of
from tests.support import oracle, tiny

X = tiny.batch()


def adapted(dtype=torch.float32, quantized=False, **settings):
    """A model with the random adapters "a" (active) and "b"."""
    model = tiny.classifier(dtype)
    if quantized:
        quantize_nf4(model)
    inject(model, LoraConfig(**{"r": 4, "target_modules": ["q", "v"], **settings}), "a")
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["v", "out"]), "b")
    return tiny.randomize(tiny.randomize(model, "a", seed=1), "b", seed=2).eval()


def close(actual, expected, eps=2**-23):
    """Equal up to float32 sums of 64 terms in another order, through two blocks."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=256 * eps * expected.abs().max().item())


# --- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("names", ["a", "b", ["a", "b"]], ids=str)
def test_merged_computes_the_same_and_unmerging_restores_every_byte(quantized, names):
    model = adapted(quantized=quantized)
    set_adapter(model, names)
    before, expected = tiny.snapshot(model), model(X)
    merge_adapter(model)
    assert is_merged(model)
    close(model(X), expected)
    unmerge_adapter(model)
    assert not is_merged(model)
    assert tiny.snapshot(model) == before and torch.equal(model(X), expected)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_merged_transformers_compute_the_same(architecture):
    model = tiny.build(architecture)
    inject(model, LoraConfig(r=4, target_modules="all-linear"))
    tiny.randomize(model)
    expected, before = tiny.logits(model), tiny.snapshot(model)
    merge_adapter(model)
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    unmerge_adapter(model)
    assert tiny.snapshot(model) == before
    merge_and_unload(model)
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unmerging_16_bit_weights_restores_every_byte(dtype):
    model = adapted(dtype)
    before = tiny.snapshot(model)
    merge_adapter(model, ["a", "b"])
    assert model.layers[0].v.weight.dtype == dtype
    unmerge_adapter(model)
    set_adapter(model, "a")
    assert tiny.snapshot(model) == before


def test_merging_a_named_adapter_makes_it_the_active_one():
    model, other = adapted(), adapted()
    merge_adapter(model, "b")
    set_adapter(other, "b")
    close(model(X), other(X))
    assert registry_of(model).active == ("b",)


def test_while_merged_the_adapters_stay_as_they_are():
    model = adapted()
    merge_adapter(model)
    before, outputs = tiny.snapshot(model), model(X)
    for call in (
        lambda: merge_adapter(model),
        lambda: merge_adapter(model, "b"),
        lambda: set_adapter(model, "b"),
        lambda: delete_adapter(model, "a"),
        lambda: delete_adapter(model, "b"),
        lambda: disable_adapters(model).__enter__(),
    ):
        with pytest.raises(StateError, match="unmerge_adapter"):
            call()
    assert tiny.snapshot(model) == before and torch.equal(model(X), outputs)


def test_unmerging_what_is_not_merged_is_an_error():
    with pytest.raises(StateError, match="merge_adapter"):
        unmerge_adapter(adapted())


def test_merging_nothing_is_an_error():
    model = adapted()
    set_adapter(model, [])
    for verb in (merge_adapter, merge_and_unload):
        with pytest.raises(StateError, match="no adapter is active"):
            verb(model)


def test_a_merged_adapter_can_be_saved(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "before", "a")
    merge_adapter(model)
    save_adapter(model, tmp_path / "after", "a")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_gradients_of_a_merged_model_reach_its_input():
    model = adapted()
    merge_adapter(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.any()


# --- for good ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("merged_before", [False, True], ids=["unmerged", "merged-before"])
def test_merge_and_unload_leaves_plain_modules_that_compute_the_same(quantized, merged_before):
    model, plain = adapted(quantized=quantized, modules_to_save=["classifier"], bias="none"), tiny.classifier()
    expected = model(X)
    if merged_before:
        merge_adapter(model)
    report = merge_and_unload(model)
    close(model(X), expected)
    assert {p: type(m) for p, m in model.named_modules()} == {p: type(m) for p, m in plain.named_modules()}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert {k: t.dtype for k, t in model.state_dict().items()} == {k: t.dtype for k, t in plain.state_dict().items()}
    assert report.adapters == ("a",) and set(report.layers) == {f"layers.{i}.{n}" for i in (0, 1) for n in "qv"}
    assert report.largest_error == 0.0
    assert bool(report.dequantized) == quantized and len(report.dequantized) in (0, 8)
    assert "merged a" in str(report)
    inject(model, LoraConfig(target_modules=["q"]))  # as plain as any other


def test_the_trained_head_and_biases_are_kept():
    model = tiny.classifier()
    inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"], bias="all"))
    tiny.randomize(model)
    head, bias, expected = model.classifier.weight.detach().clone(), model.norm.bias.detach().clone(), model.eval()(X)
    merge_and_unload(model)
    assert torch.equal(model.classifier.weight, head) and torch.equal(model.norm.bias, bias)
    assert not torch.equal(head, tiny.classifier().classifier.weight)
    close(model(X), expected)


def test_flags_of_the_base_come_back():
    model = tiny.classifier()
    model.layers[0].requires_grad_(False)
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    inject(model, LoraConfig(target_modules=["q"], modules_to_save=["classifier"]))
    merge_and_unload(model)
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags


def test_the_merged_weight_is_w_plus_s_b_a_cast_once():
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(dtype)
        layer = model.layers[0].v
        updates = [(layer.lora_A[n].detach(), layer.lora_B[n].detach(), layer.lora_scaling[n]) for n in ("a", "b")]
        exact = oracle.merged_weight(layer.weight.detach(), updates)
        magnitude = oracle.merged_weight(layer.weight.detach().abs(), [(A.abs(), B.abs(), s) for A, B, s in updates])
        report = merge_and_unload(model, ["a", "b"])
        found = model.layers[0].v.weight
        assert found.dtype == dtype
        # Float32: one rounding a term. bfloat16: one rounding, of half an eps.
        roundings = 10 if dtype == torch.float32 else 0.51
        oracle.assert_within_rounding(found, exact, magnitude, roundings)
        assert (report.layers["layers.0.v"] > 0) == (dtype == torch.bfloat16)


def test_bfloat16_sums_that_were_rounded_on_the_way_would_show():
    """The cast happens once, after both updates: elementwise the nearest bfloat16 to the float32 sum."""
    model = adapted(torch.bfloat16)
    layer = model.layers[1].v
    total = layer.weight.detach().float()
    for n in ("a", "b"):
        total = total + layer.lora_scaling[n] * (layer.lora_B[n].detach() @ layer.lora_A[n].detach())
    merge_and_unload(model, ["a", "b"])
    found, nearest = model.layers[1].v.weight.detach(), total.bfloat16()
    # The two float32 sums may differ in their last place, which decides ties: allow one in a thousand.
    assert (found != nearest).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_the_whole_model_can_be_cast(dtype, quantized):
    model = adapted(quantized=quantized, modules_to_save=["classifier"])
    expected = model(X)
    merge_and_unload(model, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    eps = max(torch.finfo(dtype).eps, 2**-23)
    close(model(X.to(dtype)).float(), expected, eps / 8)


def test_the_other_adapters_are_dropped():
    model, other = adapted(), adapted()
    set_adapter(other, "b")
    merge_and_unload(model, "b")
    close(model(X), other(X))
    assert not [key for key in model.state_dict() if "lora" in key]


def test_saving_and_loading_the_state_of_a_merged_model():
    model = adapted()
    merge_and_unload(model)
    plain = tiny.classifier().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), model(X))


# --- refusals, before anything is changed -----------------------------------------------------------------------------


def nan_adapter(model):
    model.layers[1].v.lora_B["b"].data[0, 0] = float("nan")


def nan_base(model):
    model.layers[1].v.weight.data[0, 0] = float("nan")


def infinite_product(model):
    model.layers[1].v.lora_A["b"].data.fill_(1e30)
    model.layers[1].v.lora_B["b"].data.fill_(1e30)


def too_large_for_float16(model):
    model.layers[1].v.lora_A["b"].data.fill_(300.0)
    model.layers[1].v.lora_B["b"].data.fill_(300.0)


def head_too_large_for_float16(model):
    model.classifier.weight.data.fill_(1e5)


REFUSALS = {
    "NaN in an adapter": (nan_adapter, {}, "NaN or infinite"),
    "NaN in the base": (nan_base, {}, "NaN or infinite"),
    "infinite product": (infinite_product, {}, "NaN or infinite"),
    "overflow in float16": (too_large_for_float16, {"dtype": torch.float16}, "overflows float16"),
    "overflow elsewhere": (head_too_large_for_float16, {"dtype": torch.float16}, "classifier.weight.*overflows float16"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_merge_leaves_the_model_as_it_was(case):
    spoil, settings, message = REFUSALS[case]
    model = adapted()
    spoil(model)
    before, active = tiny.snapshot(model), registry_of(model).active
    with pytest.raises(StateError, match=message) as caught:
        merge_and_unload(model, ["a", "b"], **settings)
    assert "\n" not in str(caught.value)
    assert registry_of(model).active == active and not is_merged(model)
    assert tiny.snapshot(model) == before


def test_a_refused_merge_leaves_a_merged_model_merged():
    model = adapted()
    nan_adapter(model)
    merge_adapter(model, "a")
    outputs = model(X)
    with pytest.raises(StateError, match="NaN or infinite"):
        merge_and_unload(model, ["a", "b"])
    assert is_merged(model) and registry_of(model).active == ("a",) and torch.equal(model(X), outputs)
    unmerge_adapter(model)


@pytest.mark.parametrize("case", ["NaN in an adapter", "NaN in the base", "infinite product"])
def test_a_refused_merge_in_place_leaves_the_model_as_it_was(case):
    spoil, _, message = REFUSALS[case]
    model = adapted()
    spoil(model)
    before, active = tiny.snapshot(model), registry_of(model).active
    with pytest.raises(StateError, match=message):
        merge_adapter(model, ["a", "b"])
    assert not is_merged(model) and registry_of(model).active == active
    assert tiny.snapshot(model) == before


def test_merging_in_place_beside_a_tied_weight_computes_the_same():
    model = adapted()
    model.layers[1].k.weight = model.layers[1].v.weight
    expected = model(X)
    merge_adapter(model)
    close(model(X), expected)
    unmerge_adapter(model)
    assert model.layers[1].k.weight is model.layers[1].v.weight


def test_a_model_that_was_moved_while_merged_comes_back_there():
    model = adapted()
    reference = copy.deepcopy(model)
    merge_adapter(model)
    model.to(torch.float64)
    unmerge_adapter(model)
    assert model(X.double()).dtype == torch.float64
    close(model(X.double()).float(), reference(X))


def test_unloading_while_merged_gives_the_base_back():
    model = adapted()
    merge_adapter(model, ["a", "b"])
    unload(model)
    assert torch.equal(model(X), tiny.classifier()(X))
    assert type(model.layers[0].q) is nn.Linear


# --- in the weight's own memory ---------------------------------------------------------------------------------------


def addresses(model):
    return {path: p.data_ptr() for path, p in model.named_parameters() if "lora" not in path}


def test_merging_for_good_changes_float32_weights_in_their_own_memory():
    model = tiny.randomize(injected(tiny.classifier()))
    before, x = addresses(model), tiny.batch()
    y = model(x)
    merge_and_unload(model)
    assert addresses(model) == before
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_cast_is_not_touched_before_all_of_it_is_known(dtype):
    model = tiny.randomize(injected(tiny.classifier()))
    values = {path: (p, p.detach().clone()) for path, p in model.named_parameters() if "lora" not in path}
    merge_and_unload(model, dtype=dtype)
    assert all(torch.equal(p.float(), value) for path, (p, value) in values.items() if path.endswith("q.weight"))


def injected(model, **settings):
    inject(model, LoraConfig(**{"r": 4, "target_modules": ["q", "v"], **settings}))
    return model


@pytest.mark.parametrize("size", [1e18, 1e19, 1e22])
def test_a_bound_never_lets_an_overflow_through(size):
    """Factors whose product is near the largest float32, or above: either the exact sum is finite, or nothing changes."""
    model = injected(tiny.classifier(), r=1, lora_alpha=1)
    layer = model.layers[1].v
    layer.lora_A["default"].data.fill_(size)
    layer.lora_B["default"].data.fill_(size)
    before = tiny.snapshot(model)
    if size**2 < torch.finfo(torch.float32).max:
        merge_and_unload(model)
        assert layer.weight.isfinite().all() and layer.weight.max() > 1e35
    else:
        with pytest.raises(StateError, match=r"layers\.1\.v"):
            merge_and_unload(model)
        assert tiny.snapshot(model) == before


def test_signs_that_cancel_are_not_refused_for_the_bound():
    """The bound of a rank-2 update whose two parts cancel is above the largest float32; the sum itself is not, and is made."""
    model = injected(tiny.classifier(), r=2, lora_alpha=2)
    layer = model.layers[0].q
    layer.lora_A["default"].data.fill_(1.6e19)
    layer.lora_B["default"].data[:] = torch.tensor([1.6e19, -1.6e19])
    assert not layer.folds_in_place(["default"])
    merge_and_unload(model)
    assert layer.weight.isfinite().all()


def test_a_convolution_in_channels_last_is_merged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3)).to(memory_format=torch.channels_last)
    tiny.randomize(injected(model, target_modules=["0"]))
    x = torch.randn(2, 3, 6, 6)
    y = model(x)
    merge_and_unload(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)
