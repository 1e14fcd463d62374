"""Every kind of layer with every variant of an adapter: forward, gradients and folding, against the float64 oracle."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core import quantize_nf4
from lora_core.errors import StateError
from lora_core.layers import lora_class
from lora_core.methods.registry import DORA, LORA
from tests.support import oracle
from tests.support.kinds import (
    ALONE,
    D_OUT,
    KINDS,
    TOGETHER,
    VARIANTS,
    build,
    expected_output,
    is_embedding,
    oracle_of,
    part_of,
    roundings,
)

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
#: One of each code path, where all of them would show nothing more.
SOME_KINDS = pytest.mark.parametrize(
    "kind", ["linear", "Conv1D", "nf4", "conv1d", "conv2d", "channels last", "padded embedding"]
)
EVERY_CASE = pytest.mark.parametrize(
    ("kind", "names"),
    [(kind, names) for kind in KINDS for names in ALONE + TOGETHER if names != ("biased",) or "embedding" not in kind],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)


# --- forward and gradients --------------------------------------------------------------------------------------------


@EVERY_CASE
def test_the_forward_is_the_equation(kind, names):
    lora, x = build(kind, names), KINDS[kind].x()
    expected, bound = expected_output(kind, lora, names, x)
    oracle.assert_within_rounding(lora(x), expected, bound, roundings(KINDS[kind].matrix(lora)))


@SOME_KINDS
def test_the_order_of_active_adapters_does_not_matter(kind):
    names = ["dora", "plain", "second", "start"]
    lora, x = build(kind, names), KINDS[kind].x()
    expected, bound = expected_output(kind, lora, names, x)
    for order in (names[::-1], ["plain", "second", "start", "dora"]):
        lora.activate(order)
        oracle.assert_within_rounding(lora(x), expected, bound, roundings(KINDS[kind].matrix(lora)))


@EVERY_CASE
def test_gradients_are_the_oracles_whose_norm_is_a_constant(kind, names):
    lora = build(kind, names, dtype=torch.float64)
    x = KINDS[kind].x()
    if not is_embedding(kind):
        x = x.double().requires_grad_()
    apply, W, b, updates, leaves = oracle_of(kind, lora, names)
    for table, name in leaves:
        parameter = getattr(lora, table)[name]
        parameter.data = parameter.data.double()  # beside 4-bit weights they are float32
        parameter.requires_grad_()
    y = lora(x)
    dy = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    y.backward(dy)
    wide = x if is_embedding(kind) else x.detach().clone().requires_grad_()
    oracle.adapted_layer(apply, wide, W, b, updates).backward(dy)
    pairs = {key: (getattr(lora, key[0])[key[1]].grad, leaf.grad) for key, leaf in leaves.items()}
    if not is_embedding(kind):
        pairs["x"] = (x.grad, wide.grad)
    # All in float64, but for the dense form of 4-bit weights, which is float32 where DoRA takes its norm.
    tolerance = 1e-6 if kind == "nf4" else 1e-12
    for key, (actual, wanted) in pairs.items():
        assert wanted.any(), key
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * max(1, wanted.abs().max().item()), msg=str(key))


@pytest.mark.parametrize("names", [("plain",), ("dora", "start")], ids="+".join)
def test_an_embedding_that_scales_gradients_by_frequency_does_so_for_its_adapters(names):
    plain, scaled = build("embedding", names), build("embedding", names)
    scaled.scale_grad_by_freq, x = True, KINDS["embedding"].x()
    for lora in (plain, scaled):
        for name in names:
            lora.lora_A[name].requires_grad_()
        lora(x).square().sum().backward()
    counts = torch.bincount(x.flatten(), minlength=9).clamp(min=1)
    assert (counts > 1).any()
    for name in names:
        torch.testing.assert_close(scaled.lora_A[name].grad * counts, plain.lora_A[name].grad)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d", "channels last", "padded embedding"])
@pytest.mark.parametrize("names", [("plain",), ("biased", "start")], ids="+".join)
def test_gradcheck(kind, names):
    """DoRA is not in it: its gradient, with the norm a constant, is not the derivative of its output. Nor are 4-bit layers,
    which compute in float32 whatever the input."""
    lora, x = build(kind, names, dtype=torch.float64), KINDS[kind].x()
    parameters = [p for name in lora.lora_active for p in lora.trained(name)]
    for parameter in parameters:
        parameter.data = parameter.data.double()
        parameter.requires_grad_()
    if is_embedding(kind):
        lora.padding_idx = None  # torch has no gradient there, which the numbers would not know
        assert torch.autograd.gradcheck(lambda *_: lora(x), parameters)
    else:
        assert torch.autograd.gradcheck(lambda x, *_: lora(x), (x.double().requires_grad_(), *parameters))


@SOME_KINDS
def test_what_is_not_trained_gets_no_gradient(kind):
    lora, x = build(kind, ["dora start"]), KINDS[kind].x()
    lora.lora_magnitude["dora start"].requires_grad_()
    lora(x).sum().backward()
    assert {name for name, p in lora.named_parameters() if p.grad is not None} == {"lora_magnitude.dora start"}


# --- a fresh adapter --------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("names", [("plain",), ("biased", "other")], ids="+".join)
def test_a_fresh_adapter_changes_no_bit(kind, names):
    lora, x = build(kind, names, random=False), KINDS[kind].x()
    adapted = lora(x)
    lora.activate([])
    assert torch.equal(adapted, lora(x))


@EVERY_KIND
def test_one_factor_starts_at_zero_and_the_other_at_random(kind):
    """B, but for embeddings, where A has a row for each entry: these must not differ before they have been read."""
    lora = build(kind, ["plain"], random=False)
    zero, other = (lora.lora_A, lora.lora_B) if is_embedding(kind) else (lora.lora_B, lora.lora_A)
    assert not zero["plain"].any() and other["plain"].all()


@EVERY_KIND
@pytest.mark.parametrize("names", [("dora",), ("start",), ("dora start", "plain", "second")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_of_another_variant_changes_the_output_by_rounding_alone(kind, names, dtype):
    lora, x = build(kind, names, random=False, dtype=dtype), KINDS[kind].x()
    x = x if is_embedding(kind) else x.to(dtype)
    _, bound = expected_output(kind, lora, names, x)
    adapted = lora(x)
    lora.activate([])
    # DoRA's factor 1 and B A - B0 A0 = 0 are exact but for single roundings in 16 bits, for sums in float32.
    count = 8 if dtype == torch.bfloat16 else roundings(KINDS[kind].matrix(lora))
    oracle.assert_within_rounding(adapted, lora(x).detach().double(), bound, count)


@EVERY_KIND
def test_the_magnitude_starts_as_the_norm_of_what_is_there_with_the_adapter(kind):
    """So an adapter whose B is not zero computes what it would without DoRA, until its magnitude is trained."""
    lora, x = build(kind, []), KINDS[kind].x()
    lora.add_adapter("a", 2, 3.0, 0.0, init=False, method=DORA)
    _, W, _, updates, _ = oracle_of(kind, lora, ["a"])
    norm = (W + part_of(updates[0])).norm(dim=1)
    torch.testing.assert_close(lora.lora_magnitude["a"].double(), norm, rtol=1e-5, atol=0)
    assert ((norm / W.norm(dim=1) - 1).abs() > 1e-4).all()
    lora.activate(["a"])
    adapted = lora(x)
    lora.lora_method["a"] = LORA
    torch.testing.assert_close(adapted, lora(x), rtol=0, atol=1e-5)


@EVERY_KIND
def test_rows_of_zeros_give_no_nan(kind):
    """DoRA divides by the norms of rows; one whose weights are all zero stays zero until its magnitude is not."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 6) if kind == "nf4" else KINDS[kind].build()
    with torch.no_grad():
        (layer.weight.t() if kind == "Conv1D" or is_embedding(kind) else layer.weight)[1] = 0
    if kind == "nf4":
        model = nn.Sequential(layer)
        quantize_nf4(model, double_quant=False)  # else the scale of the row of zeros is rounded to another
        layer = model[0]
    lora = lora_class(layer).adopt(layer)
    lora.add_adapter("a", 2, 0.5, 0.0, method=DORA)
    lora.activate(["a"])
    x = KINDS[kind].x()
    for parameter in lora.trained("a"):
        parameter.requires_grad_()
    y = lora(x)
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in lora.trained("a"))
    assert not lora.lora_magnitude["a"][1].any()
    before = y.detach()
    lora.fold(["a"])
    assert lora.weight.isfinite().all()
    torch.testing.assert_close(lora(x).detach(), before, rtol=0, atol=1e-5)


# --- folding ----------------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_folded_is_the_equation_and_unfolding_restores_every_byte(kind, names):
    lora, x = build(kind, names), KINDS[kind].x()
    names = [name for name in names if name in lora.lora_scaling and (name != "biased" or lora.bias is not None)]
    if not names:
        return
    lora.activate(names)
    expected, bound = expected_output(kind, lora, names, x)
    _, W, _, updates, _ = oracle_of(kind, lora, names)
    weight, bias, data, unfolded = lora.weight, lora.bias, lora.weight.data.clone(), lora(x)
    state = copy.deepcopy(getattr(weight, "quant_state", None))
    old_bias = None if bias is None else bias.data.clone()

    M, parts = oracle.update_matrices(W, updates)
    assert lora.update_norm(names) == pytest.approx((M + sum(parts) - W).norm().item(), rel=1e-4)
    lora.fold(names)
    count = roundings(W)
    folded = lora.weight.detach().flatten(1) if kind == "nf4" else KINDS[kind].matrix(lora)
    scale = M.abs().max() + sum(part.abs().max() for part in parts) + W.abs().max()
    assert (folded - (M + sum(parts))).abs().max() <= count * 1.2e-7 * scale
    oracle.assert_within_rounding(lora(x), expected, bound, count)

    lora.unfold()
    assert lora.weight is weight and torch.equal(weight.data, data) and lora.weight.stride() == data.stride()
    assert lora.bias is bias and (bias is None or torch.equal(bias.data, old_bias))
    if state is not None:
        assert torch.equal(weight.quant_state.absmax, state.absmax)
    assert torch.equal(lora(x), unfolded)


@EVERY_KIND
@pytest.mark.parametrize("name", ["dora", "biased", "start"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_folded(kind, name, bad):
    lora = build(kind, [name])
    if name not in lora.lora_scaling or (name == "biased" and lora.bias is None):
        return
    table = getattr(lora, {"dora": "lora_magnitude", "biased": "lora_bias", "start": "lora_B"}[name])
    table[name].data.view(-1)[0] = bad
    weight, bias = lora.weight, lora.bias
    with pytest.raises(StateError, match=f"{name}.* gives? NaN or infinite"):
        lora.fold([name])
    assert lora.weight is weight and lora.bias is bias and not lora.lora_folded


@pytest.mark.parametrize("kind", ["linear without bias", "conv2d circular"])
def test_a_bias_without_one_to_fold_it_into_is_refused(kind):
    lora = build(kind, ["biased"])
    weight = lora.weight
    with pytest.raises(StateError, match="none to fold it into"):
        lora.fold(["biased"])
    assert lora.weight is weight and not lora.lora_folded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [("dora",), ("plain", "dora start"), ("biased",)], ids="+".join)
@SOME_KINDS
def test_16_bit_weights_are_folded_wide_and_cast_once(kind, names, dtype):
    lora = build(kind, names, dtype=dtype)
    names = lora.lora_active
    if kind == "nf4" or not names:
        return
    _, W, _, updates, _ = oracle_of(kind, lora, names)
    M, parts = oracle.update_matrices(W, updates)
    exact = (M + sum(parts)).detach()
    lost = lora.fold(names).lost
    assert lora.weight.dtype == dtype and (lora.bias is None or lora.bias.dtype == dtype)
    folded = KINDS[kind].matrix(lora).double()
    # One rounding by half of eps; float32's errors before it are 8,192 times smaller at least, of the size of W.
    eps = torch.finfo(dtype).eps
    assert ((folded - exact).abs() <= exact.abs() * eps * 0.51 + 1e-5 * W.abs().max()).all()
    assert lost == pytest.approx(((folded - exact).norm() / (exact - W).norm()).item(), rel=1e-2)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-another"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "nf4", "conv2d"])
def test_dropout_acts_on_the_input_of_the_adapter_alone(kind, use_dora, beside):
    """y = f (W x + s B A dropout(x)) + b: with s B A the identity, (y - b) / f - W x is dropout(x)."""
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(64, 64), "Conv1D": Conv1D(64, 64), "nf4": nn.Linear(64, 64), "conv2d": nn.Conv2d(64, 64, 1)}
    model = nn.Sequential(layers[kind])
    if kind == "nf4":
        quantize_nf4(model)
    lora = lora_class(model[0]).adopt(model[0])
    lora.add_adapter("a", 64, 2.0, 0.25, method=DORA if use_dora else LORA)
    if beside:
        lora.add_adapter("b", 2, 1.0, 0.0, method=DORA)  # fresh: adds nothing
    lora.activate(["a", "b"])
    lora.lora_A["a"].data.copy_(torch.eye(64))
    lora.lora_B["a"].data.copy_(torch.eye(64) / 2)
    f = lora.row_scale("a").detach() * 2 if use_dora else torch.ones(64)
    if use_dora:
        lora.lora_magnitude["a"].data.mul_(2)
    x = torch.randn(50, 64, 3, 2) if kind == "conv2d" else torch.randn(300, 64)
    lora.train()
    y, again = lora(x).detach(), lora(x).detach()
    assert not torch.equal(y, again) and torch.equal(lora.eval()(x), lora(x))
    lora.activate([])
    base = lora(x).detach()
    if kind == "conv2d":
        y, base, x = (t.movedim(1, -1).reshape(-1, 64) for t in (y, base, x))
    b = lora.bias.detach()
    dropped = (y - b) / f - (base - b)
    kept = (dropped - x / 0.75).abs() < 1e-4
    zero = dropped.abs() < 1e-4
    assert (kept | zero).all()
    # 19,200 elements at least: the standard error of the rate is 0.003.
    assert abs(zero.double().mean() - 0.25) < 0.02


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_embeddings_have_no_dropout(variant):
    lora, x = build("embedding", [variant]), KINDS["embedding"].x()
    lora.lora_dropout[variant] = 0.9
    assert torch.equal(lora.train()(x), lora.eval()(x))


# --- precisions, autocast, compilers, copies --------------------------------------------------------------------------


@SOME_KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [("plain",), ("dora",), ("biased", "other"), ("dora", "biased", "start")], ids="+".join)
def test_16_bit_weights_with_float32_adapters(kind, names, dtype):
    lora, x = build(kind, names, dtype=dtype), KINDS[kind].x()
    x = x if is_embedding(kind) else x.to(dtype)
    if kind == "nf4":
        lora.bias.data = lora.bias.data.to(dtype)
    expected, bound = expected_output(kind, lora, names, x)
    y = lora(x)
    assert y.dtype == dtype
    # Rounded once each: W, A, B, the thin product, each sum of the output, DoRA's factor and product, the bias.
    oracle.assert_within_rounding(y, expected, bound, 12)


@SOME_KINDS
@pytest.mark.parametrize("names", [("plain",), ("dora",), ("biased", "other"), ("dora", "plain", "biased")], ids="+".join)
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(kind, names):
    lora, x = build(kind, names), KINDS[kind].x()
    base = copy.deepcopy(lora)
    base.activate([])
    for name in lora.lora_active:
        for parameter in lora.trained(name):
            parameter.requires_grad_()
    expected, bound = expected_output(kind, lora, names, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(x)
        assert y.dtype == base(x).dtype
    oracle.assert_within_rounding(y.bfloat16(), expected, bound, 14)  # and x is rounded
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for name in lora.lora_active for p in lora.trained(name))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "padded embedding"])
@pytest.mark.parametrize("names", [("dora",), ("plain", "dora", "start")], ids="+".join)
def test_a_compiled_layer_computes_the_same(kind, names):
    torch._dynamo.reset()
    lora, x = build(kind, names), KINDS[kind].x()
    expected, bound = expected_output(kind, lora, names, x)
    y = torch.compile(lora, backend="aot_eager")(x)
    oracle.assert_within_rounding(y, expected, bound, roundings(KINDS[kind].matrix(lora)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("conv", "channels"))])
@pytest.mark.parametrize("names", [("plain",), ("dora", "biased")], ids="+".join)
def test_a_convolution_takes_one_sample_without_a_batch(kind, names):
    lora, x = build(kind, names), KINDS[kind].x()
    if lora.padding_mode == "reflect":
        return  # torch itself pads no such input
    torch.testing.assert_close(lora(x[0]), lora(x)[0], rtol=0, atol=1e-5)


@EVERY_KIND
def test_a_deep_copy_is_independent(kind):
    lora, x = build(kind, ["dora start", "plain"]), KINDS[kind].x()
    twin = copy.deepcopy(lora)
    before = lora(x)
    assert torch.equal(twin(x), before)
    for table in (twin.lora_A, twin.lora_A0, twin.lora_magnitude):
        for parameter in table.values():
            parameter.data.zero_()
    assert torch.equal(lora(x), before) and not torch.equal(twin(x), before)


@EVERY_KIND
def test_state_dict_keys(kind):
    lora = build(kind, ["plain", "dora start", "biased"])
    added = {key for key in lora.state_dict() if key.startswith("lora_")}
    expected = {"lora_A.plain", "lora_B.plain"}
    expected |= {f"lora_{table}.dora start" for table in ("A", "B", "A0", "B0", "magnitude")}
    expected |= {f"lora_{table}.biased" for table in ("A", "B", "bias")} if not is_embedding(kind) else set()
    assert added == expected
    r, d_in = lora.lora_A["plain"].shape
    assert (r, d_in) == (2, KINDS[kind].matrix(lora).shape[1]) and lora.lora_B["plain"].shape == (D_OUT, r)


@EVERY_KIND
def test_releasing_gives_back_exactly_what_was_there(kind):
    torch.manual_seed(0)
    layer = KINDS[kind].build()
    attributes, base, weight, x = sorted(vars(layer)), type(layer), layer.weight, KINDS[kind].x()
    before = layer.weight.data.clone()
    lora = lora_class(layer).adopt(layer)
    for name in ("dora start", "biased"):
        if name != "biased" or not (is_embedding(kind) or layer.bias is None):
            lora.add_adapter(name, dropout=0.0, **VARIANTS[name])
    lora.activate(lora.lora_scaling)
    assert isinstance(lora, base)
    lora(x)
    lora.fold(list(lora.lora_scaling))
    assert lora.release() is layer and type(layer) is base
    assert sorted(vars(layer)) == attributes and layer.weight is weight and torch.equal(weight.data, before)
