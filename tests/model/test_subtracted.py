"""CorDA and LoRA-GA on models: they change no output and no base, train, and go into files as plain LoRA."""

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    VeraConfig,
    disable_adapters,
    initialize_corda,
    initialize_eva,
    initialize_loftq,
    initialize_lora_ga,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    save_adapter,
    trainable_parameters,
    unload,
)
from lora_core.bases import dense_weight
from lora_core.errors import AdapterNameError, ConfigError, LoraError, StateError
from lora_core.files.adapter import read_adapter
from lora_core.layers import LoraLayer
from lora_core.model.registry import find_adapter
from lora_core.model.watch import weight_gradients
from tests.support import tiny

X = tiny.batch()


def batches(count=3, rows=40):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 64, generator=generator) for _ in range(count)]


def error(output, batch):
    return (output - batch[:, : output.shape[1]]).square().mean()


STARTS = {
    "corda ipm": lambda model, **more: initialize_corda(model, batches(), **more),
    "corda kpm": lambda model, **more: initialize_corda(model, batches(), mode="kpm", **more),
    "lora_ga": lambda model, **more: initialize_lora_ga(model, batches(), loss=error, **more),
    "lora_ga peft": lambda model, **more: initialize_lora_ga(model, batches(), loss=error, scale="peft", **more),
}
SETTINGS = [
    {},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"v": 3}, "alpha_pattern": {r"layers\.0\..*": 5}},
]


def packed():
    model = tiny.classifier()
    quantize_nf4(model)
    return model


BASES = {"float32": tiny.classifier, "bfloat16": lambda: tiny.classifier(torch.bfloat16), "nf4": packed}
#: Of the largest output, as in test_initializers.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2, "nf4": 2e-5}


def adapted(base="float32", **settings):
    model = BASES[base]().eval()
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q", "v"], **settings}))
    return model


def outputs(model):
    with torch.no_grad():
        return model(X.to(model.norm.weight.dtype))


def train(model, steps=3):
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X.to(model.norm.weight.dtype)).float().square().sum().backward()
        optimizer.step()
    return model


def run(start, model, base):
    """The start of this name, on inputs of the base's dtype."""
    if base == "bfloat16":
        given = [x.bfloat16() for x in batches()]
        if start.startswith("corda"):
            return initialize_corda(model, given, mode=start.split(" ")[1])
        return initialize_lora_ga(model, given, loss=error, scale="peft" if "peft" in start else "stable")
    return STARTS[start](model)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_it_changes_no_output_and_no_base_and_its_file_is_plain(base, settings, start, tmp_path):
    plain = BASES[base]().eval()
    expected, before = outputs(plain), tiny.snapshot(plain)["state"]
    model = adapted(base, **settings)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    report = run(start, model, base)
    assert model.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    now = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags.items() <= now.items() and all(p.grad is None for p in model.parameters())
    assert "on 4 layers" in str(report) and all(0 < share < 1 for share in report.energy.values())
    model.eval()
    tolerance = TOLERANCE[base] * expected.abs().max().item()
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=tolerance)
    train(model)
    trained = outputs(model)
    assert (trained - expected).abs().max() > 0.1 * expected.abs().max()
    with disable_adapters(model):
        assert torch.equal(outputs(model), expected)

    save_adapter(model, tmp_path)
    config = read_adapter(tmp_path).config
    assert config.init_lora_weights is True and config.r == 8
    again = BASES[base]().eval()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(outputs(again), trained, rtol=0, atol=tolerance)
    if base == "float32":
        merge_and_unload(again)
        torch.testing.assert_close(outputs(again), trained, rtol=0, atol=tolerance)
    unload(model)
    assert tiny.snapshot(model)["state"] == before


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_the_gradients_are_those_of_the_weights(base):
    """Of a packed base, those of the dense one with its values."""
    model, dense = adapted(base), tiny.classifier().eval()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}
    for path, layer in layers.items():
        dense.get_submodule(path).weight.data = layer.dense_weight()
    for path, module in dense.named_modules():
        if isinstance(module, nn.Linear) and path not in layers and base == "nf4":
            module.weight.data = dense_weight(model.get_submodule(path))
    gradients = weight_gradients(model, layers, batches(), error)
    sum(error(dense(x), x) for x in batches()).div(3).backward()
    for path, G in gradients.items():
        expected = dense.get_submodule(path).weight.grad
        torch.testing.assert_close(G, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_gradients_that_the_model_had_stay_theirs():
    model = adapted()
    model(X).sum().backward()
    before = [(p, p.grad, p.grad.clone()) for p in trainable_parameters(model)]
    initialize_lora_ga(model, batches(), loss=error)
    assert all(p.grad is grad and torch.equal(grad, values) for p, grad, values in before)


def test_the_loss_is_the_model_s_own_if_none_is_given():
    model = tiny.build("llama")
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids = torch.arange(5, 85).view(4, 20)
    expected = tiny.logits(model)
    report = initialize_lora_ga(model, [{"input_ids": ids, "labels": ids}])
    assert set(report.ranks.values()) == {4}
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=1e-5)


def test_a_second_start_is_from_the_base_again_and_another_start_ends_it():
    model = adapted()
    STARTS["corda ipm"](model)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    STARTS["corda ipm"](model)
    for name, p in model.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(p, first[name], rtol=0, atol=1e-5)
    assert find_adapter(model, "default").config.init_lora_weights == "corda"
    initialize_eva(model, batches())
    assert find_adapter(model, "default").config.init_lora_weights is True
    assert not any("lora_A0" in name for name, _ in model.named_parameters())
    STARTS["lora_ga"](model)
    with pytest.raises(LoraError, match="quantised"):
        initialize_loftq(model, tiny.classifier())


def test_padding_does_not_count_in_corda():
    """A batch with padded rows gives what its real tokens alone give."""
    tokens = tiny.TOKENS.clone()
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    padded, real = [{"input_ids": tokens, "attention_mask": mask}], [tokens[:1], tokens[1:2, :5], tokens[2:]]
    energies = []
    for given in (padded, real):
        model = tiny.build("bert")
        inject(model, LoraConfig(r=4, target_modules=["query"]))
        energies.append(initialize_corda(model, given).energy)
    assert energies[0] == pytest.approx(energies[1], rel=1e-5)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "eva", "loftq"])
def test_inject_says_which_verb_starts_so(init):
    model = tiny.classifier()
    before = tiny.snapshot(model)
    with pytest.raises(ConfigError, match=rf"'{init}' needs more than the model: leave it True, then initialize_{init}\("):
        inject(model, LoraConfig(r=4, target_modules=["q"], init_lora_weights=init))
    assert tiny.snapshot(model) == before


def test_refusals():
    for start in STARTS.values():
        with pytest.raises(AdapterNameError):
            start(tiny.classifier())
    model = adapted()
    before = tiny.snapshot(model)
    for call, message in (
        (lambda: initialize_corda(model, batches(), mode="IPM"), "mode must be 'ipm' or 'kpm', not 'IPM'"),
        (lambda: initialize_lora_ga(model, batches(), scale="gd"), "scale must be 'stable' or 'peft'"),
        (lambda: initialize_lora_ga(model, batches(), gamma=0), "gamma must be a positive number"),
        (lambda: initialize_lora_ga(model, batches(), gamma=float("nan")), "gamma must be a positive number"),
        (lambda: initialize_corda(model, []), "saw no input vectors; pass batches"),
        (lambda: initialize_lora_ga(model, [], loss=error), "there are no batches"),
        (lambda: initialize_corda(model, [torch.zeros(9, 64)]), "all zero, or not finite"),
        (lambda: initialize_corda(model, [torch.full((9, 64), float("nan"))]), "all zero, or not finite"),
        (lambda: initialize_lora_ga(model, batches()), r"the loss must be one number.*a tensor of \(40, .*pass batches with"),
        (lambda: initialize_lora_ga(model, batches(), loss=lambda y, _: 3.0), "not a float"),
        (lambda: initialize_lora_ga(model, batches(), loss=lambda y, x: x.sum()), r"depends on the adapted layers"),
        (lambda: initialize_lora_ga(model, batches(), loss=lambda y, _: y.sum() * float("inf")), "the loss is"),
        (lambda: initialize_lora_ga(model, batches(), loss=lambda y, _: y.sum() * 0), "is zero, or not finite"),
        (lambda: initialize_lora_ga(model, batches(1, 7), loss=error), r"layers\.0\.q: its gradient has 7 directions"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
        assert tiny.snapshot(model) == before
    with mixed_batch(model.eval(), [None]), pytest.raises(StateError):
        STARTS["lora_ga"](model)
    merge_adapter(model)
    for start in STARTS.values():
        with pytest.raises(StateError, match="unmerge_adapter"):
            start(model)


def test_layers_that_they_are_not_for():
    narrow = nn.Sequential(nn.Linear(9, 7))
    inject(narrow, LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(ConfigError, match="LoRA-GA needs a rank of at most 3 on 0, not 4"):
        initialize_lora_ga(narrow, [torch.randn(9, 9)], loss=error)
    inject(narrow, LoraConfig(r=8, target_modules=["0"]), "wide")
    with pytest.raises(ConfigError, match="CorDA needs a rank of at most 7 on 0, not 8"):
        initialize_corda(narrow, [torch.randn(9, 9)], "wide")
    embedding = nn.Sequential(nn.Embedding(9, 4))
    inject(embedding, LoraConfig(target_modules=["0"], r=2))
    for start in (initialize_corda, initialize_lora_ga):
        with pytest.raises(ConfigError, match="is for linear layers, and 0 is a Embedding"):
            start(embedding, [torch.tensor([1, 2])])
    model = tiny.build("llama")
    inject(model, VeraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="VeRA has none"):
        initialize_corda(model, [tiny.inputs(model)])
