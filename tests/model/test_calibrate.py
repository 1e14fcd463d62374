"""EVA and LoftQ against what they are defined by: exact eigenvectors of the inputs, and the exact SVD of the residual."""

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    count_parameters,
    initialize_eva,
    initialize_loftq,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    save_adapter,
)
from lora_core.errors import (
    AdapterNameError,
    ConfigError,
    LoraError,
    StateError,
)
from lora_core.model.registry import find_adapter
from tests.support import tiny


def batches(count=3, rows=40):
    """Inputs of the tiny classifier that vary more in some directions than in others."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)
    return [torch.randn(rows, 64, generator=generator) @ mix.t() for _ in range(count)]


def inputs_of(model, path):
    """What the layer at `path` of the plain model reads, over all batches, (tokens, d_in)."""
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    for batch in batches():
        model(batch)
    hook.remove()
    return torch.cat(seen)


def adapted(**settings):
    model = tiny.classifier()
    inject(model, LoraConfig(**{"r": 4, "target_modules": ["q", "v"], **settings}))
    return model


# --- EVA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}], ids=str)
def test_eva_takes_the_directions_of_the_inputs_and_changes_no_output(settings):
    model, plain = tiny.randomize(adapted(**settings)), tiny.classifier()
    model.train()
    report = initialize_eva(model, batches())
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    for path in find_adapter(model, "default").layers:
        x = inputs_of(plain, path) if path.startswith("layers.0") else None
        layer = model.get_submodule(path)
        A, B = layer.factors("default")
        assert not B.any() and A.shape == (4, 64)
        torch.testing.assert_close(A @ A.t(), torch.eye(4), rtol=0, atol=1e-5)  # orthonormal
        assert report.ranks[path] == 4
        if x is not None:  # the second layer's inputs passed the adapter as it was before
            _, S, Vt = torch.linalg.svd(x.double(), full_matrices=False)
            torch.testing.assert_close((A.double() @ Vt[:4].t()).abs(), torch.eye(4, dtype=torch.double), rtol=0, atol=1e-3)
            share = (S[:4].square().sum() / S.square().sum()).item()
            assert report.energy[path] == pytest.approx(share, rel=1e-4)
    x = tiny.batch()
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=1e-5)


def test_eva_minds_the_attention_mask():
    """Padding does not count: a batch with padded rows gives what its real tokens alone give."""
    tokens = tiny.TOKENS.clone()
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    padded, real = [{"input_ids": tokens, "attention_mask": mask}], [tokens[:1], tokens[1:2, :5], tokens[2:]]
    energies = []
    for batches in (padded, real):
        model = tiny.build("bert")
        inject(model, LoraConfig(r=4, target_modules=["query"]))
        energies.append(initialize_eva(model, batches).energy)
    assert energies[0] == pytest.approx(energies[1], rel=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_eva_moves_ranks_to_where_they_explain_most(use_rslora, tmp_path):
    settings = {"use_rslora": use_rslora, "lora_alpha": 7, "alpha_pattern": {r"1\.v": 3}}
    model = adapted(**settings)
    layers = {path: model.get_submodule(path) for path in find_adapter(model, "default").layers}
    scalings = {path: layer.lora_scaling["default"] for path, layer in layers.items()}
    trainable = count_parameters(model).trainable
    report = initialize_eva(model, batches(), rho=2.0)
    assert sum(report.ranks.values()) == 16 and len(set(report.ranks.values())) > 1
    assert all(1 <= r <= 8 for r in report.ranks.values())
    assert count_parameters(model).trainable == trainable  # all layers are 64 x 64
    for path, layer in layers.items():
        assert layer.lora_A["default"].shape == (report.ranks[path], 64)
        assert layer.lora_B["default"].shape == (64, report.ranks[path])
        assert layer.lora_scaling["default"] == pytest.approx(scalings[path])
    tiny.randomize(model)
    save_adapter(model, tmp_path)
    again = tiny.classifier()
    load_adapter(again, tmp_path)
    x = tiny.batch()
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("shape", ["tensor", "tuple", "mapping"])
def test_eva_calls_the_model_as_its_batches_are(shape):
    wrap = {"tensor": lambda x: x, "tuple": lambda x: (x,), "mapping": lambda x: {"x": x}}[shape]
    report = initialize_eva(adapted(), [wrap(x) for x in batches()])
    assert report == initialize_eva(adapted(), batches())


def test_eva_refusals():
    with pytest.raises(AdapterNameError):
        initialize_eva(tiny.classifier(), batches())
    model = adapted()
    before = tiny.snapshot(model)
    for settings, message in (({"rho": 0.5}, "rho"), ({"rho": float("nan")}, "rho")):
        with pytest.raises(ConfigError, match=message):
            initialize_eva(model, batches(), **settings)
    with pytest.raises(ConfigError, match=r"layers\.0\.q saw 2 input vectors"):
        initialize_eva(model, [torch.ones(2, 64)])
    with pytest.raises(ConfigError, match="more batches"):
        initialize_eva(model, [])
    for bad in (torch.zeros(9, 64), torch.full((9, 64), float("nan"))):
        with pytest.raises(ConfigError, match="all zero, or not finite"):
            initialize_eva(model, [bad])
    with mixed_batch(model.eval(), [None]), pytest.raises(StateError):
        initialize_eva(model, batches())
    model.train()
    assert tiny.snapshot(model) == before
    merge_adapter(model)
    with pytest.raises(StateError, match="unmerge_adapter"):
        initialize_eva(model, batches())
    narrow = nn.Sequential(nn.Linear(3, 8))
    inject(narrow, LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(ConfigError, match="vectors of 3 values, too few for a rank of 4"):
        initialize_eva(narrow, [torch.randn(9, 3)])
    embedding = nn.Sequential(nn.Embedding(9, 4))
    inject(embedding, LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(ConfigError, match="0 is a Embedding"):
        initialize_eva(embedding, [torch.tensor([1, 2])])


# --- LoftQ --------------------------------------------------------------------------------------------------------------


def quantized(r=8, width=128, **settings):
    """(a 4-bit model with an adapter, the dense one it was made from)."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(width, 256), nn.Tanh(), nn.Linear(256, width))
    model = nn.Sequential(nn.Linear(width, 256), nn.Tanh(), nn.Linear(256, width))
    model.load_state_dict(dense.state_dict())
    quantize_nf4(model)
    inject(model, LoraConfig(r=r, target_modules=["0", "2"], **settings))
    return model.eval(), dense.eval()


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 32, "use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("form", ["module", "tensors"])
def test_loftq_is_the_best_update_towards_the_dense_weight(settings, form):
    model, dense = quantized(**settings)
    packed = [model[i].weight.data.clone() for i in (0, 2)]
    report = initialize_loftq(model, dense if form == "module" else dict(dense.state_dict()))
    for i, before in zip((0, 2), packed, strict=True):
        layer, W = model[i], dense[i].weight.detach().double()
        assert torch.equal(layer.weight.data, before)  # the 4-bit weight itself is as everyone else has it
        Q = layer.dense_weight().double()
        S = torch.linalg.svdvals(W - Q)
        best = S[8:].square().sum().sqrt().item()
        error = (W - layer.folded_weight(["default"]).double()).norm().item()
        assert error == pytest.approx(best, rel=1e-3)
        assert report.energy[str(i)] == pytest.approx(1 - (best / (W - Q).norm().item()) ** 2, rel=1e-3)


def test_loftq_starts_nearer_to_the_dense_model_than_nf4():
    model, dense = quantized(r=32)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    want = dense(x)
    plain = (model(x) - want).norm()
    initialize_loftq(model, dense)
    assert (model(x) - want).norm() < 0.8 * plain  # rank 32 of 128 takes more than a fifth of the noise's norm away


def test_after_loftq_the_file_is_right_on_the_untouched_4_bit_base(tmp_path):
    model, dense = quantized()
    initialize_loftq(model, dense)
    save_adapter(model, tmp_path)
    again = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128)).eval()
    again.load_state_dict(dense.state_dict())
    quantize_nf4(again)
    load_adapter(again, tmp_path)
    x = torch.randn(5, 128)
    assert torch.equal(again(x), model(x))
    y = model(x)
    merge_and_unload(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)


def test_loftq_refusals():
    model, dense = quantized()
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}
    with pytest.raises(StateError, match=r"no '2\.weight'"):
        initialize_loftq(model, {"0.weight": dense[0].weight})
    with pytest.raises(StateError, match=r"'0\.weight' is \(3, 3\), not \(256, 128\)"):
        initialize_loftq(model, dict(dense.state_dict()) | {"0.weight": torch.ones(3, 3)})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "lora" in k)
    merge_adapter(model)
    with pytest.raises(StateError, match="unmerge_adapter"):
        initialize_loftq(model, dense)
    with pytest.raises(StateError, match="on no quantised layer"):
        initialize_loftq(adapted(), tiny.classifier())
    subtracting, dense = quantized(init_lora_weights="olora")
    with pytest.raises(LoraError, match="init_lora_weights=True"):
        initialize_loftq(subtracting, dense)
