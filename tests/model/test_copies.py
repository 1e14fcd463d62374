"""Heads and other modules trained whole: where their tensors are, in the state dict too, and how they train beside 16 bits."""

import copy
import io
import pickle

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_core import (
    LoraConfig,
    count_parameters,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge_and_unload,
    mixed_batch,
    rename_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
)
from lora_core.deploy.recipe import Recipe
from lora_core.deploy.stream import merge_checkpoint
from lora_core.errors import StateError, TargetError
from lora_core.model.copies import original_of
from lora_core.model.registry import copies_of
from tests.support import tiny

X = tiny.batch()
HEAD = {"r": 2, "target_modules": ["q"], "modules_to_save": ["classifier"]}


def build(active="a"):
    model = tiny.classifier()
    for i, name in enumerate("ab"):
        inject(model, LoraConfig(**HEAD), name)
        tiny.randomize(model, name, seed=i)
    set_adapter(model, active)
    return model


def outputs(model):
    """{adapter: what the model gives with it}, and that of the base."""
    found = {}
    for name in "ab":
        set_adapter(model, name)
        found[name] = model(X).detach()
    with disable_adapters(model):
        found["base"] = model(X).detach()
    return found


# --- state dicts --------------------------------------------------------------------------------------------------------


def test_every_tensor_is_in_the_state_dict_once():
    state = build().state_dict()
    for key in ("classifier.weight", "classifier.lora_copies.b.weight", "classifier.lora_copies.@base.weight"):
        assert key in state
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    assert set(tiny.classifier().state_dict()) <= set(state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("then", ["a", "b"], ids="written with {} active".format)
@pytest.mark.parametrize("now", ["a", "b"], ids="read with {} active".format)
def test_a_state_dict_brings_every_head_back(then, now, assign):
    written = build(then)
    with torch.no_grad():
        for p in written.parameters():
            p.add_(0.01)  # the base's own head too
    expected, other = outputs(written), build(now)
    set_adapter(written, then)
    state = copy.deepcopy(written.state_dict())
    assert other.load_state_dict(state, strict=True, assign=assign) is not None
    found = outputs(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_dict_written_while_disabled():
    model, other = build(), build()
    with torch.no_grad():
        for p in copies_of(model, "b").values():
            p.add_(1)
    with disable_adapters(model):
        state = model.state_dict()
    other.load_state_dict(state)
    assert all(torch.equal(value, outputs(model)[name]) for name, value in outputs(other).items())


def test_a_state_dict_of_the_base_alone_lacks_the_copies_by_name():
    missing, unexpected = build().load_state_dict(tiny.classifier().state_dict(), strict=False)
    assert "classifier.lora_copies.@base.weight" in missing and not unexpected


def test_what_stands_in_place_is_the_active_adapters():
    """`load_state_dict(assign=True)` and a new head put other parameters there: switching keeps them, and the optimiser's."""
    model = build()
    new = nn.Parameter(torch.ones_like(model.classifier.weight))
    model.classifier.weight = new
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    output = model(X)
    with disable_adapters(model):
        assert torch.equal(model.classifier.weight, tiny.classifier().classifier.weight)
    assert model.classifier.weight is new and torch.equal(model(X), output)
    held = {id(p) for p in model.parameters()}
    assert all(id(p) in held for group in optimizer.param_groups for p in group["params"])
    set_adapter(model, "b")
    set_adapter(model, "a")
    assert model.classifier.weight is new


def test_a_module_that_was_replaced_is_named():
    model = build()
    model.classifier = nn.Linear(64, 3)
    head, before = model.classifier, model(X)
    with pytest.raises(TargetError, match=r"module of 'classifier.weight' was replaced.*delete the adapters, which leaves it"):
        set_adapter(model, "b")
    assert torch.equal(model(X), before)
    assert delete_adapter(model, "a") == () and model.classifier is head
    unload(model)
    assert model.classifier is head and type(model.layers[0].q) is nn.Linear


def test_moving_and_casting_reach_what_waits():
    model = build().double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(value.dtype == torch.float64 for value in outputs_of(model, X.double()).values())


def outputs_of(model, x):
    found = {}
    for name in "ab":
        set_adapter(model, name)
        found[name] = model(x)
    return found


def test_a_copy_of_the_model_is_independent():
    model = build()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = outputs(model)
        assert all(torch.equal(value, expected[name]) for name, value in outputs(other).items())
        state = other.state_dict()
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        other.load_state_dict(state)
        unload(other)
        assert tiny.snapshot(other)["hooks"] == tiny.snapshot(tiny.classifier())["hooks"]
        set_adapter(model, "a")
        assert torch.equal(model(X), expected["a"])


def test_nothing_is_left_after_unloading():
    base = tiny.classifier()
    before, hooks = tiny.snapshot(base), len(base.classifier._load_state_dict_pre_hooks)
    for name in "ab":
        inject(base, LoraConfig(**HEAD), name)
    rename_adapter(base, "a", "c")
    assert "classifier.lora_copies.c.weight" not in base.state_dict()  # active: in place
    set_adapter(base, "b")
    assert "classifier.lora_copies.c.weight" in base.state_dict()
    delete_adapter(base, "c")
    assert not [key for key in base.state_dict() if ".c." in key]
    unload(base)
    assert tiny.snapshot(base) == before and len(base.classifier._load_state_dict_pre_hooks) == hooks


def test_a_recurrent_head_computes_with_the_trained_copy():
    """`nn.LSTM` keeps a list of its parameters, which must be the ones in place."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.LSTM(4, 3)})
    inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    x = torch.randn(5, 2, 4)
    before = model["head"](x)[0].detach()
    with torch.no_grad():
        for p in copies_of(model, "default").values():
            p.add_(0.1)
    y = model["head"](x)[0]
    assert not torch.allclose(y, before)
    y.sum().backward()
    assert all(p.grad is not None for p in copies_of(model, "default").values())
    with disable_adapters(model):
        assert torch.equal(model["head"](x)[0], before)


# --- beside 16 bits -----------------------------------------------------------------------------------------------------

LLAMA = {**tiny.SMALL, "num_labels": 4, "pad_token_id": 0}
SIXTEEN = [torch.float16, torch.bfloat16]


def sequence_classifier(dtype):
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA)).to(dtype)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("settings", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["embed_tokens", "norm"]}])
def test_what_is_trained_whole_is_float32_and_gives_what_the_base_gives(dtype, settings):
    model, base = sequence_classifier(dtype), sequence_classifier(dtype)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    found, expected = model(input_ids=tiny.TOKENS).logits, base(input_ids=tiny.TOKENS).logits
    assert found.dtype == expected.dtype == dtype
    assert (found - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()  # rounded elsewhere
    with disable_adapters(model):
        assert torch.equal(model(input_ids=tiny.TOKENS).logits, expected)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_head_computes_in_float32_between_16_bits(dtype):
    model = sequence_classifier(dtype)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    tiny.randomize(model)
    head, x = model.score, torch.randn(6, 32).to(dtype).requires_grad_()
    dy = torch.randn(6, 4).to(dtype)
    assert head.weight.dtype == torch.float32
    y = head(x)
    y.backward(dy)
    W = head.weight.detach().double().requires_grad_()
    expected = x.detach().double() @ W.t()
    expected.backward(dy.double())
    assert y.dtype == x.grad.dtype == dtype and head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected.detach(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), W.grad, rtol=0, atol=1e-5 * W.grad.abs().max().item())  # 6 terms


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_whole_modules_under_autocast_and_inside_each_other(dtype):
    model = sequence_classifier(dtype)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "score"]), "a")
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm", "score"]), "b")
    for name in ("a", "b"):
        set_adapter(model, name)
        with torch.autocast("cpu", dtype):
            loss = model(input_ids=tiny.TOKENS, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        assert all(p.grad is not None for p in trainable_parameters(model))
    nested = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))}).to(dtype)
    inject(nested, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]), "a")
    inject(nested, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head.1"]), "b")
    for name in ("a", "b", "a"):
        set_adapter(nested, name)
        assert nested["head"](torch.randn(3, 4).to(dtype)).dtype == dtype
    unload(nested)
    assert type(nested["head"]) is nn.Sequential and type(nested["head"][1]) is nn.Linear


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_small_steps_are_not_lost(dtype):
    """AdamW moves each value by about its learning rate, which is far below the spacing of 16-bit values of size 0.1."""
    model = sequence_classifier(dtype)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-5, weight_decay=0)
    before = model.score._parameters["weight"].detach().clone()
    for _ in range(4):
        model(input_ids=tiny.TOKENS, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model.score._parameters["weight"] - before).abs()
    assert torch.isfinite(moved).all() and (moved > 0).float().mean() > 0.9 and moved.max() < 5e-5


def test_a_gradient_scaler_works_on_a_float16_base():
    model = sequence_classifier(torch.float16)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    optimizer, scaler = torch.optim.AdamW(trainable_parameters(model), 1e-4), torch.amp.GradScaler("cpu", init_scale=256.0)
    before = model.score._parameters["weight"].detach().clone()
    with torch.autocast("cpu", torch.float16):
        loss = model(input_ids=tiny.TOKENS, labels=torch.tensor([0, 1, 2])).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert not torch.equal(model.score._parameters["weight"], before)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_biases_beside_16_bits(mode, dtype, tmp_path):
    model, base = tiny.classifier(dtype), tiny.classifier(dtype)
    inject(model, LoraConfig(r=2, target_modules=["q", "v"], bias=mode))
    x = X.to(dtype)
    assert torch.equal(model(x), base(x))
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    model(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable_parameters(model))
    tiny.randomize(model)
    y = model(x)
    save_adapter(model, tmp_path)
    other = tiny.classifier(dtype)
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), y)
    merge_and_unload(other)
    assert {p.dtype for p in other.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_files_hold_float32_unless_asked_and_merging_casts(dtype, tmp_path):
    from safetensors.torch import load_file

    model = sequence_classifier(dtype).eval()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    tiny.randomize(model)
    logits = tiny.logits(model)
    save_adapter(model, tmp_path / "full")
    save_adapter(model, tmp_path / "cast", dtype=dtype)
    for name, expected in (("full", torch.float32), ("cast", dtype)):
        assert {t.dtype for t in load_file(tmp_path / name / "adapter_model.safetensors").values()} == {expected}
    other = sequence_classifier(dtype).eval()
    load_adapter(other, tmp_path / "full")
    assert torch.equal(tiny.logits(other), logits)
    theirs = peft.PeftModel.from_pretrained(sequence_classifier(dtype), tmp_path / "full").eval()
    assert (tiny.logits(theirs) - logits).abs().max() < 8 * torch.finfo(dtype).eps * logits.abs().max()
    merge_and_unload(other)
    assert {p.dtype for p in other.parameters()} == {dtype} and type(other.score) is nn.Linear


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_modules_in_float32_survive_copies_pickles_switches_and_mixed_batches(dtype):
    model = sequence_classifier(dtype).eval()
    for i, name in enumerate("ab"):
        inject(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"), name)
        tiny.randomize(model, name, seed=i)
    logits = {name: (set_adapter(model, name), tiny.logits(model))[1] for name in "ab"}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        for name in "ab":
            set_adapter(other, name)
            assert torch.equal(tiny.logits(other), logits[name])
    with torch.no_grad(), mixed_batch(model, ["a", "b", "a"]):
        rows = model(input_ids=tiny.TOKENS).logits
    expected = torch.stack([logits["a"][0], logits["b"][1], logits["a"][2]])
    assert (rows - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert count_parameters(model).total > 0 and type(unload(model).score) is nn.Linear


def test_biases_and_whole_modules_of_two_adapters_beside_16_bits():
    model = tiny.classifier(torch.bfloat16)
    inject(model, LoraConfig(r=2, target_modules=["q"], bias="all"), "a")
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match="has a bias that another adapter of this 16-bit base trains"):
        inject(model, LoraConfig(**HEAD), "b")
    assert tiny.snapshot(model) == before


# --- what a cast leaves of them -----------------------------------------------------------------------------------------


def moved(model, name, by):
    """Moves a trained tensor by a share of its own values."""
    tensor = model.get_parameter(name)
    with torch.no_grad():
        tensor += by * tensor.abs() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).sign()


@pytest.mark.parametrize("way", ["in memory", "cast", "over files"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_merge_says_what_a_cast_leaves_of_what_was_trained_whole(dtype, way, tmp_path):
    base = sequence_classifier(torch.float32 if way == "cast" else dtype)
    base.save_pretrained(tmp_path / "base")
    inject(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    before = base.score.weight.detach().to(dtype)
    moved(base, "score.weight", by=0.03)
    W = base.score.weight.detach()
    D, M = W - original_of(base, "score.weight").float(), W.to(dtype).float() - before.float()
    expected = ((M * D).sum() / D.square().sum()).item()
    if way == "over files":
        save_adapter(base, tmp_path / "adapter")
        report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    else:
        report = merge_and_unload(base, dtype=dtype if way == "cast" else None)
    assert report.kept["score.weight"] == pytest.approx(expected, rel=1e-4) and expected != 1
    assert "score.weight" not in report.layers


@pytest.mark.parametrize("way", ["in memory", "over files"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_training_that_a_cast_would_undo_is_not_merged_unless_asked(dtype, way, tmp_path):
    base = sequence_classifier(dtype)
    base.save_pretrained(tmp_path / "base")
    inject(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    moved(base, "score.weight", by=torch.finfo(dtype).eps / 16)  # a quarter of what rounding to nearest takes away, or less
    save_adapter(base, tmp_path / "adapter")

    def merge(allow):
        if way == "in memory":
            return merge_and_unload(base, allow_loss=allow)
        return merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", Recipe(allow_loss=allow))

    output = base(input_ids=tiny.TOKENS).logits
    with pytest.raises(StateError, match=r"nothing of the adapter is left in 1 of .*score\.weight keeps 0%"):
        merge(False)
    assert torch.equal(base(input_ids=tiny.TOKENS).logits, output) and not (tmp_path / "out").exists()
    assert merge(True).kept["score.weight"] == 0
