"""Patterns -> modules: the same choice that peft makes, and no pattern that silently matches nothing."""

import re

import pytest
from hypothesis import assume, given, settings, strategies as st

from lora_core import LoraConfig
from lora_core.errors import TargetError
from lora_core.spec.targets import match_patterns, match_saved_modules, select_targets, shortest_names

PATHS = [f"encoder.layer.{i}.{name}" for i in range(3) for name in ("q_lin", "v_lin", "ffn.lin1", "norm")] + ["classifier"]
LINEAR = [p for p in PATHS if "norm" not in p]


def select(config, paths=PATHS, linear=LINEAR, saved=(), strict=True):
    return select_targets(config, paths, linear, saved, strict)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_lin"], [p for p in PATHS if p.endswith("q_lin")]),
        (["encoder.layer.1.q_lin"], ["encoder.layer.1.q_lin"]),
        (["1.q_lin"], ["encoder.layer.1.q_lin"]),
        (["lin1", "v_lin"], [p for p in PATHS if p.endswith(("lin1", "v_lin"))]),
        (r".*\.[02]\.q_lin", ["encoder.layer.0.q_lin", "encoder.layer.2.q_lin"]),
        ("classifier", ["classifier"]),
        ("all-linear", [p for p in LINEAR if p != "classifier"]),
    ],
    ids=str,
)
def test_patterns_select_in_model_order(targets, expected):
    assert list(select(LoraConfig(target_modules=targets)).paths) == expected


def test_a_name_matches_whole_segments_only():
    with pytest.raises(TargetError, match="'lin' matched no module"):
        select(LoraConfig(target_modules=["lin"]))


def test_a_string_must_match_the_whole_path():
    with pytest.raises(TargetError, match="matched no module"):
        select(LoraConfig(target_modules="q_lin"))


def test_hits_are_counted_for_each_pattern():
    config = LoraConfig(target_modules=["q_lin", "layer.0.q_lin"], exclude_modules=["2.q_lin"])
    assert select(config).hits == {"q_lin": 3, "layer.0.q_lin": 1}


@pytest.mark.parametrize("exclude", [["1.q_lin"], r".*layer\.1\..*"])
def test_excluded_modules_are_left_alone(exclude):
    chosen = select(LoraConfig(target_modules=["q_lin"], exclude_modules=exclude)).paths
    assert chosen == ("encoder.layer.0.q_lin", "encoder.layer.2.q_lin")


def test_a_target_that_is_trained_whole_is_told():
    config = LoraConfig(target_modules=["q_lin", "classifier"], modules_to_save=["classifier"])
    with pytest.raises(TargetError, match=r"'classifier' is trained whole \(modules_to_save.*; leave it out"):
        select(config, saved=["classifier"])
    with pytest.raises(TargetError, match="'q_line' matched no module"):
        select(LoraConfig(target_modules=["q_line"]), saved=["classifier"])


def test_saved_modules_are_never_targets():
    config = LoraConfig(target_modules=["q_lin"])
    assert select(config, saved=["encoder.layer.1"]).paths == ("encoder.layer.0.q_lin", "encoder.layer.2.q_lin")


def test_heads_stay_out_of_all_linear_also_when_they_are_modules_of_several_layers():
    paths = ["body.a", "classifier", "classifier.dense", "classifier.out_proj", "lm_head"]
    assert select(LoraConfig(target_modules="all-linear"), paths, paths).paths == ("body.a",)


# --- misses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "field", "hint"),
    [
        ({"target_modules": ["q_line"]}, "target_modules", "'q_lin' (3 modules)"),
        ({"target_modules": ["q_lin", "v_line"]}, "target_modules", "'v_lin' (3 modules)"),
        ({"target_modules": ["ffn.lin2"]}, "target_modules", "'ffn.lin1' (3 modules)"),
        ({"target_modules": ["clasifier"]}, "target_modules", "'classifier' (1 module)"),
        ({"target_modules": r".*q_line"}, "target_modules", ""),
        ({"target_modules": ["q_lin"], "exclude_modules": ["v_line"]}, "exclude_modules", "'v_lin'"),
        ({"target_modules": ["q_lin"], "rank_pattern": {"v_lin": 2}}, "rank_pattern", "'q_lin'"),
        ({"target_modules": ["q_lin"], "alpha_pattern": {"q_line": 2}}, "alpha_pattern", "'q_lin'"),
        ({"target_modules": ["completely_else"]}, "target_modules", "encoder.layer"),
    ],
    ids=str,
)
def test_a_pattern_that_hits_nothing_is_an_error_with_the_closest_names(settings_, field, hint):
    with pytest.raises(TargetError) as caught:
        select(LoraConfig(**settings_))
    message = str(caught.value)
    assert message.startswith(field) and "matched no" in message and hint in message and "\n" not in message


@pytest.mark.parametrize(
    "settings_",
    [
        {"target_modules": ["q_lin"], "exclude_modules": ["q_lin"]},
        {"target_modules": ["q_lin"], "layers_to_transform": [7]},
        {"target_modules": ["q_lin"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    ],
    ids=str,
)
def test_nothing_left_after_exclusions_is_an_error(settings_):
    with pytest.raises(TargetError, match="leaves no layer"):
        select(LoraConfig(**settings_))


def test_targets_must_be_given():
    with pytest.raises(TargetError, match="all-linear"):
        select(LoraConfig())


def test_a_miss_can_be_counted_instead():
    chosen = select(LoraConfig(target_modules=["q_lin", "q_line"]), strict=False)
    assert len(chosen.paths) == 3 and chosen.hits == {"q_lin": 3, "q_line": 0}


# --- modules to save --------------------------------------------------------------------------------------------------


def test_saved_modules_match_by_bare_ending_and_outermost():
    paths = ["pre_classifier", "classifier", "classifier.dense", "body.norm", "body"]
    assert match_saved_modules(["classifier"], (), paths) == ("pre_classifier", "classifier")
    assert match_saved_modules(["dense", "classifier"], (), paths) == ("pre_classifier", "classifier")
    assert match_saved_modules(["norm"], (), paths) == ("body.norm",)
    assert match_saved_modules(["score", "classifier"], ("score",), paths) == ("pre_classifier", "classifier")


def test_a_saved_module_that_does_not_exist_is_an_error():
    with pytest.raises(TargetError, match="modules_to_save: 'clasifier' matched no module; closest: 'classifier'"):
        match_saved_modules(["clasifier"], (), ["body", "classifier"])


# --- the same choice as peft ------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["q", "k", "qk", "0", "1", "12", "layers", "block", "attn", "head", "experts"])
TREES = st.lists(st.lists(NAMES, min_size=1, max_size=5).map(".".join), min_size=1, max_size=8, unique=True)
LIST_PATTERNS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map(".".join), min_size=1, max_size=3, unique=True)
REGEXES = st.sampled_from([r".*q", r".*\.q", r"(.*\.)?(q|k)", r"layers\.\d+\..*", r".*attn.*", r"q", r".*\d.*k"])


def peft_selects(config, paths):
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(
        target_modules=list(config.target_modules) if isinstance(config.target_modules, tuple) else config.target_modules,
        exclude_modules=list(config.exclude_modules) if isinstance(config.exclude_modules, tuple) else config.exclude_modules,
        layers_to_transform=config.layers_to_transform and list(config.layers_to_transform),
        layers_pattern=config.layers_pattern,
    )
    return [p for p in paths if utils.check_target_module_exists(theirs, p)]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(paths=TREES, targets=LIST_PATTERNS | REGEXES, excluded=st.none() | LIST_PATTERNS | REGEXES)
def test_targets_and_exclusions_select_what_peft_selects(paths, targets, excluded):
    config = LoraConfig(target_modules=targets, exclude_modules=excluded)
    assert list(select(config, paths, paths, strict=False).paths) == peft_selects(config, paths)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    paths=TREES,
    targets=LIST_PATTERNS,
    layers=st.lists(st.sampled_from([0, 1, 12]), min_size=1, max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "block", r"lay.*", "(attn|layers)"]) | st.just(["block", "layers"]),
)
def test_layers_to_transform_selects_what_peft_selects(paths, targets, layers, pattern):
    config = LoraConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
    assert list(select(config, paths, paths, strict=False).paths) == peft_selects(config, paths)


def test_the_shortest_name_begins_with_a_word():
    paths, others = ["h.0.q", "h.0.up", "h.1.q", "h.1.up"], ["h", "h.0", "h.1", "up"]
    assert shortest_names(paths, others) == ["q", "h.0.up", "h.1.up"]
    assert shortest_names(["0", "2"], ["1"]) == ["0", "2"] and shortest_names(["net.0"], ["net"]) == ["net.0"]


@settings(derandomize=True, deadline=None, max_examples=500)
@given(paths=TREES, data=st.data())
def test_the_shortest_names_select_the_same_layers_here_and_in_peft(paths, data):
    chosen = [p for p in paths if data.draw(st.booleans())]
    others = [p for p in paths if p not in chosen]
    assume(chosen and not any(o.endswith(f".{p}") for o in others for p in chosen))  # then no name tells them apart
    names = shortest_names(chosen, others)
    config = LoraConfig(target_modules=names)
    assert list(select(config, paths, paths).paths) == peft_selects(config, paths) == chosen
    assert len(names) <= len(chosen) and not any(name[0].isdigit() for name in names if name not in chosen)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(paths=TREES, targets=LIST_PATTERNS)
def test_strict_selection_raises_exactly_when_a_pattern_misses(paths, targets):
    misses = [t for t in targets if not any(p == t or p.endswith("." + t) for p in paths)]
    config = LoraConfig(target_modules=targets)
    if misses:
        with pytest.raises(TargetError, match=re.escape(repr(misses[0]))):
            select(config, paths, paths)
    else:
        assert set(select(config, paths, paths).paths) <= set(paths)


def test_a_name_that_is_given_as_an_expression_is_told_so():
    with pytest.raises(TargetError, match=r"target_modules: 'q' matched no module; a string is an expression .* \['q'\]"):
        match_patterns("target_modules", "q", ["layers.0.q", "layers.0.k"])
