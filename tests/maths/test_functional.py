"""The fused LoRA linear against the equation: values, every gradient, dropout, and what is kept for the backward."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_core.cpu import thin
from lora_core.cpu.products import frozen_linear
from lora_core.gpu import thin as gpu
from lora_core.maths import lora as functional
from lora_core.maths.lora import fold_, lora_linear
from lora_core.methods.dora import dora_factor
from tests.support import oracle
from tests.support.linear import D_IN, D_OUT, ROUNDINGS, SCALING, R, recover_mask

DTYPES = pytest.mark.parametrize("dtype", ROUNDINGS, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = pytest.mark.parametrize(
    "shape", [(), (1,), (4,), (60,), (2, 3), (4, 15), (2, 3, 2), (0,), (2, 0)], ids=lambda s: "x".join(map(str, s)) or "vector"
)


def make(shape, dtype=torch.float64, bias=True, seed=0, d_in=D_IN, d_out=D_OUT):
    """Random x, W, b, A, B (W and b frozen) and an output gradient, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "x": draw(*shape, d_in).requires_grad_(),
        "W": draw(d_out, d_in),
        "b": draw(d_out) if bias else None,
        "A": draw(R, d_in).requires_grad_(),
        "B": draw(d_out, R).requires_grad_(),
    }
    return tensors, draw(*shape, d_out)


def run(tensors, dy=None, dropout=0.0, dense=None, scaling=SCALING):
    """The engine's output and gradients."""
    y = lora_linear(*(tensors[name] for name in ("x", "W", "b", "A", "B")), scaling, dropout, dense)
    if dy is not None:
        y.backward(dy)
    return y, {name: t.grad for name, t in tensors.items() if t is not None and t.requires_grad}


@pytest.fixture(params=["separate", "folded"])
def way(request, monkeypatch):
    """Forces one of the two ways to multiply, whatever the shapes."""
    monkeypatch.setattr(functional, "folding_pays", lambda *args, **kwargs: request.param == "folded")
    return request.param


def check_against_oracle(tensors, dy, dtype, dropout=0.0, dense=None, mask=None, kept=1.0):
    y, gradients = run(tensors, dy, dropout, dense)
    expected_y, expected = oracle.lora_linear_and_gradients(tensors, SCALING, dy, mask, kept)
    bound_y, bounds = oracle.rounding_bound(tensors, SCALING, dy, mask, kept)
    assert y.dtype == dtype
    oracle.assert_within_rounding(y, expected_y, bound_y, ROUNDINGS[dtype])
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype
        oracle.assert_within_rounding(gradient, expected[name], bounds[name], ROUNDINGS[dtype])
    return gradients


# --- values and gradients ---------------------------------------------------------------------------------------------


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_forward_and_gradients_follow_the_equation(shape, dtype, bias):
    tensors, dy = make(shape, dtype, bias)
    if bias:
        tensors["b"].requires_grad_()
    gradients = check_against_oracle(tensors, dy, dtype)
    assert set(gradients) == {"x", "A", "B"} | ({"b"} if bias else set())


@DTYPES
@SHAPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_gpus_products_follow_the_equation(shape, dtype, dropout, monkeypatch):
    monkeypatch.setattr(functional, "thin", lambda x: gpu)
    tensors, dy = make(shape, dtype)
    mask, kept = recover_mask(shape, dropout, seed=5)
    torch.manual_seed(5)
    check_against_oracle(tensors, dy, dtype, dropout, mask=mask, kept=kept)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("dense", [None, torch.clone], ids=["dense", "packed"])
def test_both_ways_to_multiply_follow_the_equation(shape, dtype, dense, way):
    tensors, dy = make(shape, dtype)
    tensors["b"].requires_grad_()
    check_against_oracle(tensors, dy, dtype, dense=dense)


@DTYPES
@SHAPES
@pytest.mark.parametrize("dense", [None, torch.clone], ids=["dense", "packed"])
@pytest.mark.parametrize("block", [1, 3 * D_IN, thin.BLOCK], ids=["rows", "blocks", "whole"])
def test_dropout_uses_one_mask_in_forward_and_backward(shape, dtype, dense, block, monkeypatch):
    monkeypatch.setattr(thin, "BLOCK", block)
    tensors, dy = make(shape, dtype)
    mask, kept = recover_mask(shape, 0.3, seed=5)
    torch.manual_seed(5)
    check_against_oracle(tensors, dy, dtype, dropout=0.3, dense=dense, mask=mask, kept=kept)


@DTYPES
def test_float32_adapters_beside_weights_of_another_dtype(dtype):
    tensors, dy = make((4,), dtype)
    for name in ("A", "B"):
        tensors[name] = tensors[name].detach().float().requires_grad_()
    y, gradients = run(tensors, dy)
    expected_y, expected = oracle.lora_linear_and_gradients(tensors, SCALING, dy)
    bound_y, bounds = oracle.rounding_bound(tensors, SCALING, dy)
    oracle.assert_within_rounding(y, expected_y, bound_y, ROUNDINGS[dtype])
    for name in ("A", "B"):
        assert gradients[name].dtype == torch.float32
        # It was computed in dtype, then cast: that eps counts where it is the coarser one.
        coarse = gradients[name].to(dtype) if dtype != torch.float64 else gradients[name]
        oracle.assert_within_rounding(coarse, expected[name], bounds[name], ROUNDINGS[dtype])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "trained",
    [{"x"}, {"A"}, {"B"}, {"b"}, {"A", "B"}, {"x", "A"}, {"x", "B"}, set()],
    ids=lambda names: "+".join(sorted(names)),
)
def test_only_what_is_trained_gets_a_gradient(trained, dropout, way):
    tensors, dy = make((6,))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    mask, kept = recover_mask((6,), dropout, seed=2)
    torch.manual_seed(2)
    y, _ = run(tensors, None, dropout)
    assert y.requires_grad == bool(trained)
    if trained:
        y.backward(dy)
    assert {name for name, t in tensors.items() if t.grad is not None} == trained
    _, expected = oracle.lora_linear_and_gradients(tensors, SCALING, dy, mask, kept)
    _, bounds = oracle.rounding_bound(tensors, SCALING, dy, mask, kept)
    for name in trained:
        oracle.assert_within_rounding(tensors[name].grad, expected[name], bounds[name], ROUNDINGS[torch.float64])


def transposed(x):
    return x.detach().t().contiguous().t()


def every_second(x):
    return torch.stack([x.detach(), x.detach()], dim=-1)[..., 0]


def expanded(x):
    return x.detach()[:1].expand(x.shape)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", [transposed, every_second, expanded])
def test_inputs_and_output_gradients_of_any_layout(layout, dropout, way):
    tensors, dy = make((6,))
    tensors["x"], dy = layout(tensors["x"]).requires_grad_(), layout(dy)
    assert not tensors["x"].is_contiguous() and not dy.is_contiguous()
    mask, kept = recover_mask((6,), dropout, seed=9)
    torch.manual_seed(9)
    check_against_oracle(tensors, dy, torch.float64, dropout, mask=mask, kept=kept)


def test_a_transposed_weight_view_is_a_weight(way):
    """GPT-2's Conv1D hands over weight.t()."""
    tensors, dy = make((6,))
    tensors["W"] = tensors["W"].t().contiguous().t()
    check_against_oracle(tensors, dy, torch.float64)


def test_the_inputs_are_not_written_to(way):
    tensors, dy = make((6,))
    before = {name: t.detach().clone() for name, t in tensors.items()}
    run(tensors, dy, dropout=0.2)
    run(tensors, dy)
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=["vector", "matrix", "batch"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dense", [None, torch.clone], ids=["dense", "packed"])
def test_gradcheck(shape, dropout, dense, way):
    tensors, _ = make(shape, d_in=5, d_out=4)
    tensors["b"].requires_grad_()

    def function(x, b, A, B):
        torch.manual_seed(3)  # the same dropout mask in each evaluation
        return lora_linear(x, tensors["W"], b, A, B, SCALING, dropout, dense)

    assert torch.autograd.gradcheck(function, tuple(tensors[name] for name in ("x", "b", "A", "B")))


@pytest.mark.parametrize("dense", [None, torch.clone], ids=["dense", "packed"])
def test_a_weight_that_is_trained_gets_its_gradient(dense):
    tensors, dy = make((6,))
    tensors["W"].requires_grad_()
    gradients = check_against_oracle(tensors, dy, torch.float64, dense=dense)
    assert "W" in gradients


def test_a_frozen_weight_gets_none():
    tensors, dy = make((6,))
    run(tensors, dy)
    assert tensors["W"].grad is None and tensors["b"].grad is None


def test_gradients_accumulate_over_two_uses_of_one_layer():
    tensors, dy = make((6,))
    run(tensors, dy)
    once = {name: tensors[name].grad.clone() for name in ("x", "A", "B")}
    run(tensors, dy)
    for name, gradient in once.items():
        torch.testing.assert_close(tensors[name].grad, 2 * gradient, rtol=0, atol=0)  # doubling is exact


def test_frozen_linear_is_the_equation_without_an_adapter():
    tensors, _ = make((2, 3))
    x, b = tensors["x"], tensors["b"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: frozen_linear(x, tensors["W"], b, torch.clone), (x, b))
    y = frozen_linear(x, tensors["W"], b, torch.clone)
    assert torch.equal(y, torch.nn.functional.linear(x, tensors["W"], b))


# --- folding and DoRA's factor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("adapter", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["as-it-is", "transposed-view"])
@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "dora"])
def test_fold_is_in_place_and_in_the_dtype_of_the_weight(magnitude, transposed, adapter, dtype):
    tensors, _ = make(())
    W, A, B = tensors["W"].to(dtype), tensors["A"].detach().to(adapter), tensors["B"].detach().to(adapter)
    W = W.t().contiguous().t() if transposed else W
    m = torch.arange(1, D_OUT + 1).to(adapter) if magnitude else None
    update = {"A": A.double(), "B": B.double(), "s": SCALING} | ({"m": m.double()} if magnitude else {})
    M, parts = oracle.update_matrices(W.double().clone(), [update])
    assert fold_(W, A, B, SCALING) is W and W.dtype == dtype
    if magnitude:
        W.mul_(dora_factor(W, m)[:, None])
    # Sums of 3 and 13 terms of size 10 at most, in the dtype of W.
    eps = max(torch.finfo(dtype).eps, torch.finfo(adapter).eps if adapter == torch.float32 and magnitude else 0)
    torch.testing.assert_close(W.double(), M + parts[0], rtol=0, atol=160 * eps)


def test_the_norm_in_doras_factor_is_a_constant_in_the_gradient():
    V = make(())[0]["W"].requires_grad_()
    m = torch.arange(1.0, D_OUT + 1).double().requires_grad_()
    f = dora_factor(V, m)
    f.sum().backward()
    norm = V.detach().square().sum(1).sqrt()
    assert V.grad is None
    torch.testing.assert_close(f.detach(), m.detach() / norm, rtol=1e-14, atol=0)
    torch.testing.assert_close(m.grad, 1 / norm, rtol=1e-14, atol=0)


# --- autocast, checkpointing, compilers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [None, torch.clone], ids=["dense", "packed"])
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dense):
    tensors, dy = make((4,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        # A packed weight is dequantised to the compute dtype; the layer sees to that, here the caller does.
        y, _ = run(tensors, dense=dense and (lambda W: W.to(torch.bfloat16)))
        assert y.dtype == torch.nn.functional.linear(tensors["x"], tensors["W"]).dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    expected_y, expected = oracle.lora_linear_and_gradients(tensors, SCALING, dy)
    bound_y, bounds = oracle.rounding_bound(tensors, SCALING, dy)
    # x, W and dy are rounded to bfloat16 too: three more roundings.
    oracle.assert_within_rounding(y, expected_y, bound_y, 11)
    for name in ("x", "A", "B"):
        assert tensors[name].grad.dtype == torch.float32
        oracle.assert_within_rounding(tensors[name].grad.bfloat16(), expected[name], bounds[name], 11)


@pytest.mark.parametrize("tokens", [4, 60], ids=["few-tokens", "many-tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_takes_x_in_either_precision(dtype, tokens):
    """Under autocast the layer before hands over bfloat16, while the weights are float32."""
    tensors, dy = make((tokens,), torch.float32)
    tensors["x"] = tensors["x"].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = run(tensors)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    expected_y, expected = oracle.lora_linear_and_gradients(tensors, SCALING, dy)
    bound_y, bounds = oracle.rounding_bound(tensors, SCALING, dy)
    oracle.assert_within_rounding(y, expected_y, bound_y, 11)
    for name in ("x", "A", "B"):
        assert tensors[name].grad.dtype == tensors[name].dtype
        oracle.assert_within_rounding(tensors[name].grad.bfloat16(), expected[name], bounds[name], 11)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_leaves_float64_alone_as_torch_does(dropout):
    tensors, _ = make((4,))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(tensors["x"], tensors["W"]).dtype == torch.float64
        assert run(tensors, dropout=dropout)[0].dtype == torch.float64


@DTYPES
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dense", [None, torch.clone], ids=["dense", "packed"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_one_token_without_gradients_follows_the_equation(shape, dtype, dense, mode):
    tensors, dy = make(shape, dtype)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with mode():
        y, _ = run(tensors, dense=dense)
    expected, _ = oracle.lora_linear_and_gradients(tensors, SCALING, dy, None, 1.0)
    bound, _ = oracle.rounding_bound(tensors, SCALING, dy, None, 1.0)
    assert y.dtype == dtype and not y.requires_grad
    oracle.assert_within_rounding(y, expected, bound, ROUNDINGS[dtype])
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_draws_the_same_mask_again(reentrant):
    tensors, dy = make((6,))
    torch.manual_seed(11)
    y, plain = run(tensors, dy, dropout=0.5)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    for tensor in tensors.values():
        tensor.grad = None
    torch.manual_seed(11)
    arguments = [tensors[name] for name in ("x", "W", "b", "A", "B")]
    again = checkpoint(lora_linear, *arguments, SCALING, 0.5, use_reentrant=reentrant)
    again.backward(dy)
    assert torch.equal(y, again)
    for name, gradient in plain.items():
        assert torch.equal(tensors[name].grad, gradient)


def test_compiled_forward_and_backward_follow_the_equation():
    torch._dynamo.reset()
    tensors, dy = make((6,))
    compiled = torch.compile(lora_linear, backend="aot_eager")
    y = compiled(*(tensors[name] for name in ("x", "W", "b", "A", "B")), SCALING)
    y.backward(dy)
    expected_y, expected = oracle.lora_linear_and_gradients(tensors, SCALING, dy)
    bound_y, bounds = oracle.rounding_bound(tensors, SCALING, dy)
    oracle.assert_within_rounding(y, expected_y, bound_y, ROUNDINGS[torch.float64])
    for name in ("x", "A", "B"):
        oracle.assert_within_rounding(tensors[name].grad, expected[name], bounds[name], ROUNDINGS[torch.float64])


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.pow(2).sum()], ids=["linear", "quadratic"])
def test_a_second_derivative_is_refused_not_wrong(loss):
    """Also in a sum with a first derivative, where a missing term would go unnoticed (a gradient penalty)."""
    tensors, _ = make((3,))
    y, _ = run(tensors)
    with pytest.raises(RuntimeError, match=r"once_differentiable|second derivative"):
        (gradient,) = torch.autograd.grad(loss(y), tensors["x"], create_graph=True)
        (loss(y) + gradient.pow(2).sum()).backward()


def test_functional_transforms_are_those_of_plain_operations():
    tensors, _ = make((3,))
    x, W, A, B = (tensors[name].detach() for name in "xWAB")
    found = torch.func.grad(lambda A: lora_linear(x, W, None, A, B, 1.0).sum())(A)
    torch.testing.assert_close(found, B.sum(0)[:, None] * x.sum(0))
    _, tangent = torch.func.jvp(lambda x: lora_linear(x, W, None, A, B, 1.0), (x,), (x,))  # of a linear function: itself
    torch.testing.assert_close(tangent, x @ (W + B @ A).t())


# --- dropout ----------------------------------------------------------------------------------------------------------

WIDTH, TOKENS = 256, 512  # 131,072 elements: the standard error of a rate is at most 0.5 / sqrt(n) = 0.0014


def large_mask(p, seed=0):
    mask, kept = recover_mask((TOKENS,), p, seed, WIDTH)
    return mask.flatten(), kept


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_rescales_by_it(p):
    mask, kept = large_mask(p)
    assert abs(kept - (1 - p)) <= 1 / 512 + 1e-12  # p is rounded to the nearest 1/256
    standard_error = math.sqrt(kept * (1 - kept) / mask.numel())
    assert abs(mask.mean().item() - kept) < 5 * standard_error  # five sigma: one in two million by chance


def test_each_byte_of_a_random_word_has_the_same_rate():
    """Eight bytes are drawn at a time: a generator that leaves a bit of the word fixed would show in one of them."""
    mask, kept = large_mask(0.5)
    by_byte = mask.view(-1, 8).mean(0)
    assert ((by_byte - kept).abs() < 5 * math.sqrt(0.25 / (mask.numel() / 8))).all(), by_byte


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropped_elements_are_independent_of_their_neighbours(p):
    mask, _ = large_mask(p)
    centred = mask - mask.mean()
    for distance in (1, 2, 3, 4, 7, 8, 9, 16, WIDTH, WIDTH + 1):
        correlation = (centred[:-distance] * centred[distance:]).mean() / centred.pow(2).mean()
        assert abs(correlation.item()) < 5 / math.sqrt(mask.numel()), distance


def test_the_bytes_of_one_word_are_pairwise_independent():
    mask, _ = large_mask(0.5)
    correlations = torch.corrcoef(mask.view(-1, 8).t())
    off_diagonal = correlations - torch.eye(8, dtype=correlations.dtype)
    assert off_diagonal.abs().max() < 5 / math.sqrt(mask.numel() / 8)


def test_dropout_follows_the_seed_and_moves_on():
    first, again = large_mask(0.5, seed=1)[0], large_mask(0.5, seed=1)[0]
    assert torch.equal(first, again)
    eye = torch.eye(WIDTH)
    torch.manual_seed(1)
    calls = [lora_linear(torch.ones(TOKENS, WIDTH), torch.zeros_like(eye), None, eye, eye, 1.0, 0.5) != 0 for _ in range(2)]
    agreement = (calls[0] == calls[1]).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.0014


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.5, 0.5),
        (0.1, 230 / 256),
        (1 / 256, 255 / 256),
        (255 / 256, 1 / 256),
        (0.01, 1 - 655 / 2**16),
        (0.001, 1 - 66 / 2**16),
        (0.999, 66 / 2**16),
        (1e-6, 1 - 4295 / 2**32),
        (1e-12, 1 - 1 / 2**32),
    ],
)
def test_a_probability_is_rounded_by_less_than_a_thirtieth_and_never_to_nothing(p, kept):
    """Elements that are kept are scaled by the rate that is drawn, so the mean of the output stays that of the input."""
    mask, found = large_mask(p)
    assert found == pytest.approx(kept, rel=1e-12) and found < 1
    assert p < 1e-9 or abs((1 - found) - p) <= min(p, 1 - p) / 30
    assert 0 < mask.mean() <= 1
    assert abs(mask.mean().item() - kept) <= 5 * math.sqrt(kept * (1 - kept) / mask.numel())


@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 17])
@pytest.mark.parametrize("tokens", [1, 5])
def test_masks_whose_size_is_no_multiple_of_eight(width, tokens):
    tensors, dy = make((tokens,), d_in=width)
    mask, kept = recover_mask((tokens,), 0.4, seed=4, width=width)
    torch.manual_seed(4)
    check_against_oracle(tensors, dy, torch.float64, 0.4, mask=mask, kept=kept)


def test_dropout_leaves_the_base_path_alone():
    tensors, _ = make((50,))
    tensors["B"] = torch.zeros_like(tensors["B"]).requires_grad_()
    y, _ = run(tensors, dropout=0.9)
    assert torch.equal(y, torch.nn.functional.linear(tensors["x"], tensors["W"], tensors["b"]))


# --- what is kept for the backward ------------------------------------------------------------------------------------


def saved_tensors(function):
    """Tensors that autograd keeps for the backward of what `function` computes."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return kept, result


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(40,), (4, 10)], ids=["matrix", "batch"])
def test_three_projections_keep_one_tensor_of_the_size_of_x(dropout, shape):
    layers = [make(shape, torch.float32, seed=seed)[0] for seed in range(3)]
    x = layers[0]["x"]
    for layer in layers:
        layer["x"] = x
    kept, _ = saved_tensors(lambda: [run(layer, dropout=dropout)[0] for layer in layers])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    own = {t.untyped_storage().data_ptr() for layer in layers for t in layer.values()}
    extra = [size for pointer, size in storages.items() if pointer not in own]
    tokens = x.numel() // D_IN
    thin = tokens * R * 4  # dropout(x) A^T, float32
    seed = 4 * 8  # of the mask
    assert sum(extra) <= 3 * (thin + (seed if dropout else 0)), extra
    assert x.untyped_storage().data_ptr() in storages  # x itself, which is one tensor for the three


def test_a_packed_weight_is_not_kept_dense():
    tensors, _ = make((40,), torch.float32)
    made = []

    def dense(packed):
        made.append(packed.clone())
        return made[-1]

    x, W = tensors["x"], tensors["W"]
    kept, _ = saved_tensors(lambda: (run(tensors, dense=dense)[0], frozen_linear(x, W, None, dense)))
    pointers = {t.untyped_storage().data_ptr() for t in kept}
    assert made and not pointers & {t.untyped_storage().data_ptr() for t in made}
    assert W.untyped_storage().data_ptr() in pointers


def test_nothing_is_kept_without_gradients():
    tensors, _ = make((40,), torch.float32)
    with torch.no_grad():
        kept, y = saved_tensors(lambda: run(tensors, dropout=0.1)[0])
    assert not kept and not y.requires_grad
