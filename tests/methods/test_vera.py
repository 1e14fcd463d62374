"""VeRA against its equation, worked out slowly in float64, and against PEFT, with files both ways."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_core import (
    LoraConfig,
    VeraConfig,
    base_weight_bytes,
    combine_adapters,
    convert_adapter,
    count_parameters,
    disable_adapters,
    inject,
    load_adapter,
    lora_plus_groups,
    merge_adapter,
    merge_and_unload,
    merge_checkpoint,
    mixed_batch,
    quantize_int8,
    quantize_nf4,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.errors import ConfigError, FileFormatError, TargetError, WrongBaseError
from lora_core.model.registry import find_adapter
from tests.support import tiny

TARGETS = {"llama": ["q_proj", "gate_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"]}
SETTINGS = {"r": 6, "d_initial": 0.3, "projection_prng_key": 5}


def randomized(model, name="default", seed=0):
    """Any values for what is trained: tiny.randomize moves A and B, and VeRA has none to train."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if path.endswith(f".{name}") and "lambda" in path:
            parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(architecture="llama", quantize=None, name="default", **settings):
    model = tiny.build(architecture).eval()
    if quantize:
        quantize(model)
    inject(model, VeraConfig(target_modules=TARGETS[architecture], **SETTINGS | settings), name)
    return randomized(model, name)


def theirs(architecture="llama", **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            tiny.build(architecture), peft.VeraConfig(target_modules=TARGETS[architecture], **SETTINGS | settings)
        )
    return model.eval()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_layer_computes_the_equation_and_its_gradients(dropout):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(10, 6), "b": torch.nn.Linear(4, 9)})
    inject(model, VeraConfig(r=3, target_modules=["a", "b"], vera_dropout=dropout))
    randomized(model).eval()
    A, B = model["a"].vera_A["default"], model["a"].vera_B["default"]
    assert A.shape == (3, 10) and B.shape == (9, 3) and model["b"].vera_A["default"] is A
    for layer in model.values():
        x = torch.randn(5, layer.in_features, requires_grad=True)
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        d, b = (getattr(layer, f"vera_lambda_{v}")["default"].detach().double().requires_grad_() for v in "db")
        X, W, c = x.detach().double().requires_grad_(), layer.weight.double(), layer.bias.double()
        h = [sum(A[i, j].double() * X[:, j] for j in range(layer.in_features)) * d[i] for i in range(3)]
        Y = torch.stack([sum(B[o, i].double() * h[i] for i in range(3)) * b[o] for o in range(layer.out_features)], 1)
        Y = Y + X @ W.t() + c
        Y.backward(dy.double())
        tolerance = {"rtol": 0, "atol": 1e-5}  # sums of at most 30 terms of size 1
        torch.testing.assert_close(y.double(), Y.detach(), **tolerance)
        torch.testing.assert_close(x.grad.double(), X.grad, **tolerance)
        for table, leaf in (("vera_lambda_d", d), ("vera_lambda_b", b)):
            torch.testing.assert_close(getattr(layer, table)["default"].grad.double(), leaf.grad, **tolerance)
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {"vera_lambda_d", "vera_lambda_b"}


def test_dropout_zeroes_inputs_of_the_adapter_alone():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(10, 6)})
    inject(model, VeraConfig(r=3, target_modules=["a"], vera_dropout=0.5))
    randomized(model).train()
    layer, x = model["a"], torch.eye(10)
    update = layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
    full = layer.eval()(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
    kept = update.abs().sum(1) > 1e-6
    assert 0 < kept.sum() < 10  # one input a row: the whole row is dropped, or doubled
    torch.testing.assert_close(update[kept], 2 * full[kept], rtol=0, atol=0.05)  # the probability is rounded to 8 bits


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("saved", [True, False], ids=["projections", "seed alone"])
@pytest.mark.filterwarnings("ignore")
def test_files_go_to_peft_and_back(architecture, saved, tmp_path):
    ours = adapted(architecture, save_projection=saved)
    save_adapter(ours, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path / "ours").eval()
    expected = tiny.logits(ours)
    bound = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(tiny.logits(model), expected, **bound)
    assert (expected - tiny.logits(tiny.build(architecture).eval())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "theirs")
    again = tiny.build(architecture).eval()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(tiny.logits(again), expected, **bound)


@pytest.mark.filterwarnings("ignore")
def test_a_fresh_adapter_is_pefts_to_the_bit_and_changes_nothing():
    ours, other = tiny.build("llama"), theirs()
    inject(ours, VeraConfig(target_modules=TARGETS["llama"], **SETTINGS))
    layer = ours.model.layers[0].mlp.down_proj
    assert torch.equal(layer.vera_A["default"], other.base_model.vera_A["default"])
    assert torch.equal(layer.vera_B["default"], other.base_model.vera_B["default"])
    assert torch.equal(tiny.logits(ours.eval()), tiny.logits(tiny.build("llama").eval()))
    trained, _ = other.get_nb_trainable_parameters()
    assert count_parameters(ours).trainable == trained


@pytest.mark.parametrize("quantize", [None, quantize_nf4, quantize_int8], ids=["dense", "nf4", "int8"])
def test_merging_both_ways_and_unloading(quantize):
    model = adapted(quantize=quantize)
    expected, state = tiny.logits(model), copy.deepcopy(model.state_dict())
    bound = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    merge_adapter(model)
    torch.testing.assert_close(tiny.logits(model), expected, **bound)
    unmerge_adapter(model)
    assert torch.equal(tiny.logits(model), expected)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    base = tiny.build("llama").eval()
    if quantize:
        quantize(base)
    with disable_adapters(model):
        assert torch.equal(tiny.logits(model), tiny.logits(base))
    other = copy.deepcopy(model)
    assert torch.equal(tiny.logits(unload(other)), tiny.logits(base))
    assert other.state_dict().keys() == base.state_dict().keys()
    merge_and_unload(model)
    torch.testing.assert_close(tiny.logits(model), expected, **bound)
    assert not any("vera" in name for name in model.state_dict())


def test_beside_lora_and_another_of_its_kind():
    model = adapted(name="a")
    inject(model, VeraConfig(target_modules=TARGETS["llama"], **SETTINGS | {"r": 9, "projection_prng_key": 7}), "b")
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]), "c")
    randomized(model, "b", seed=1)
    tiny.randomize(model, "c", seed=2)
    base, each = tiny.logits(tiny.build("llama").eval()), {}
    for name in "abc":
        set_adapter(model, name)
        each[name] = tiny.logits(model)
        assert (each[name] - base).abs().max() > 1e-3
    set_adapter(model, ["a", "c"])
    both = tiny.logits(model)
    merged = copy.deepcopy(model)
    merge_and_unload(merged)
    torch.testing.assert_close(tiny.logits(merged), both, rtol=0, atol=1e-5 * both.abs().max().item())
    rows = ["a", None, "c"]
    tokens = tiny.TOKENS[:3]
    with torch.no_grad(), mixed_batch(model, rows):
        found = model(input_ids=tokens).logits
    for i, name in enumerate(rows):
        set_adapter(model, [name] if name else [])
        with torch.no_grad():
            expected = model(input_ids=tokens).logits[i]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-5 * both.abs().max().item())
    with pytest.raises(ConfigError, match="VeRA"):
        combine_adapters(model, ["a", "b"], [1, 1], "d")
    set_adapter(model, "a")
    with pytest.raises(ConfigError, match="lora_plus_groups is for adapters with A and B of their own, and VeRA has none"):
        lora_plus_groups(model, 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_over_files_it_merges_to_the_adapted_model_and_becomes_plain_lora(architecture, tmp_path):
    tiny.build(architecture).save_pretrained(tmp_path / "base")
    model = adapted(architecture)
    save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = tiny.logits(model)
    bound = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(tiny.logits(found), expected, **bound)
    with pytest.raises(ConfigError, match="only the base says how wide each is; name it with --base"):
        convert_adapter(tmp_path / "adapter", tmp_path / "plain", plain=True)
    report = convert_adapter(tmp_path / "adapter", tmp_path / "plain", plain=True, base=tmp_path / "base")
    assert min(report.energy.values()) == pytest.approx(1, abs=1e-5)
    plain = tiny.build(architecture).eval()
    load_adapter(plain, tmp_path / "plain")
    torch.testing.assert_close(tiny.logits(plain), expected, **bound)
    assert type(find_adapter(plain, "default").config) is LoraConfig


def test_a_file_without_projections_is_not_merged_over_files(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    save_adapter(adapted(save_projection=False), tmp_path / "adapter")
    with pytest.raises(FileFormatError, match="no vera_A and vera_B, which the layers share; load it onto its model"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_for_another_base_or_seed_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    other = tiny.build("llama")
    other.model.layers[0].self_attn.q_proj.weight.data += 1
    with pytest.raises(WrongBaseError):
        load_adapter(other, tmp_path)


def test_the_base_weighs_what_it_did():
    assert base_weight_bytes(adapted()) == base_weight_bytes(tiny.build("llama"))


def test_training_moves_the_vectors_alone():
    model = adapted()
    optimizer = torch.optim.SGD(trainable_parameters(model), 0.1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
    optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name in before if "vera_lambda" in name}


def test_transformers_saves_the_adapted_model_as_a_checkpoint(tmp_path):
    """As the class's own method does, and `strict=False` reads it again: what layers share is in the file once."""
    model, other = adapted(), tiny.build("llama").eval()
    type(model).save_pretrained(model, tmp_path)
    inject(other, VeraConfig(target_modules=TARGETS["llama"], **SETTINGS | {"projection_prng_key": 9}))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(tiny.logits(other), tiny.logits(model))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lora_alpha": 16}, ConfigError, "VeraConfig has no lora_alpha"),
        ({"use_dora": True}, ConfigError, "VeraConfig has no use_dora"),
        ({"bias": "lora_only"}, ConfigError, "bias must be 'none' or 'all'"),
        ({"projection_prng_key": -1}, ConfigError, "projection_prng_key must be"),
        ({"d_initial": float("nan")}, ConfigError, "d_initial must be a finite number"),
        ({"vera_dropout": 1.5}, ConfigError, "lora_dropout must be a probability"),
        ({"rank": 3}, ConfigError, "VeraConfig has no field 'rank'"),
        ({"target_modules": ["embed_tokens"]}, TargetError, "no linear layer, and VeRA is for those"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        inject(tiny.build("llama"), VeraConfig(**{"target_modules": ["q_proj"]} | settings))
