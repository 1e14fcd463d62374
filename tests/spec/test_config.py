"""`LoraConfig`: every bad value is refused when the object is made, with a message that helps."""

import dataclasses

import pytest
from hypothesis import given, settings, strategies as st

from lora_core import LoraConfig, LoraError
from lora_core.errors import ConfigError
from tests.support.bad_settings import REFUSED


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED, ids=lambda v: repr(v)[:30])
def test_a_bad_value_is_refused_by_field_and_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{"target_modules": ["q"], field: value})
    message = str(caught.value)
    assert field in message and allowed in message and "\n" not in message
    assert isinstance(caught.value, LoraError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("lora_alpha", -2),
        ("lora_dropout", 1.5),
        ("bias", "some"),
        ("task_type", "SEQ"),
        ("use_rslora", "maybe"),
        ("target_modules", [1]),
        ("modules_to_save", "head"),
        ("layers_to_transform", "first"),
    ],
)
def test_the_message_shows_the_value(field, value):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("other", [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_a_bias_of_b_goes_with_no_other_that_trains_it(other):
    with pytest.raises(ConfigError, match="lora_bias=True goes with neither use_dora nor a bias mode"):
        LoraConfig(lora_bias=True, **other)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora", "pissa_niter_1", "pissa_niter_16"])
def test_starts_that_there_are(init):
    assert LoraConfig(init_lora_weights=init).init_lora_weights == init


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_a_start_from_nothing_is_stored_as_it_is(init):
    config = LoraConfig(r=4, init_lora_weights=init, rank_pattern={"q": 2}, use_dora=True)
    assert config.as_stored() is config


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_start_from_the_weight_is_stored_at_twice_the_rank_and_the_same_scaling(init, use_rslora):
    patterns = {"rank_pattern": {"q": 2, "v": 3}, "alpha_pattern": {"v": 5, "k": 7}}
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=use_rslora, init_lora_weights=init, target_modules=["q"], bias="all", **patterns
    )
    stored = config.as_stored()
    assert stored.init_lora_weights is True and stored.as_stored() is stored
    for path in ("x.q", "x.v", "x.k", "x.o"):  # a pattern for the rank, for both, for alpha, for neither
        assert stored.rank_for(path) == 2 * config.rank_for(path)
        assert stored.scaling_for(path) == pytest.approx(config.scaling_for(path), rel=1e-15)
    changed = {f.name for f in dataclasses.fields(LoraConfig) if getattr(stored, f.name) != getattr(config, f.name)}
    assert changed == {"init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("target_module", "target_modules"), ("R", None)],
)
def test_an_unknown_field_is_refused_with_the_closest_name(misspelt, meant):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{misspelt: 1})
    assert misspelt in str(caught.value)
    assert (f"did you mean {meant!r}" if meant else "lora_alpha") in str(caught.value)


def test_positional_values_and_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    theirs, ours = peft.LoraConfig(), LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert LoraConfig(4).r == 4


def test_it_can_not_be_changed_through_the_object_or_what_was_passed():
    targets, ranks = ["q"], {"q": 4}
    config = LoraConfig(target_modules=targets, rank_pattern=ranks)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3
    targets.append("v")
    ranks["q"] = 9
    assert config.target_modules == ("q",) and config.rank_for("q") == 4


def test_replace_checks_again():
    config = LoraConfig(r=4, target_modules=["q"], layers_to_transform=[1])
    assert dataclasses.replace(config, r=2) == LoraConfig(r=2, target_modules=("q",), layers_to_transform=1)
    with pytest.raises(ConfigError):
        dataclasses.replace(config, r=0)


def test_a_set_of_targets_has_one_order():
    assert LoraConfig(target_modules={"v", "q", "k"}).target_modules == ("k", "q", "v")


def test_layers_need_a_list_of_targets():
    with pytest.raises(ConfigError, match="needs target_modules as a list"):
        LoraConfig(target_modules=".*q", layers_to_transform=[0])


def test_layers_pattern_alone_says_nothing():
    with pytest.raises(ConfigError, match="without layers_to_transform"):
        LoraConfig(target_modules=["q"], layers_pattern="layers")


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_classification_task_adds_its_heads_once(task_type):
    config = LoraConfig(task_type=task_type, modules_to_save=["classifier", "norm"])
    assert config.saved_module_patterns == ("classifier", "norm", "score")
    assert LoraConfig(task_type="CAUSAL_LM").saved_module_patterns == ()


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 32 / 16), (True, 32 / 4)])
def test_scaling_is_alpha_over_r_or_its_root(use_rslora, expected):
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=use_rslora).scaling_for("any") == expected


def test_patterns_decide_rank_and_scaling_and_the_first_hit_wins():
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern={r"q|v": 4, "q": 2}, alpha_pattern={r"layers\.0\.q": 1})
    assert [config.rank_for(p) for p in ("layers.0.q", "layers.0.v", "layers.0.k")] == [4, 4, 8]
    assert [config.scaling_for(p) for p in ("layers.0.q", "layers.1.q", "layers.0.k")] == [1 / 4, 4, 2]
    assert config.rank_for("layers.0.xq") == 8  # a pattern starts at a name's start


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    patterns=st.dictionaries(
        st.sampled_from(["q", "v", r"q|v", r"1\.q", r".*\.0\..*", r"layers\.\d\.v", r"[kq]$"]), st.integers(1, 9)
    ),
    path=st.sampled_from(["q", "layers.0.q", "layers.1.q", "layers.1.v", "layers.1.qv", "k", "x.k"]),
)
def test_rank_patterns_match_as_pefts_do(patterns, path):
    other = pytest.importorskip("peft.utils.other")
    key = other.get_pattern_key(patterns.keys(), path)
    assert LoraConfig(r=77, rank_pattern=patterns).rank_for(path) == patterns.get(key, 77)
