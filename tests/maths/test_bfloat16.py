"""LoRA in bfloat16 against the equation in float64: how far each result may be off follows from the roundings on its way.

A number that is rounded to bfloat16, which keeps 8 bits, changes by a factor of 1 + d, |d| <= U = 2^-8. Sums are accumulated in
float32, whose roundings are V = 2^-24 each. What is made of k roundings to bfloat16 and n to float32 is then off by at most

    ((1 + U)^k (1 + V)^n - 1) M,        M: the same sum of products with every number made positive

(Higham, "Accuracy and Stability of Numerical Algorithms", lemma 3.1 and section 3.5). The base's product and the update have a
k each. Counted along the equations of `maths/lora.py`, with h = dropout(x) A^T and g = s dy B:

    under autocast       base's                            update's
    y                    x, W, their product, the sum      x, A, h, B, the sum
    dx                   W, their product, the sum         B, g, s g, A, the sum; with dropout also g A
    dA                                                     B, g, s g, x, their product; with dropout that is a sum of blocks
    dB                                                     x, A, h, their product, s times it
    DoRA: y              three more: f, f times y, and with the bias
    DoRA: dx, dA, dB     two more: f, f times dy
    DoRA: dm             those of y, y times dy, their sum over the tokens

    16 bits, A and B in float32, no autocast
    y, dx                their product, the sum            the sum
    dA, dB                                                 none
    DoRA: dx             f dy, their product, the sum      the product, the sum
    DoRA: dm             their product                     none

A weight in 4 bits is rounded once more where it becomes bfloat16, as any is under autocast. n counts every term of every sum
and a few operations besides. f = m / |D|, D = W + s B A, is of float32; it is off by as many roundings times |M_D| / |D|, for
M_D = |W| + s |B| |A|, row by row.

Where all numbers are positive the results use a quarter to nine tenths of what they are allowed.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_core import LoraConfig, inject, quantize_int8, quantize_nf4
from lora_core.bases import dense_weight
from lora_core.cpu import thin
from lora_core.maths import lora as functional
from tests.support.linear import recover_mask

U, V = 2.0**-8, 2.0**-24
D_IN, D_OUT, R, SCALING, SHAPE = 1024, 64, 4, 0.75, (3, 5)
FLOAT32_ROUNDINGS = math.prod(SHAPE) + D_IN + D_OUT + R + 8


def roundings(dora, dropout, autocast, packed):
    """{name: (k of the base's product, k of the update)} of the table above."""
    if autocast:
        y, dx, dA, dB = (4, 5), (3, 5 + dropout), (0, 5 + dropout), (0, 5)
        if not dora:
            return {"y": y, "x": dx, "A": dA, "B": dB}
        more = {name: (k[0] + 2, k[1] + 2) for name, k in (("x", dx), ("A", dA), ("B", dB))}
        return {"y": (y[0] + 3, y[1] + 3), **more, "m": (y[0] + 2, y[1] + 2)}
    W = int(packed)
    plain = {"y": (2 + W, 1), "x": (3 + W, 2) if dora else (2 + W, 1), "A": (0, 0), "B": (0, 0)}
    return plain | ({"m": (1 + W, 0)} if dora else {})


def equation(t, f, s, factors, dy):
    """{name: value or gradient} of y = f (x W^T + s dropout(x) A^T B^T) + b in float64; "m" is the gradient of f.

    `factors` are what dropout multiplies x by, element by element.
    """
    x, A, B, f = (tensor.clone().requires_grad_() for tensor in (t["x"], t["A"], t["B"], f))
    y = f * (x @ t["W"].T + s * ((x * factors) @ A.T) @ B.T) + t["b"]
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad, "m": f.grad}


def assert_within_bound(found, t, dy, factors, k):
    """Every result of `found` is as near to the equation as its roundings say; `t` has x, W, b, A, B and maybe m in float64."""
    direction = t["W"] + SCALING * t["B"] @ t["A"]
    norms, f = direction.norm(dim=1), torch.ones(D_OUT, dtype=torch.float64)
    spread = 1.0
    if "m" in t:
        f = t["m"] / norms
        spread = ((t["W"].abs() + SCALING * t["B"].abs() @ t["A"].abs()).norm(dim=1) / norms).max().item()
    expected = equation(t, f, SCALING, factors, dy)
    positive = {name: tensor.abs() for name, tensor in t.items()}
    no_base = {name: torch.zeros_like(t[name]) for name in ("W", "b")}
    of_base = equation(positive, f.abs(), 0.0, factors, dy.abs())
    of_update = equation(positive | no_base, f.abs(), SCALING, factors, dy.abs())
    float32 = (1 + V) ** FLOAT32_ROUNDINGS
    float32 *= 1 + spread * (float32 - 1) if "m" in t else 1
    assert set(found) == set(k)
    for name, (base, update) in k.items():
        scale = norms if name == "m" else 1.0
        allowed = ((1 + U) ** base * float32 - 1) * of_base[name] + ((1 + U) ** update * float32 - 1) * of_update[name]
        error = (found[name].double() - expected[name] / scale).abs()
        allowed = allowed / scale + torch.finfo(torch.bfloat16).tiny
        assert (error <= allowed).all(), f"{name} is off by {(error / allowed).max():.3g} times what its roundings explain"


def layer_of(base, dora, dropout, positive):
    """An adapted layer, and (x, dy) in bfloat16's numbers. `positive` numbers make sums that grow with every term."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        numbers = torch.randn(shape, generator=generator)
        return numbers.abs() if positive else numbers

    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    with torch.no_grad():
        model[0].weight.copy_(draw(D_OUT, D_IN) / D_IN**0.5)
        model[0].bias.copy_(draw(D_OUT))
    if base == "nf4":
        quantize_nf4(model)
    elif base == "bfloat16":
        model.bfloat16()
    inject(model, LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=["0"], use_dora=dora, lora_dropout=dropout))
    layer = model[0].train()
    with torch.no_grad():
        layer.lora_A["default"].copy_(draw(R, D_IN) / D_IN**0.5)
        layer.lora_B["default"].copy_(draw(D_OUT, R) / 2)
        if dora:
            layer.lora_magnitude["default"].mul_(1 + draw(D_OUT) / 8)
    return layer, draw(*SHAPE, D_IN).bfloat16(), draw(*SHAPE, D_OUT).bfloat16()


def check(base, autocast, dora, dropout, positive):
    layer, x, dy = layer_of(base, dora, dropout, positive)
    factors = torch.ones(*SHAPE, D_IN, dtype=torch.float64)
    if dropout:
        mask, kept = recover_mask(SHAPE, dropout, seed=7, width=D_IN)
        if dora and not autocast:  # which torch drops
            torch.manual_seed(7)
            mask, kept = (F.dropout(torch.ones(*SHAPE, D_IN), dropout) != 0).double(), 1 - dropout
        factors = mask / kept
    x = (x.float() if autocast else x).requires_grad_()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy)
    trained = {"A": layer.lora_A["default"], "B": layer.lora_B["default"]}
    trained |= {"m": layer.lora_magnitude["default"]} if dora else {}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())
    t = {"x": x, "W": dense_weight(layer, torch.float32), "b": layer.bias, **trained}
    t = {name: tensor.detach().double() for name, tensor in t.items()}
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in trained.items()}}
    assert_within_bound(found, t, dy.double(), factors, roundings(dora, dropout > 0, autocast, base == "nf4"))


HELD = [("float32", True), ("bfloat16", True), ("nf4", True), ("bfloat16", False), ("nf4", False)]


@pytest.mark.parametrize(("base", "autocast"), HELD, ids=lambda v: {True: "autocast", False: "as loaded"}.get(v, v))
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("positive", [False, True], ids=["any sign", "positive"])
def test_every_result_is_as_near_as_its_roundings_say(base, autocast, dora, dropout, positive):
    check(base, autocast, dora, dropout, positive)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_sum_that_is_accumulated_in_bfloat16_is_found(monkeypatch, dropout):
    def narrow(x, A, keep=None):
        x = x.to(A.dtype) if keep is None else x.to(A.dtype) * keep.to(A.dtype)
        h = x.new_zeros(len(x), len(A))
        for k in range(x.shape[1]):
            h += x[:, k, None] * A[:, k]
        return h

    monkeypatch.setattr(functional, "thin", lambda x: SimpleNamespace(**{**vars(thin), "narrow": narrow}))
    with pytest.raises(AssertionError, match="times what its roundings explain"):
        check("float32", True, False, dropout, positive=True)


def test_an_update_in_16_bits_beside_a_base_in_16_bits_is_found(monkeypatch):
    monkeypatch.setattr(functional, "update_dtype", lambda x, factor: x.dtype)
    with pytest.raises(AssertionError, match="times what its roundings explain"):
        check("bfloat16", False, False, 0.0, positive=False)


@pytest.mark.parametrize(
    "pack",
    [quantize_nf4, functools.partial(quantize_nf4, double_quant=False), quantize_int8],
    ids=["nf4", "nf4, scales in float32", "int8"],
)
def test_a_packed_weight_becomes_bfloat16_by_one_rounding(pack):
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    pack(model)
    assert torch.equal(dense_weight(model[0], torch.bfloat16), dense_weight(model[0], torch.float32).bfloat16())
