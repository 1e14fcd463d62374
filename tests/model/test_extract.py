"""A fine-tuned model into an adapter: the best update of its rank, by an SVD in float64 here, and nothing lost unsaid."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lora_core import (
    LoraConfig,
    LoraError,
    disable_adapters,
    extract_adapter,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
    set_adapter,
    unload,
)
from lora_core.bases import dense_weight
from lora_core.errors import AdapterNameError, ConfigError, StateError, TargetError
from lora_core.files.storage import adapter_tensors
from lora_core.model.registry import find_adapter
from tests.support import oracle, tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

X = tiny.batch()


def tune(model, size=0.05, seed=5, only=""):
    """The model with every float parameter moved at random, or those whose path has `only` in it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if only in path:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def weight(model, path):
    return model.get_parameter(f"{path}.weight").detach().double()


def update(model, path, name="default"):
    """s B A of the adapter, in float64, with the scaling that its layer uses."""
    layer = model.get_submodule(path)
    return layer.lora_scaling[name] * layer.lora_B[name].detach().double() @ layer.lora_A[name].detach().double()


def check(model, path, D, report, name="default"):
    """The adapter is a best approximation of D on this layer, and the report says how good."""
    layer = model.get_submodule(path)
    r = find_adapter(model, name).config.rank_for(path)
    kept, missed = oracle.truncation(D, r)
    assert layer.lora_A[name].shape == (r, D.shape[1]) and layer.lora_B[name].shape == (D.shape[0], r)
    # D, A and B are float32; the sums here are not.
    assert abs((update(model, path, name) - D).norm().item() - missed) <= 4e-7 * D.norm().item() + 1e-30
    assert report.energy[path] == pytest.approx(kept, abs=1e-6)


# --- the update -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    r=st.integers(1, 12),
    alpha=st.sampled_from([0.5, 8, 33]),
    use_rslora=st.booleans(),
    own=st.sampled_from([{}, {"rank_pattern": {"0": 3}, "alpha_pattern": {"0": 5}}]),
    change=st.sampled_from(["all", "rank 1", "none"]),
    init=st.sampled_from([True, False, "gaussian"]),
)
def test_any_shape_rank_and_scaling(shape, r, alpha, use_rslora, own, change, init):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        if change == "rank 1":
            tuned[0].weight += torch.outer(*(torch.randn(n) for n in tuned[0].weight.shape))
        elif change == "all":
            tuned[0].weight.normal_()
    D = tuned[0].weight.detach().double() - base[0].weight.detach().double()
    fields = {"r": r, "lora_alpha": alpha, "use_rslora": use_rslora, "init_lora_weights": init, **own}
    report = extract_adapter(base, tuned, LoraConfig(target_modules=["0"], **fields))
    rank, top = (3, 5) if own else (r, alpha)
    assert base[0].lora_scaling["default"] == top / (math.sqrt(rank) if use_rslora else rank)
    # float32 differences of weights of size 1: an absolute rounding, which counts where little changed
    kept, missed = oracle.truncation(D, rank)
    rounding = 1e-6 * tuned[0].weight.norm().item()
    assert abs((update(base, "0") - D).norm().item() - missed) <= rounding
    assert base[0].lora_A["default"].shape == (rank, shape[0])
    assert report.energy["0"] == pytest.approx(kept, abs=1e-5)
    assert report.not_captured == ()
    if change != "all":
        assert report.energy["0"] == pytest.approx(1, abs=1e-6)


def test_a_model_tuned_with_an_adapter_comes_back_as_one():
    tuned = tiny.classifier()
    config = LoraConfig(r=4, target_modules=["q", "v"], modules_to_save=["classifier"])
    inject(tuned, config)
    tiny.randomize(tuned)
    expected = tuned(X)
    merge_and_unload(tuned)
    model = tiny.classifier()
    report = extract_adapter(model, tuned, config)
    assert min(report.energy.values()) > 1 - 1e-6 and report.not_captured == () and report.modules_to_save == ("classifier",)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    with disable_adapters(model):
        assert torch.equal(model(X), tiny.classifier()(X))


KINDS = {
    "convnet": ["embedding", "conv1d", "conv2d", "mix"],
    "gpt2": ["wte", "c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"],
}


@pytest.mark.parametrize("architecture", KINDS)
def test_every_kind_of_layer(architecture):
    base, tuned = tiny.build(architecture), tune(tiny.build(architecture))
    model = tiny.build(architecture)
    report = extract_adapter(model, tuned, LoraConfig(r=3, target_modules=KINDS[architecture]))
    for path in report.energy:
        layer = model.get_submodule(path)
        check(model, path, layer.as_matrix(weight(tuned, path) - weight(base, path)), report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(dtype):
    model, tuned = tiny.classifier(dtype), tune(tiny.classifier()).to(torch.bfloat16)
    report = extract_adapter(model, tuned, LoraConfig(r=4, target_modules=["q", "out"]))
    base = tiny.classifier(dtype)
    for path in report.energy:
        check(model, path, weight(tuned, path) - weight(base, path), report)


def test_a_4_bit_base_gives_the_difference_from_its_dequantised_weight():
    model, tuned = tiny.classifier(), tune(tiny.classifier())
    quantize_nf4(model)
    frozen = {path: dense_weight(model.get_submodule(path)).double() for path in ("layers.0.q", "layers.1.q")}
    report = extract_adapter(model, tuned, LoraConfig(r=6, target_modules=["q"]))
    for path, W in frozen.items():
        check(model, path, weight(tuned, path) - W, report)
    assert "layers.0.k.weight" in report.not_captured
    tuned_too = tiny.classifier()
    quantize_nf4(tuned_too)
    again = tiny.classifier()
    quantize_nf4(again)
    report = extract_adapter(again, tune(tuned_too, only="norm"), LoraConfig(r=6, target_modules=["q"]))
    assert set(report.energy.values()) == {1.0} and report.not_captured == ("norm.bias", "norm.weight")


# --- what is copied, and what is not captured ---------------------------------------------------------------------------


def test_heads_are_copied_and_what_else_differs_is_named():
    model, tuned = tiny.classifier(), tune(tiny.classifier())
    report = extract_adapter(model, tuned, LoraConfig(r=64, target_modules=["q", "k"], modules_to_save=["norm"]))
    assert torch.equal(model.norm.weight, tuned.norm.weight) and torch.equal(model.norm.bias, tuned.norm.bias)
    blocks = [f"layers.{i}.{name}" for i in (0, 1) for name in ("out.bias", "out.weight", "q.bias", "v.bias", "v.weight")]
    assert report.not_captured == tuple(sorted(["classifier.bias", "classifier.weight", *blocks]))
    assert str(report) == (
        f"adapter 'default' = the difference on 4 layers and norm whole: rank 64, keeping at least "
        f"{100 * min(report.energy.values()):.4g} % of a layer's squared norm; not captured: 12 other tensors "
        "(classifier.bias, classifier.weight, layers.0.out.bias, ...)"
    )
    assert "not captured" not in str(extract_adapter(tiny.classifier(), tiny.classifier(), LoraConfig(target_modules=["q"])))


def test_a_task_brings_its_head():
    model, tuned = tiny.build("bert"), tune(tiny.build("bert"), only="classifier")
    report = extract_adapter(model, tuned, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert report.modules_to_save == ("classifier",) and report.not_captured == () and set(report.energy.values()) == {1.0}
    # B A = 0 adds nothing, to the last bit, where all else is the same
    assert torch.equal(tiny.logits(model), tiny.logits(tuned))


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True, "lora_alpha": 3}])
def test_biases(settings):
    model, tuned = tiny.classifier(), tune(tiny.classifier())
    report = extract_adapter(model, tuned, LoraConfig(r=64, target_modules=["q", "k"], **settings))
    left = {name for name in report.not_captured if name.endswith("bias")}
    everything = {name for name, _ in tuned.named_parameters() if name.endswith("bias")}
    captured = {"layers.0.q.bias", "layers.1.q.bias"}
    assert left == (set() if settings.get("bias") == "all" else everything - captured)
    for i in (0, 1):
        layer, wanted = model.layers[i].q, tuned.layers[i].q
        if "lora_bias" in settings:
            own = layer.bias + layer.lora_scaling["default"] * layer.lora_bias["default"]
            torch.testing.assert_close(own, wanted.bias, rtol=1e-6, atol=1e-6)
            assert not model.layers[i].k.lora_bias["default"].any()  # the base has none there
        else:
            assert torch.equal(layer.bias, wanted.bias)
        x = tiny.batch()
        torch.testing.assert_close(layer(x), wanted(x), rtol=1e-4, atol=1e-5)  # at full rank nothing is lost


def test_a_state_dict_will_do_and_of_tied_tensors_one_name():
    tuned = tune(tiny.build("gpt2"))
    state = tuned.state_dict()
    assert state["lm_head.weight"] is not None and tuned.lm_head.weight is tuned.transformer.wte.weight
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head", "wte"], ensure_weight_tying=True)
    models = {name: tiny.build("gpt2") for name in ("module", "state dict", "one name")}
    reports = [
        extract_adapter(models["module"], tuned, config),
        extract_adapter(models["state dict"], state, config),
        extract_adapter(models["one name"], {k: v for k, v in state.items() if k != "lm_head.weight"}, config),
    ]
    assert reports[0] == reports[1] == reports[2] and reports[0].not_captured
    for model in models.values():
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, tuned.lm_head.weight)
        assert torch.equal(tiny.logits(model), tiny.logits(models["module"]))


def test_an_output_layer_tied_to_a_target_is_named():
    """The adapter on the embedding does not reach the output layer that shares its weight."""
    model, tuned = tiny.build("gpt2"), tune(tiny.build("gpt2"), only="wte")
    report = extract_adapter(model, tuned, LoraConfig(r=2, target_modules=["wte"]))
    assert report.not_captured == ("lm_head.weight",)


def test_tensors_that_the_base_does_not_have_are_named():
    state = tiny.classifier().state_dict() | {"extra.weight": torch.zeros(2)}
    report = extract_adapter(tiny.classifier(), state, LoraConfig(target_modules=["q"]))
    assert report.not_captured == ("extra.weight",)


def test_buffers_count_and_those_outside_the_state_dict_may_be_missing():
    class WithBuffers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(4, 4)
            self.register_buffer("kept", torch.zeros(3))
            self.register_buffer("made", torch.zeros(3), persistent=False)

    tuned = WithBuffers()
    tuned.kept += 1
    report = extract_adapter(WithBuffers(), tuned.state_dict(), LoraConfig(r=2, target_modules=["body"]))
    assert report.not_captured == ("kept",)
    tuned.made += 1
    assert extract_adapter(WithBuffers(), tuned, LoraConfig(r=2, target_modules=["body"])).not_captured == ("kept", "made")


def test_a_layer_under_two_paths():
    shared = nn.Linear(4, 4)
    base = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    tuned = tune(copy.deepcopy(base), only="c")
    assert set(tuned.state_dict()) > {"b.weight"}
    report = extract_adapter(base, tuned.state_dict(), LoraConfig(r=4, target_modules=["c"]))
    assert report.not_captured == ("c.bias",)


# --- on a model with adapters -----------------------------------------------------------------------------------------


def test_the_base_is_the_base_whatever_adapters_are_on_it():
    config = LoraConfig(r=4, target_modules=["q"], modules_to_save=["classifier"])
    tuned = tune(tiny.classifier(), only="layers")
    alone, model = tiny.classifier(), tiny.classifier()
    inject(model, LoraConfig(r=2, target_modules=["q", "v"], modules_to_save=["classifier", "norm"]), "other")
    tiny.randomize(model, "other")
    output = model(X)
    reports = [extract_adapter(m, tuned, config, "new") for m in (alone, model)]
    assert reports[0] == reports[1] and "norm.weight" not in reports[1].not_captured
    assert torch.equal(model(X), output)  # "other" is still the active one
    set_adapter(model, "new")
    assert torch.equal(model(X), alone(X))
    unload(model)
    assert torch.equal(model(X), tiny.classifier()(X))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "convnet"])
def test_the_result_is_saved_and_read_again_here_and_by_peft(architecture, tmp_path):
    peft = pytest.importorskip("peft")
    model, tuned = tiny.build(architecture), tune(tiny.build(architecture))
    config = LoraConfig(r=3, target_modules=tiny.projections(architecture), task_type=tiny.task_type(architecture))
    extract_adapter(model, tuned, config)
    save_adapter(model, tmp_path)
    again = tiny.build(architecture)
    load_adapter(again, tmp_path)
    written, read = adapter_tensors(model), adapter_tensors(again)
    assert written.keys() == read.keys() and all(torch.equal(written[key], read[key]) for key in read)
    theirs = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path).eval()
    for other in (again, theirs):  # float32 sums of at most 128 terms in another order, on logits of about 1
        torch.testing.assert_close(tiny.logits(other), tiny.logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.build(architecture)), atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------

QUERY = LoraConfig(r=2, target_modules=["q"])


def without(*names):
    return {key: tensor for key, tensor in tiny.classifier().state_dict().items() if key not in names}


def injected():
    model = tiny.classifier()
    inject(model, QUERY)
    return model


def with_nan(path):
    model = tiny.classifier()
    model.get_parameter(path).data.view(-1)[3] = math.nan
    return model


REFUSED = {
    "no config": (tiny.classifier, {"r": 2}, ConfigError, "config must be a LoraConfig, not dict"),
    "no tensors": (lambda: "tuned/", QUERY, ConfigError, "a mapping of names to tensors, not str"),
    "other values": (lambda: {"q": 1}, QUERY, ConfigError, "a mapping of names to tensors, not dict"),
    "adapters": (injected, QUERY, ConfigError, r"merge_and_unload\(tuned\) first"),
    "a missing target": (
        lambda: without("layers.1.q.weight"),
        QUERY,
        ConfigError,
        r"1 missing tensors \(layers.1.q.weight\)",
    ),
    "other missing ones": (
        lambda: without("norm.bias", "layers.0.k.weight"),
        QUERY,
        ConfigError,
        r"2 missing tensors \(layers.0.k.weight, norm.bias\)",
    ),
    "another shape": (
        lambda: without() | {"classifier.weight": torch.zeros(4, 64)},
        QUERY,
        ConfigError,
        r"1 wrong shapes \(classifier.weight is \(4, 64\), not \(3, 64\)\)",
    ),
    "not finite": (lambda: with_nan("layers.0.q.weight"), QUERY, StateError, r"layers\.0\.q\.weight has NaN"),
    "head not finite": (
        lambda: with_nan("classifier.weight"),
        LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"]),
        StateError,
        r"classifier\.weight has NaN",
    ),
    "dora": (tiny.classifier, LoraConfig(target_modules=["q"], use_dora=True), ConfigError, "use_dora=True"),
    "a start from the weight": (
        tiny.classifier,
        LoraConfig(target_modules=["q"], init_lora_weights="pissa_niter_4"),
        ConfigError,
        "'pissa_niter_4' subtracts its start",
    ),
    "no such target": (tiny.classifier, LoraConfig(target_modules=["qq"]), TargetError, "'qq' matched no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_a_line_and_changes_nothing(case):
    tuned, config, error, message = REFUSED[case]
    model = tiny.classifier()
    before = tiny.snapshot(model)
    with pytest.raises(error, match=message) as caught:
        extract_adapter(model, tuned(), config)
    assert isinstance(caught.value, LoraError) and "\n" not in str(caught.value)
    assert tiny.snapshot(model) == before


def test_on_a_model_with_adapters_these_are_refused():
    model, tuned = injected(), tiny.classifier()
    before = tiny.snapshot(model)
    with pytest.raises(AdapterNameError, match="'default' already"):
        extract_adapter(model, tuned, QUERY)
    with pytest.raises(ConfigError, match="bias='all' needs the model for itself"):
        extract_adapter(model, tuned, LoraConfig(target_modules=["q"], bias="all"), "new")
    assert tiny.snapshot(model) == before
    merge_adapter(model)
    with pytest.raises(StateError, match="unmerge_adapter"):
        extract_adapter(model, tuned, QUERY, "new")
