"""Where adapters start: what A and B are, that a start from the weight changes nothing, and what becomes of it in files."""

import math

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    disable_adapters,
    inject,
    load_adapter,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
)
from lora_core.errors import AdapterNameError
from lora_core.files.adapter import read_adapter
from lora_core.layers import LoraLayer
from lora_core.methods.start import start
from tests.support import tiny

D_IN, D_OUT, R, SCALING = 40, 24, 6, 0.7
FROM_THE_WEIGHT = ("pissa", "pissa_niter_8", "olora")
X = tiny.batch()


def weight(dtype=torch.float64):
    """(d_out, d_in) with singular values 2, 1, 1/2, ...: distinct, so that the best approximation is one."""
    generator = torch.Generator().manual_seed(2)
    U, _ = torch.linalg.qr(torch.randn(D_OUT, D_OUT, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(D_IN, D_OUT, generator=generator, dtype=torch.float64))
    return (U * 2.0 ** -torch.arange(-1.0, D_OUT - 1).double() @ V.t()).to(dtype)


def started(init, W=None, r=R, scaling=SCALING, zero_A=False):
    W = weight() if W is None else W
    torch.manual_seed(4)
    return start(init, W.new_empty(0), (W.shape[1], W.shape[0]), r, scaling, W.clone, zero_A)


# --- A and B ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, R, D_OUT])
def test_pissa_is_the_best_approximation_of_that_rank(r):
    W = weight()
    A, B, subtracted = started("pissa", r=r)
    assert subtracted and A.shape == (r, D_IN) and B.shape == (D_OUT, r)
    S = torch.linalg.svdvals(W)
    # Eckart-Young: what no rank-r matrix can do better than. In float64, to the rounding of sums of 40 terms.
    residual = torch.linalg.svdvals(W - SCALING * B @ A)
    torch.testing.assert_close(residual[: D_OUT - r], S[r:], rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.linalg.svdvals(SCALING * B @ A)[:r], S[:r], rtol=0, atol=1e-13)
    # Each singular value is shared out evenly: the columns of B and the rows of A have the same norms.
    torch.testing.assert_close(A.norm(dim=1), (S[:r] / SCALING).sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(B.norm(dim=0), (S[:r] / SCALING).sqrt(), rtol=0, atol=1e-12)


def test_randomised_pissa_comes_closer_with_more_iterations():
    W, (A, B, _) = weight(), started("pissa")
    best = (W - SCALING * B @ A).norm()

    def excess(iterations):
        A, B, subtracted = started(f"pissa_niter_{iterations}")
        assert subtracted and A.shape == (R, D_IN) and B.shape == (D_OUT, R)
        return ((W - SCALING * B @ A).norm() / best - 1).item()

    # An iteration shrinks what is left of smaller singular values by (sigma_7 / sigma_6)^4 = 1/16 in the square.
    assert 0 < excess(8) < 1e-6 < excess(1) < 1 and excess(2) < excess(1) / 4


def test_olora_is_the_start_of_the_qr_decomposition():
    W = weight()
    A, B, subtracted = started("olora")
    assert subtracted
    torch.testing.assert_close(B.t() @ B, torch.eye(R).double(), rtol=0, atol=1e-14)
    # B A is the projection of W on the span of its first r columns, so it has these columns themselves.
    torch.testing.assert_close((B @ A)[:, :R], W[:, :R], rtol=0, atol=1e-14)
    torch.testing.assert_close(B @ A, B @ (B.t() @ W), rtol=0, atol=1e-14)
    assert torch.equal(A.tril(-1), torch.zeros_like(A))  # rows of R


def test_orthogonal_starts_with_a_product_of_zero_and_neither_factor_zero():
    A, B, subtracted = started("orthogonal")
    assert not subtracted and A.shape == (R, D_IN) and B.shape == (D_OUT, R)
    assert torch.linalg.matrix_rank(A.float()) == torch.linalg.matrix_rank(B.float()) == R // 2  # computed in float32
    assert (B @ A).abs().max() < 1e-7 * B.norm() * A.norm()
    torch.manual_seed(0)
    A, B, _ = start("orthogonal", torch.empty(0), (4000, 3000), 4, 1.0, None)
    # Rows of A are sums of 2 normal values times entries of an orthogonal matrix, over 10: variance 1/100 on average.
    assert A.square().mean().sqrt() == pytest.approx(0.1 * math.sqrt(0.5), rel=0.03)
    assert B.square().mean().sqrt() == pytest.approx(0.1 * math.sqrt(0.5), rel=0.03)


def test_gaussian_has_the_deviation_one_over_r():
    W = torch.empty(30, 4000)
    A, B, subtracted = started("gaussian", W, r=8)
    assert not subtracted and not B.any() and A.shape == (8, 4000)
    # 32,000 values: the standard error of the deviation is 0.4 %, of the mean 0.0056 of a deviation.
    assert A.std().item() == pytest.approx(1 / 8, rel=0.02) and abs(A.mean().item()) < 4 * 0.0056 / 8
    # Normal, and not uniform of that deviation, which reaches no further than 1.73 of it.
    assert (A.abs() > 2 / 8).double().mean().item() == pytest.approx(0.0455, abs=0.006)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_an_embedding_starts_with_a_zero_and_b_standard_normal(init):
    A, B, subtracted = started(init, torch.empty(3000, 5), r=4, zero_A=True)
    assert not subtracted and not A.any()
    assert B.std().item() == pytest.approx(1, rel=0.03) and abs(B.mean().item()) < 0.04


@pytest.mark.parametrize("zero_A", [False, True])
def test_false_starts_with_both_at_random(zero_A):
    A, B, subtracted = started(False, zero_A=zero_A)
    assert not subtracted and A.all() and B.all()
    assert A.abs().max() <= D_IN**-0.5 and B.abs().max() <= R**-0.5


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_a_start_from_nothing_does_not_make_the_weight(init):
    def refuse():
        raise AssertionError("a dense copy of the weight costs memory")

    start(init, torch.empty(0), (D_IN, D_OUT), R, SCALING, refuse)


# --- on a model -------------------------------------------------------------------------------------------------------


BASES = {
    "float32": lambda: tiny.classifier(),
    "bfloat16": lambda: tiny.classifier(torch.bfloat16),
    "nf4": lambda: packed(),
}


def packed():
    model = tiny.classifier()
    quantize_nf4(model)
    return model


SETTINGS = [
    {},
    {"use_rslora": True, "lora_alpha": 3},
    {"rank_pattern": {"v": 3, r"layers\.1\.q": 64}, "alpha_pattern": {r"layers\.0\..*": 5}},
    {"rank_pattern": {"v": 3}, "alpha_pattern": {r"layers\.0\..*": 5}, "use_rslora": True, "use_dora": True},
]


def adapted(base, init, **settings):
    model = BASES[base]().eval()
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q", "v"], "init_lora_weights": init, **settings}))
    return model


def outputs(model):
    x = X.to(model.norm.weight.dtype)
    with torch.no_grad():
        return model(x)


def train(model, steps=3):
    """A few steps, with a rate that moves A and B by about as much as they are."""
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X.to(model.norm.weight.dtype)).float().square().sum().backward()
        optimizer.step()
    return model


#: Of the largest output: sums of 64 float32 terms through two blocks, and 16-bit ones, which round each value to 2^-8.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2, "nf4": 2e-5}


@pytest.mark.parametrize("init", FROM_THE_WEIGHT)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_it_computes_what_the_base_does_at_the_start_and_leaves_the_base_alone(base, settings, init):
    plain = BASES[base]().eval()
    expected, before = outputs(plain), tiny.snapshot(plain)["state"]
    model = adapted(base, init, **settings)
    start_values = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    assert all(p.any() for p in start_values.values())
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=TOLERANCE[base] * expected.abs().max().item())
    train(model)
    assert (outputs(model) - expected).abs().max() > 0.1 * expected.abs().max()
    with disable_adapters(model):
        assert torch.equal(outputs(model), expected)
    for name, p in model.named_parameters():  # what it started from stays what it was
        if "lora" in name:
            assert torch.equal(p, start_values[name]) == ("lora_A0" in name or "lora_B0" in name), name
    unload(model)
    assert tiny.snapshot(model)["state"] == before


@pytest.mark.parametrize("init", FROM_THE_WEIGHT)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_trained_saved_and_loaded_onto_an_untouched_base_it_computes_the_same(base, settings, init, tmp_path):
    model = train(adapted(base, init, **settings))
    expected = outputs(model)
    save_adapter(model, tmp_path)
    loaded = BASES[base]().eval()
    load_adapter(loaded, tmp_path)
    # The same sums: the start is subtracted there too, as half of the rank.
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=TOLERANCE[base] / 10 * expected.abs().max().item())
    config, tensors, _ = read_adapter(tmp_path)
    assert config.init_lora_weights is True and config.r == 8
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            r = len(layer.lora_A["default"])
            assert tensors[f"base_model.model.{path}.lora_A.weight"].shape == (2 * r, 64)
            assert config.rank_for(path) == 2 * r
            assert config.scaling_for(path) == pytest.approx(layer.lora_scaling["default"], rel=1e-12)
    if base == "float32":
        merge_and_unload(model)
        merge_and_unload(loaded)
        for a, b in (outputs(model), expected), (outputs(loaded), expected):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[base] * expected.abs().max().item())


@pytest.mark.parametrize("init", FROM_THE_WEIGHT)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_computes_the_same_from_its_file(settings, init, tmp_path):
    peft = pytest.importorskip("peft")
    model = train(adapted("float32", init, **settings))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(BASES["float32"]().eval(), tmp_path).eval()
    with torch.no_grad():
        expected = outputs(model)
        torch.testing.assert_close(theirs(X), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("architecture", ["gpt2", "convnet", "vit"])
@pytest.mark.parametrize("init", FROM_THE_WEIGHT)
def test_convolutions_embeddings_and_conv1d_can_start_from_their_weights(architecture, init, tmp_path):
    """peft can't on these kinds; of the files it reads plain LoRA."""
    peft = pytest.importorskip("peft")
    model = tiny.build(architecture)
    plain = tiny.logits(model)
    targets = {*tiny.projections(architecture), tiny.EMBEDDINGS.get(architecture, tiny.projections(architecture)[0])}
    inject(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=init))
    torch.testing.assert_close(tiny.logits(model), plain, rtol=0, atol=2e-5 * plain.abs().max().item())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = tiny.logits(model)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path).eval()
    torch.testing.assert_close(tiny.logits(theirs), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_two_starts_of_one_weight_are_both_whole():
    """As the base is not changed, the second adapter starts from W, and not from what the first left of it."""
    model = adapted("float32", "pissa")
    inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"], init_lora_weights="pissa"), "second")
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        assert torch.equal(layer.lora_A["default"], layer.lora_A["second"])
    plain = outputs(BASES["float32"]().eval())
    for names in ("second", ["default", "second"]):
        set_adapter(model, names)
        torch.testing.assert_close(outputs(model), plain, rtol=0, atol=2e-5 * plain.abs().max().item())


@pytest.mark.parametrize("init", ["pissa", True])
def test_a_file_is_not_loaded_into_an_adapter_that_subtracts_its_start(init, tmp_path):
    """Its own file holds the start too, which would be subtracted twice; from another of its rank it would be, wrongly."""
    save_adapter(adapted("float32", init), tmp_path)
    model = adapted("float32", "pissa")
    before = tiny.snapshot(model)
    with pytest.raises(AdapterNameError, match="'default'"):
        load_adapter(model, tmp_path)
    assert tiny.snapshot(model) == before
    load_adapter(model, tmp_path, "another")


@pytest.mark.parametrize("init", FROM_THE_WEIGHT)
def test_a_resumed_checkpoint_of_the_model_keeps_the_start(init):
    """state_dict holds what is subtracted: another machine, or another seed, would start from other digits."""
    model = train(adapted("float32", init))
    again = adapted("float32", init)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("init", FROM_THE_WEIGHT)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
def test_the_largest_rank_takes_the_whole_weight(shape, init):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape))
    W = model[0].weight.detach().clone()
    inject(model, LoraConfig(r=5, lora_alpha=10, target_modules=["0"], init_lora_weights=init))
    layer = model[0]
    product = 2.0 * layer.lora_B["default"] @ layer.lora_A["default"]
    torch.testing.assert_close(product if init != "olora" else product / 2, W, rtol=0, atol=1e-5)
