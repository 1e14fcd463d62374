"""Adapters from transformers 4, which had a layer for each matrix of each expert, on the experts that are fused by now.

Their files are written here as PEFT wrote them. What they compute is worked out by hand: each update is added to the rows of
the fused parameter that the layer's weight is. PEFT converts some of them, and agrees.
"""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import inject, load_adapter, merge_and_unload, merge_checkpoint, quantize_nf4, save_adapter, unload
from lora_core.errors import FileFormatError, WrongBaseError
from lora_core.files.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from lora_core.files.fingerprint import describe_dense, settings_hash
from lora_core.spec.targets import LayerPlan
from tests.support import tiny
from tests.support.experts import TOKENS, build, config, logits

#: {model: (the module with the experts and its layers' names, as transformers 4 had them)}.
THEN = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen2": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "qwen3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
EVERY_MODEL = pytest.mark.parametrize("name", THEN)


def of_then(name, directory, targets=None, ranks=None, alphas=None, dtype=torch.float32, **settings):
    """Writes an adapter; returns a plain model with its updates added by hand.

    `ranks` and `alphas` are {end of a path: rank or alpha} of layers with others than 2 and 3.
    """
    outer, (gate, up, down) = THEN[name]
    targets = ["q_proj", gate, up, down] if targets is None else targets
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, "lora_dropout": 0.05} | settings
    ranks, alphas, tensors, model = ranks or {}, alphas or {}, {}, build(name)
    fields |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    torch.manual_seed(3)
    places = []
    for i, layer in enumerate(model.model.layers):
        experts, d = layer.mlp.experts, layer.mlp.experts.down_proj.shape[-1]
        for e in range(4):
            first, second = experts.gate_up_proj[e, :d], experts.gate_up_proj[e, d:]
            for part, W in ((gate, first), (up, second), (down, experts.down_proj[e])):
                places.append((f"model.layers.{i}.{outer}.{e}.{part}", W))
        places.append((f"model.layers.{i}.self_attn.q_proj", layer.self_attn.q_proj.weight))
        places.append((f"model.layers.{i}.{outer.partition('.')[0]}.gate", layer.mlp.gate.weight))
        if name == "qwen2":
            shared = layer.mlp.shared_expert
            places += [(f"model.layers.{i}.mlp.shared_expert.{n}", getattr(shared, n).weight) for n in (gate, up, down)]
    for path, W in places:
        if not any(path.endswith(f".{target}") for target in targets):
            continue
        r = next((r for end, r in ranks.items() if path.endswith(end)), 2)
        alpha = next((a for end, a in alphas.items() if path.endswith(end)), 3)
        A, B = (torch.randn(r, W.shape[1]) * 0.3).to(dtype), (torch.randn(W.shape[0], r) * 0.3).to(dtype)
        s = alpha / (r**0.5 if settings.get("use_rslora") else r)
        with torch.no_grad():
            W += s * B.float() @ A.float()
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(fields))
    save_file(tensors, directory / WEIGHTS_FILE, {"format": "pt"})
    return model


def loaded(name, directory, **settings):
    model, dropout = build(name), json.loads((directory / CONFIG_FILE).read_text())["lora_dropout"]
    with pytest.warns(UserWarning, match=r"layers of single experts, stacked here: model\.layers\.0\.") as caught:
        report = load_adapter(model, directory, **settings)
    assert caught[0].filename == __file__ and ("lora_dropout=0.05 goes" in str(caught[0].message)) == (dropout > 0)
    return model, report


CASES = {
    "all": {},
    "experts alone": {"targets": [0, 1, 2]},
    "the router too": {"targets": ["q_proj", "gate", 0, 1, 2]},
    "other ranks": {"ranks": {0: 3, "1.*": 1}},
    "other alphas": {"alphas": {1: 5, "q_proj": 7}, "dtype": torch.bfloat16},
    "rslora": {"use_rslora": True, "ranks": {1: 5}},
    "gates alone": {"targets": [0]},
    "down alone": {"targets": [2, "q_proj"]},
}


def named(name, case):
    """The case with the model's own names for the numbers of its layers."""
    case = copy.deepcopy(CASES[case])
    parts = dict(enumerate(THEN[name][1]))
    if "targets" in case:
        case["targets"] = [parts.get(t, t) for t in case["targets"]]
    for patterns in ("ranks", "alphas"):
        if patterns in case:
            case[patterns] = {f".{parts.get(k, k)}".removesuffix(".1.*"): v for k, v in case[patterns].items()}
            case[patterns] = {k.removeprefix("."): v for k, v in case[patterns].items() if k}
    return case


@EVERY_MODEL
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_it_computed(name, case, tmp_path):
    expected = logits(of_then(name, tmp_path / "then", **named(name, case)))
    model, report = loaded(name, tmp_path / "then")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(build(name)), expected, atol=1e-3)
    outer = THEN[name][0]
    stacked = {new: old for new, old in report.moved.items() if "experts" in new}
    assert stacked and all(old.startswith(f"model.layers.{new[13]}.{outer}.*.{{") for new, old in stacked.items())
    # What is saved now has the names of now, and loads without a word.
    save_adapter(model, tmp_path / "now")
    other = build(name)
    with warnings.catch_warnings(action="error"):
        assert not load_adapter(other, tmp_path / "now").moved
    assert torch.equal(logits(other), logits(model))
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
@pytest.mark.parametrize("case", ["all", "experts alone"])
def test_peft_agrees(name, case, tmp_path):
    peft = pytest.importorskip("peft")
    of_then(name, tmp_path, lora_dropout=0, **named(name, case))  # it refuses others
    model, _ = loaded(name, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)


@EVERY_MODEL
def test_merged_over_files_that_hold_them_one_by_one(name, tmp_path):
    expected = of_then(name, tmp_path / "then")
    build(name).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", [tmp_path / "then"], tmp_path / "merged")
    merged = type(expected).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(expected), rtol=0, atol=1e-5)


def test_onto_experts_in_four_bits(tmp_path):
    of_then("mixtral", tmp_path)
    model, dense = build(), build()
    quantize_nf4(model)
    for m in (model, dense):
        with pytest.warns(UserWarning, match="stacked here"):
            load_adapter(m, tmp_path)
    assert {p.dtype for p in model.model.layers[0].mlp.experts.lora_weights.parameters()} == {torch.float32}
    before = logits(model)
    unload(model)
    assert not torch.equal(before, logits(model))


def test_trained_on_and_filled_again(tmp_path):
    of_then("qwen3", tmp_path)
    model, _ = loaded("qwen3", tmp_path, trainable=True)
    expected = logits(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    tiny.randomize(model)
    assert not torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="stacked here"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)


def test_a_fingerprint_of_single_experts_still_tells_another_base(tmp_path):
    of_then("mixtral", tmp_path)
    path, tensors = tmp_path / WEIGHTS_FILE, load_file(tmp_path / WEIGHTS_FILE)
    base, lines = build(), {}
    for key in tensors:
        old = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        layer = base.model.layers[int(old.split(".")[2])]
        if "experts" in old:
            e, part = old.split(".")[-2:]
            W = layer.mlp.experts.down_proj[int(e)] if part == "w2" else layer.mlp.experts.gate_up_proj[int(e)]
            lines[old] = describe_dense({"w1": W[:24], "w3": W[24:], "w2": W}[part])
        else:
            lines[old] = describe_dense(layer.self_attn.q_proj.weight)
    settings = read_adapter(tmp_path).config
    mark = {"base": lines, "settings": settings_hash(settings, {old: LayerPlan.of(settings, old) for old in lines})}
    save_file(tensors, path, {"format": "pt", "lora_core.fingerprint": json.dumps(mark)})
    loaded("mixtral", tmp_path)
    other = build()
    other.model.layers[1].mlp.experts.gate_up_proj.data[2, 30] += 1
    with pytest.raises(WrongBaseError, match=r"1 of 26 weights differ: model\.layers\.1\.block_sparse_moe\.experts\.2\.w3"):
        load_adapter(other, tmp_path)


REFUSED = {
    "a tensor too few": (lambda t: t.pop(next(k for k in t if "experts.1.w3.lora_B" in k)), {}, "1 missing tensors"),
    "an expert too many": (
        lambda t: t.update({k.replace("experts.3", "experts.4"): v.clone() for k, v in t.items() if "experts.3.w1" in k}),
        {},
        "2 layers without a home",
    ),
    "another width": (
        lambda t: t.update({k: v[:, 1:].clone() for k, v in t.items() if "w2.lora_A" in k}),
        {},
        r"not \(2, 24\)",
    ),
    "a rank of its own": (lambda t: None, {"rank_pattern": {"w1": 4}}, r"has A \(2, 16\) and B \(24, 2\), not \(4, 16\)"),
    "DoRA": (lambda t: None, {"use_dora": True}, "DoRA does not go on parameters"),
    "PiSSA": (lambda t: None, {"init_lora_weights": "pissa"}, "make it plain LoRA first"),
    "biases": (lambda t: None, {"bias": "all"}, "has no bias to train"),
    "parameters": (lambda t: None, {"target_parameters": ["mlp.gate.weight"]}, "which is which can't be told"),
    "a layer of attention too few": (lambda t: t.pop(next(k for k in t if "q_proj.lora_A" in k)), {}, "1 missing tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case, tmp_path):
    change, fields, message = REFUSED[case]
    of_then("mixtral", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings | fields))
    model = build()
    before = tiny.snapshot(model)
    with pytest.raises(FileFormatError, match=message):
        load_adapter(model, tmp_path)
    assert tiny.snapshot(model) == before


def test_files_of_now_are_read_as_ever(tmp_path):
    model = build()
    inject(model, config(target_modules=["q_proj"]))
    save_adapter(tiny.randomize(model), tmp_path)
    with warnings.catch_warnings(action="error"):
        load_adapter(build(), tmp_path)
