"""Adapters into one adapter: every method against full deltas in float64, on every kind of layer; and the files of the result.

The oracle's deltas are s B A of the adapters' own tensors, with s worked out here from rank and alpha. What is truncated is
held to Eckart and Young's bound instead of compared value by value: the best approximation need not be unique.
"""

import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lora_core import (
    LoraConfig,
    LoraError,
    combine_adapters,
    count_parameters,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from lora_core.errors import AdapterNameError, ConfigError, StateError
from lora_core.files.storage import adapter_tensors
from lora_core.maths.pruning import PRUNING
from lora_core.model.combinable import METHODS
from lora_core.model.registry import copies_of, find_adapter
from tests.support import oracle, tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

X = tiny.batch()
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def arguments(method, density=0.6, **others):
    return {"method": method, **({"density": density} if method in PRUNING else {}), **others}


def delta(model, path, name, config):
    """s B A in float64 of one adapter on one layer, (d_out, d_in); 0 where it has none."""
    layer = model.get_submodule(path)
    if name not in getattr(layer, "lora_A", {}):
        return 0.0
    A, B = layer.lora_A[name].detach().double(), layer.lora_B[name].detach().double()
    product = B @ A
    if name in layer.lora_A0:
        product = product - layer.lora_B0[name].detach().double() @ layer.lora_A0[name].detach().double()
    r = layer.lora_A[name].shape[0]
    alpha = next((a for p, a in config.alpha_pattern.items() if path.endswith(p)), config.lora_alpha)
    return product * (alpha / (math.sqrt(r) if config.use_rslora else r))


def check_layers(model, configs, weights, report, method, density=0.6, majority="total", r=None):
    """Every layer of the new adapter is the oracle's combination, exactly or at its rank as near as can be."""
    new = find_adapter(model, report.adapter_name)
    sources = {name: find_adapter(model, name) for name in configs}
    assert set(new.layers) == {path for record in sources.values() for path in record.layers} == set(report.ranks)
    for path in new.layers:
        on_it = [n for n, record in sources.items() if path in record.layers]
        updates = [weights[n] * delta(model, path, n, configs[n]) for n in on_it]
        expected = oracle.combined(updates, method, density, majority)
        if method.startswith("dare") and path != next(iter(new.layers)):
            continue  # its draws come after those of the layers before
        layer = model.get_submodule(path)
        A, B = layer.lora_A["new"].detach().double(), layer.lora_B["new"].detach().double()
        ranks = [len(layer.factors(n)[0]) for n in on_it]
        if method == "cat":
            rank = sum(ranks)
        elif method == "linear":
            rank = len(A)  # `test_the_rank_of_linear` says which
            assert rank <= min(sum(ranks), *expected.shape)
        elif method == "svd":
            rank = min(r or max(ranks), sum(ranks), *expected.shape)
        else:
            rank = min(r or max(ranks), *expected.shape)
        assert len(A) == new.config.rank_for(path) == report.ranks[path] == rank
        assert layer.lora_scaling["new"] == new.config.scaling_for(path) == 1
        kept, missed = oracle.truncation(expected, rank)
        # A and B are rounded to float32, and each of the terms adds the rounding of its size; DARE makes them larger.
        scale = max(sum(update.norm().item() for update in updates), expected.norm().item())
        assert abs((B @ A - expected).norm().item() - missed) <= 4e-7 * scale + 1e-30
        assert report.energy[path] == pytest.approx(kept, abs=1e-6)
        if method in ("cat", "linear"):
            assert missed <= 4e-7 * scale + 1e-30 and report.energy[path] == 1.0


# --- against the oracle -----------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Three linear layers of the shapes that hypothesis wishes, at paths of which one ends another."""

    def __init__(self, a, b, c):
        super().__init__()
        self.p, self.q = nn.Linear(a, b), nn.Linear(b, c, bias=False)
        self.inner = nn.ModuleDict({"q": nn.Linear(c, a)})

    def forward(self, x):
        return self.inner["q"](torch.tanh(self.q(torch.tanh(self.p(x)))))


PATHS = ("p", "q", "inner.q")
ADAPTER = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.sampled_from([1, 3, 8.5]),
        "use_rslora": st.booleans(),
        "target_modules": st.sets(st.sampled_from(PATHS), min_size=1).map(lambda paths: "|".join(sorted(paths))),
        "init_lora_weights": st.sampled_from([True, "orthogonal", "pissa", "olora"]),
        "own": st.booleans(),  # a rank and alpha of its own on p
    }
)


def configure(r, own, **fields):
    if fields["init_lora_weights"] is not True:
        r = 2  # fits every shape below, and is even
    patterns = {"rank_pattern": {"p": 2}, "alpha_pattern": {"p": 5}} if own and "p" in fields["target_modules"] else {}
    return LoraConfig(r=r, **patterns, **fields)


@EVERY_METHOD
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 7)] * 3),
    adapters=st.lists(st.tuples(ADAPTER, st.integers(-20, 20).map(lambda w: w / 10)), min_size=1, max_size=4),
    r=st.none() | st.integers(1, 9),
    density=st.sampled_from([0.05, 0.4, 1.0]),
    majority=st.sampled_from(["total", "frequency"]),
)
def test_any_adapters_and_weights(method, shape, adapters, r, density, majority):
    model = Stack(*shape)
    configs = {f"a{i}": configure(**fields) for i, (fields, _) in enumerate(adapters)}
    weights = {f"a{i}": weight for i, (_, weight) in enumerate(adapters)}
    for seed, (name, config) in enumerate(configs.items()):
        inject(model, config, name)
        tiny.randomize(model, name, seed)
    r = None if method in ("linear", "cat") else r
    options = arguments(method, density, majority=majority, r=r)
    report = combine_adapters(model, list(configs), list(weights.values()), "new", **options)
    assert report.source == f"{method} of " + " + ".join(f"{weight:g} {name!r}" for name, weight in weights.items())
    check_layers(model, configs, weights, report, method, density, majority, r)


def two_adapters(model=None, **settings):
    """A model with the random adapters "a" (active) and "b", of other layers, ranks and scalings."""
    model = model or tiny.classifier()
    inject(model, LoraConfig(r=4, target_modules=["q", "v"], **settings), "a")
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["v", "out"], use_rslora=True, **settings), "b")
    return tiny.randomize(tiny.randomize(model, "a", seed=1), "b", seed=2)


KINDS = {
    "convnet": (["conv1d", "embedding"], ["conv2d", "conv1d", "embedding", "mix"]),
    "gpt2": (["c_attn", "wte"], ["c_attn", "c_fc"]),
}


@EVERY_METHOD
@pytest.mark.parametrize("architecture", KINDS)
def test_every_kind_of_layer(method, architecture):
    model, configs = tiny.build(architecture), {}
    for seed, (name, targets) in enumerate(zip("ab", KINDS[architecture], strict=True)):
        configs[name] = LoraConfig(r=2 + seed, lora_alpha=3, target_modules=targets)
        inject(model, configs[name], name)
        tiny.randomize(model, name, seed)
    report = combine_adapters(model, ["a", "b"], [0.5, -2], "new", **arguments(method))
    check_layers(model, configs, {"a": 0.5, "b": -2}, report, method)


def test_linear_and_cat_compute_what_the_adapters_compute_when_active_together():
    model = two_adapters()
    set_adapter(model, ["a", "b"])
    expected = model(X)
    for method in ("linear", "cat"):
        combine_adapters(model, ["a", "b"], [1, 1], method, method)
        set_adapter(model, method)
        # Float32 sums of 64 terms in another order, through two blocks.
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


def test_on_a_4_bit_base():
    model, dense = tiny.classifier(), two_adapters()
    quantize_nf4(model)
    two_adapters(model)
    for m in (model, dense):
        combine_adapters(m, ["a", "b"], [1, -0.5], "new", "ties", density=0.3)
    for path in find_adapter(model, "new").layers:  # the updates do not depend on the base
        for table in ("lora_A", "lora_B"):
            ours, theirs = (getattr(m.get_submodule(path), table)["new"] for m in (model, dense))
            assert torch.equal(ours, theirs)


def test_the_rank_of_linear():
    """a and b share A on q, so their sum has rank 4 there; a alone is on k; what cancels is kept at rank 1."""
    model = tiny.classifier()
    for name, targets in (("a", ["q", "k"]), ("b", ["q"])):
        inject(model, LoraConfig(r=4, target_modules=targets), name)
        tiny.randomize(model, name, seed=ord(name))
    for block in model.layers:
        block.q.lora_A["b"].data.copy_(block.q.lora_A["a"])
    ranks = combine_adapters(model, ["a", "b"], [1, 0.7], "new").ranks
    assert ranks == {f"layers.{i}.{n}": 4 for i in (0, 1) for n in "qk"}
    for block in model.layers:
        block.q.lora_B["b"].data.copy_(block.q.lora_B["a"])
    report = combine_adapters(model, ["a", "b"], [0.3, -0.3], "zero")
    assert report.ranks == {f"layers.{i}.{n}": {"q": 1, "k": 4}[n] for i in (0, 1) for n in "qk"}
    assert set(report.energy.values()) == {1.0}
    assert not any(block.q.lora_B["zero"].any() for block in model.layers)


def test_a_start_that_was_subtracted_is_part_of_the_update():
    model = tiny.classifier()
    for name, init in (("a", "pissa"), ("b", "olora")):
        inject(model, LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=init), name)
    base = tiny.classifier()(X)
    report = combine_adapters(model, ["a", "b"], [1, -3], "new", "cat")
    assert set(report.ranks.values()) == {12}
    set_adapter(model, "new")
    torch.testing.assert_close(model(X), base, rtol=1e-4, atol=1e-5)  # nothing was trained: B A - B0 A0 = 0


def test_the_adapters_draw_in_the_order_of_layers_names_and_then_heads():
    model = two_adapters(modules_to_save=["classifier"])
    combine_adapters(model, ["b", "a"], [0.5, 2], "new", "dare_linear", density=0.5, seed=9, r=64)
    generator = torch.Generator().manual_seed(9)

    def drop(D):
        return torch.where(torch.rand(D.shape, dtype=torch.float64, generator=generator) < 0.5, D / 0.5, 0.0)

    for path in find_adapter(model, "new").layers:
        layer = model.get_submodule(path)
        expected = torch.zeros(64, 64, dtype=torch.float64)
        for name, weight, scaling in (("b", 0.5, 4 / math.sqrt(2)), ("a", 2, 8 / 4)):
            if name in layer.lora_A:
                expected += drop(weight * scaling * layer.lora_B[name].detach().double() @ layer.lora_A[name].double())
        actual = layer.lora_B["new"].detach().double() @ layer.lora_A["new"].double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # 64 float32 terms of size up to 1
    for path in ("classifier.weight", "classifier.bias"):
        W = tiny.classifier().get_parameter(path).detach().double()
        copies = {n: copies_of(model, n)[path].detach().double() for n in "ab"}
        expected = W + drop(0.5 * (copies["b"] - W)) + drop(2 * (copies["a"] - W))
        torch.testing.assert_close(copies_of(model, "new")[path].double(), expected, rtol=0, atol=1e-6)


def test_a_seed_decides():
    outputs = []
    for seed in (1, 1, 2):
        model = two_adapters()
        torch.manual_seed(len(outputs))
        combine_adapters(model, ["a", "b"], [1, 1], "new", "dare_ties", density=0.5, seed=seed)
        set_adapter(model, "new")
        outputs.append(model(X))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


# --- biases and modules trained whole ---------------------------------------------------------------------------------


@EVERY_METHOD
def test_biases_of_b(method):
    model = tiny.classifier()
    inject(model, LoraConfig(r=4, lora_alpha=2, target_modules=["q"], lora_bias=True), "a")
    inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"], lora_bias=True), "b")
    inject(model, LoraConfig(r=2, target_modules=["out"]), "c")
    for name in "abc":
        tiny.randomize(model, name, seed=ord(name))
    combine_adapters(model, ["a", "b", "c"], [2, -1, 1], "new", **arguments(method))
    layer = model.layers[0].q
    if not method.startswith("dare"):  # which test_the_adapters_draw... covers
        own = [2 * (2 / 4) * layer.lora_bias["a"].detach().double(), -1 * (6 / 2) * layer.lora_bias["b"].detach().double()]
        expected = oracle.combined(own, method, 0.6)
        torch.testing.assert_close(layer.lora_bias["new"].detach().double(), expected, rtol=1e-6, atol=1e-7)
    assert layer.lora_bias["new"].any() and not model.layers[0].out.lora_bias["new"].any()
    if method == "linear":
        set_adapter(model, "new")
        actual = model(X)
        merge_adapter(model)
        torch.testing.assert_close(model(X), actual, rtol=1e-4, atol=1e-5)


@EVERY_METHOD
def test_heads_are_combined_as_differences_from_the_bases(method):
    model = two_adapters(modules_to_save=["classifier"])
    inject(model, LoraConfig(r=2, target_modules=["k"], modules_to_save=["norm"]), "c")
    tiny.randomize(model, "c", seed=3)
    report = combine_adapters(model, ["a", "b", "c"], [1.5, -1, 2], "new", **arguments(method))
    assert report.modules_to_save == find_adapter(model, "new").saved_modules == ("norm", "classifier")
    base, copies = tiny.classifier(), copies_of(model, "new")
    assert set(copies) == {f"{m}.{p}" for m in ("norm", "classifier") for p in ("weight", "bias")}
    for path, actual in copies.items():
        if method.startswith("dare"):
            continue  # which test_the_adapters_draw... covers
        W = base.get_parameter(path).detach().double()
        updates = [
            weight * (copies_of(model, name)[path].detach().double() - W)
            for name, weight in (("a", 1.5), ("b", -1), ("c", 2))
            if path in copies_of(model, name)
        ]
        expected = W + oracle.combined(updates, method, 0.6)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    set_adapter(model, "new")
    assert model.classifier.weight is copies["classifier.weight"]
    with disable_adapters(model):
        assert torch.equal(model(X), base(X))


def test_tied_heads_stay_tied_and_counters_keep_the_bases_value():
    model = tiny.build("gpt2")
    for name in "ab":
        tied = {"modules_to_save": ["lm_head", "wte"], "ensure_weight_tying": True}
        inject(model, LoraConfig(r=2, target_modules=["c_attn"], **tied), name)
        tiny.randomize(model, name, seed=ord(name))
    combine_adapters(model, ["a", "b"], [1, 1], "new", "dare_linear", density=0.5)
    set_adapter(model, "new")
    assert model.lm_head.weight is model.transformer.wte.weight

    model = tiny.build("convnet")
    inject(model, LoraConfig(r=2, target_modules=["mix"], modules_to_save=["norm"]), "a")
    model.train()
    tiny.logits(model)  # moves the statistics of "a"
    mean = copies_of(model, "a")["body.norm.running_mean"].clone()
    combine_adapters(model, ["a"], [0.5], "new")
    copies = copies_of(model, "new")
    assert mean.any() and torch.allclose(copies["body.norm.running_mean"], 0.5 * mean)  # the base's is 0
    assert copies_of(model, "a")["body.norm.num_batches_tracked"] == 1
    assert copies["body.norm.num_batches_tracked"] == 0


def test_a_module_inside_another_that_is_trained_whole():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})
    inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]), "a")
    inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head.1"]), "b")
    tiny.randomize(tiny.randomize(model, "a", seed=1), "b", seed=2)
    assert combine_adapters(model, ["a", "b"], [1, 1], "new").modules_to_save == ("head",)
    a, b, new = (copies_of(model, name) for name in ("a", "b", "new"))
    assert set(new) == set(a) and "head.0.weight" not in b
    set_adapter(model, [])
    base = model["head"][1].weight
    torch.testing.assert_close(new["head.1.weight"], a["head.1.weight"] + b["head.1.weight"] - base, rtol=0, atol=1e-6)
    torch.testing.assert_close(new["head.0.weight"], a["head.0.weight"], rtol=0, atol=1e-6)


# --- what it does to the model ----------------------------------------------------------------------------------------


def test_the_new_adapter_is_not_active_and_nothing_else_changes():
    model = two_adapters(modules_to_save=["classifier"])
    before, output = tiny.snapshot(model), model(X)
    combine_adapters(model, ["a", "b"], [1, 1], "new", "ties", density=0.5)
    after = tiny.snapshot(model)
    assert {k: v for k, v in after["state"].items() if "new" not in k.split(".")} == before["state"]
    assert {k: v for k, v in after["trainable"].items() if "new" not in k.split(".")} == before["trainable"]
    assert torch.equal(model(X), output) and find_adapter(model, "a") and count_parameters(model).adapter == 4 * 4 * 128


@pytest.mark.filterwarnings("ignore:nothing is trained")
def test_it_can_be_trained_if_one_of_the_others_can(tmp_path):
    model = two_adapters()
    combine_adapters(model, ["a", "b"], [1, 1], "new")
    set_adapter(model, "new")
    assert {id(p) for p in trainable_parameters(model)} == {
        id(getattr(model.get_submodule(p), t)["new"]) for p in find_adapter(model, "new").layers for t in ("lora_A", "lora_B")
    }
    for name in "ab":
        save_adapter(model, tmp_path / name, name)
    fixed = tiny.classifier()
    for name in "ab":
        load_adapter(fixed, tmp_path / name, name)
    combine_adapters(fixed, ["a", "b"], [1, 1], "new")
    set_adapter(fixed, "new")
    assert not trainable_parameters(fixed)


def test_while_adapters_are_folded_in():
    model, reference = two_adapters(), two_adapters()
    merge_adapter(model, ["a", "b"])
    for m in (model, reference):
        combine_adapters(m, ["a", "b"], [1, 2], "new", "svd", r=3)
    unmerge_adapter(model)
    for m in (model, reference):
        set_adapter(m, "new")
    assert torch.equal(model(X), reference(X))


def test_a_combination_of_combinations_in_float64():
    model = two_adapters(tiny.classifier(torch.float64))
    combine_adapters(model, ["a", "b"], [1, 1], "both")
    combine_adapters(model, ["both", "b"], [2, -2], "new")  # 2 a
    combine_adapters(model, "a", [2], "twice", "cat")
    assert model.layers[0].v.lora_A["new"].dtype == torch.float64
    set_adapter(model, "twice")
    expected = model(tiny.batch(torch.float64))
    set_adapter(model, "new")
    torch.testing.assert_close(model(tiny.batch(torch.float64)), expected, rtol=1e-12, atol=1e-12)


def test_the_report_says_it_in_a_line():
    model = two_adapters(modules_to_save=["classifier"])
    assert str(combine_adapters(model, ["a", "b"], [1, -0.5], "new", "cat")) == (
        "adapter 'new' = cat of 1 'a' + -0.5 'b' on 6 layers and classifier whole: rank 2 to 6, "
        "keeping at least 100 % of a layer's squared norm"
    )
    report = combine_adapters(model, ["a", "b"], [1, 1], "other", "svd", r=1)
    assert 0.1 < min(report.energy.values()) < 0.9
    assert f"rank 1, keeping at least {100 * min(report.energy.values()):.4g} %" in str(report)


# --- files ------------------------------------------------------------------------------------------------------------


def by_architecture(architecture, **settings):
    """A tiny model with adapters "a" and "b", that share some layers, and each the head."""
    model, names = tiny.build(architecture), tiny.projections(architecture)
    task = {"task_type": tiny.task_type(architecture), **settings}
    inject(model, LoraConfig(r=3, lora_alpha=5, target_modules=names[:-1], **task), "a")
    inject(model, LoraConfig(r=2, target_modules=names[1:] if len(names) > 2 else names, **task), "b")
    return tiny.randomize(tiny.randomize(model, "a", seed=1), "b", seed=2)


def same_logits(a, b):
    expected = tiny.logits(b)
    # The same float32 tensors, multiplied in another order, of at most 128 terms.
    torch.testing.assert_close(tiny.logits(a), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("method", ["cat", "linear", "dare_ties"])
@pytest.mark.parametrize("architecture", ["distilbert", "gpt2", "llama", "convnet"])
def test_the_result_is_saved_and_read_again_here_and_by_peft(method, architecture, tmp_path):
    peft = pytest.importorskip("peft")
    model = by_architecture(architecture)
    combine_adapters(model, ["a", "b"], [1, -0.5], "new", **arguments(method))
    set_adapter(model, "new")
    save_adapter(model, tmp_path, "new")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] and not written["use_rslora"]
    assert set(written["target_modules"]) == set(find_adapter(model, "new").layers)
    again = tiny.build(architecture)
    report = load_adapter(again, tmp_path)
    assert report.targets == tuple(find_adapter(model, "new").layers)
    written, read = adapter_tensors(model, "new"), adapter_tensors(again)
    assert written.keys() == read.keys() and all(torch.equal(written[key], read[key]) for key in read)
    same_logits(again, model)
    theirs = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path).eval()
    same_logits(theirs, model)
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.build(architecture)), atol=1e-4)
    merge_and_unload(model)
    same_logits(model, theirs.merge_and_unload())


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_path_that_ends_another_means_only_itself(tmp_path):
    """A list that names "q" would mean "inner.q" as well, and so would a pattern for its rank."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Stack(6, 6, 6)
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}

    def fresh():
        model = Stack(6, 6, 6)
        model.load_state_dict(state)
        return model

    for case, extra in (("q alone", "p"), ("q of its own rank", "p|inner.q")):
        model = fresh()
        inject(model, LoraConfig(r=2, target_modules="q"), "a")
        inject(model, LoraConfig(r=1, target_modules=extra), "b")
        tiny.randomize(tiny.randomize(model, "a", seed=1), "b", seed=2)
        report = combine_adapters(model, ["a", "b"], [1, 1], "new")
        assert report.ranks == {"p": 1, "q": 2} | ({"inner.q": 1} if "inner" in extra else {})
        set_adapter(model, "new")
        save_adapter(model, tmp_path / case, "new")
        again = fresh()
        load_adapter(again, tmp_path / case)
        x = torch.randn(4, 6)
        assert torch.equal(again(x), model(x))
        theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / case)
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_against_peft(method, tmp_path):
    """Its "cat" and "svd" are the sum of the updates, as ours; its "linear" has cross terms."""
    peft = pytest.importorskip("peft")
    model = tiny.build("llama")
    for name, alpha in (("a", 5), ("b", 8)):
        inject(model, LoraConfig(r=3, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]), name)
        save_adapter(tiny.randomize(model, name, seed=ord(name)), tmp_path / name, name)
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "a", "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", combination_type=method)
    theirs.set_adapter("new")
    combine_adapters(model, ["a", "b"], [1, 0.5], "new", method)
    set_adapter(model, "new")
    if method == "linear":
        assert (tiny.logits(theirs) - tiny.logits(model)).abs().max() > 1e-3
    else:
        same_logits(theirs, model)


def test_what_the_adapters_share_stays_in_the_configuration():
    model = tiny.build("bert")
    shared = {"lora_dropout": 0.1, "task_type": "SEQ_CLS", "base_model_name_or_path": "base"}
    for name, task in (("a", shared), ("b", shared), ("c", shared | {"lora_dropout": 0.2, "task_type": "TOKEN_CLS"})):
        inject(model, LoraConfig(r=2, target_modules=["query"], **task), name)
    combine_adapters(model, ["a", "b"], [1, 1], "ab")
    combine_adapters(model, ["a", "c"], [1, 1], "ac")
    ab, ac = (find_adapter(model, name).config for name in ("ab", "ac"))
    assert (ab.lora_dropout, ab.task_type, ab.base_model_name_or_path) == (0.1, "SEQ_CLS", "base")
    assert (ac.lora_dropout, ac.task_type, ac.base_model_name_or_path) == (0.0, None, "base")
    assert ac.modules_to_save == ("classifier",) and ac.init_lora_weights is True


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown adapter": ((["a", "c"], [1, 1], "new"), {}, AdapterNameError, "'c' on this model; it holds 'a', 'b'"),
    "taken name": ((["a", "b"], [1, 1], "a"), {}, AdapterNameError, "an adapter 'a' already"),
    "bad name": ((["a", "b"], [1, 1], "x.y"), {}, ConfigError, "'x.y'"),
    "method": ((["a", "b"], [1, 1], "new", "ties_svd"), {}, ConfigError, "'magnitude_prune', not 'ties_svd'"),
    "majority": ((["a"], [1], "new"), {"majority": "most"}, ConfigError, "'frequency', not 'most'"),
    "no names": (([], [], "new"), {}, ConfigError, "names is empty"),
    "a name twice": ((["a", "a"], [1, 1], "new"), {}, ConfigError, "twice: 'a', 'a'"),
    "too few weights": ((["a", "b"], [1], "new"), {}, ConfigError, "each of the 2 adapters, not 1"),
    "one weight": ((["a", "b"], 1, "new"), {}, ConfigError, "each of the 2 adapters, not 1"),
    "an infinite weight": ((["a", "b"], [1, math.inf], "new"), {}, ConfigError, "of 'b' must be a finite number, not inf"),
    "no number": ((["a", "b"], [1, "2"], "new"), {}, ConfigError, "that of 'b' must be a finite number, not '2'"),
    "rank of a sum": ((["a"], [1], "new", "cat"), {"r": 4}, ConfigError, "leave r=4 out"),
    "no rank": ((["a"], [1], "new", "svd"), {"r": 0}, ConfigError, "r must be a positive integer, not 0"),
    "no density": ((["a"], [1], "new", "ties"), {}, ConfigError, "'ties' needs a density"),
    "density 0": ((["a"], [1], "new", "ties"), {"density": 0}, ConfigError, r"in \(0, 1\], not 0"),
    "density 1.1": ((["a"], [1], "new", "ties"), {"density": 1.1}, ConfigError, r"in \(0, 1\], not 1.1"),
    "useless density": ((["a"], [1], "new"), {"density": 0.5}, ConfigError, "keeps every value"),
    "seed": ((["a"], [1], "new"), {"seed": 0.5}, ConfigError, "seed must be an integer, not 0.5"),
    "overflow": ((["a", "b"], [1e39, 1], "new"), {}, StateError, "infinite values .* nothing was combined"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_a_line_and_changes_nothing(case):
    positional, keywords, error, message = REFUSED[case]
    model = two_adapters(modules_to_save=["classifier"])
    before = tiny.snapshot(model)
    with pytest.raises(error, match=message) as caught:
        combine_adapters(model, *positional, **keywords)
    assert isinstance(caught.value, LoraError) and "\n" not in str(caught.value)
    assert tiny.snapshot(model) == before


def spoil(model):
    model.layers[1].v.lora_B["b"].data[0, 0] = math.nan


def spoil_head(model):
    copies_of(model, "b")["classifier.weight"].data[0, 0] = math.inf


@pytest.mark.parametrize(("how", "where"), [(spoil, "adapter 'b'.*layers.1.v"), (spoil_head, "classifier.weight")])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_values_that_are_not_finite_are_refused(how, where, method):
    model = two_adapters(modules_to_save=["classifier"])
    how(model)
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match=f"{where}.*nothing was combined"):
        combine_adapters(model, ["a", "b"], [1, 1], "new", **arguments(method))
    assert str(tiny.snapshot(model)) == str(before)  # as text, in which NaN equals NaN


def test_adapters_that_do_not_add_up_are_refused():
    model = tiny.build("convnet")
    inject(model, LoraConfig(r=2, target_modules=["mix"], bias="lora_only"), "biases")
    inject(model, LoraConfig(r=2, target_modules=["mix"], use_dora=True), "dora")
    inject(model, LoraConfig(r=2, target_modules=["mix"], lora_bias=True), "biased")
    inject(model, LoraConfig(r=2, target_modules=["embedding"]), "embedded")
    before = tiny.snapshot(model)
    for name, message in (
        ("biases", "bias='lora_only'"),
        ("dora", "'dora' is DoRA"),
        ("embedded", "embedding 'body.embedding'"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            combine_adapters(model, ["biased", name], [1, 1], "new")
        assert "\n" not in str(caught.value)
    assert tiny.snapshot(model) == before
    with pytest.raises(AdapterNameError, match="holds no adapters"):
        combine_adapters(tiny.classifier(), ["a"], [1], "new")
