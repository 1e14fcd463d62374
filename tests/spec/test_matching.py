"""Sets of places against `re`: the same texts match, whatever the pattern; and nothing takes long."""

import re
import time

import pytest
from hypothesis import given, settings, strategies as st

from lora_core import LoraConfig
from lora_core.errors import TargetError
from lora_core.spec.matching import Text, Unsupported, compiled
from lora_core.spec.patterns import END, WHOLE, layer_of, limited, matches, refusal, spending

ATOMS = ["a", "b", "B", ".", r"\.", r"\d", r"\w", r"\s", r"\b", r"\B", "^", "$", r"\A", r"\Z", "[ab]", "[^a]", "(?!)", "é", "İ"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{2,3}", "{0}"]


def larger(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(REPEATS)).map("(?:{0[0]}){0[1]}".format),
        st.tuples(st.sampled_from(["(?=", "(?!", "(?i:", "(?s:", "(?m:", "(?-i:", "("]), inner).map("{0[0]}{0[1]})".format),
        st.sampled_from(["(?<=a)", "(?<!b)", "(?<=a.)", r"(?<=\b)", "(?<!ab)"]),
    )


def leads_to_the_end(pattern, text):
    return bool(compiled(pattern)(Text(text, lambda: None), 1, False) >> len(text))


@settings(derandomize=True, deadline=None, max_examples=1_500)
@given(
    pattern=st.recursive(st.sampled_from(ATOMS), larger, max_leaves=7),
    flags=st.sampled_from(["", "(?i)", "(?s)", "(?m)", "(?a)", "(?x)"]),
    texts=st.lists(st.text("abB.0 \né\u0130", max_size=6), min_size=4, max_size=8),
)
def test_what_re_matches_and_nothing_else(pattern, flags, texts):
    pattern = flags + pattern
    expression = re.compile(pattern)
    for text in texts:
        assert leads_to_the_end(pattern, text) == bool(expression.fullmatch(text)), (pattern, text)


@pytest.mark.parametrize("pattern", ["(a)\\1", "(a)?(?(1)b|c)", "(?P<x>a)(?P=x)"])
def test_what_refers_back_is_left_to_re_where_it_is_the_users_own(pattern):
    with pytest.raises(Unsupported):
        compiled(pattern)
    assert "refers back" in refusal(pattern)
    expression = re.compile(pattern)
    for text in ("aa", "ab", "c", "a", ""):
        assert matches(pattern, text) == bool(expression.fullmatch(text))


@pytest.mark.parametrize("pattern", ["q", "layers.0.q", ".q", "..q", "a|b", r"\w+", "(q|v)$", ".*q"])
def test_the_end_of_a_path_stands_after_a_dot(pattern):
    expression = re.compile(END.format(pattern))
    for path in ("q", "x.q", "xq", "x.yq", "layers.0.q", "m.layers.0.q", "layersx0.q", "a", "x.b", "", "v.q", "x.q\n", ".\nq"):
        assert matches(pattern, path, END) == bool(expression.match(path)), path


@pytest.mark.parametrize("pattern", ["layers", "h", "(layers|blocks)", r"layers\.\d+\.blocks", "(?:layers|(l)\\1)"])
def test_the_first_number_after_a_list_of_layers(pattern):
    expression = re.compile(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.")
    for path in ("layers.3.q", "m.layers.12.layers.4.q", "m.h.0.attn", "blocks.7.x", "m.layers.1.blocks.2.q", "ll.5.q", ""):
        match = expression.match(path)
        assert layer_of(pattern, path) == (int(match["layer"]) if match else None), path


SLOW = [
    "(a+)+b",
    r"(\w+\.?)+x",
    "(.*)*x",
    "(a|a)*x",
    "(.|.)" * 60 + "x",
    ".?" * 60 + "x",
    ".*" * 500 + "x",
    "(.?){60}x",
    "((){10000}){10000}x",
    "(?=(a*)*b)a*",
    "(?:(?:(?:a*b?)*c?)*d?)*x",
    "(?:(?:.{0,1000}b?){0,1000}c?){0,1000}x",
    "(?:a{0,9}){0,9999}" * 99 + "x",
    ".*a.*a.*b",
]


@pytest.mark.parametrize("form", [WHOLE, END])
@pytest.mark.parametrize("pattern", SLOW, ids=lambda p: p[:24])
def test_what_has_more_ways_than_there_is_time_is_matched_at_once(pattern, form):
    assert refusal(pattern, form) is None
    for path in ("a" * 1_000, "." * 1_000, "a." * 500):
        start = time.thread_time()
        assert not matches(pattern, path, form)
        assert time.thread_time() - start < 0.5


def test_matching_stops_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr("lora_core.spec.patterns.MAX_SECONDS", 0.01)
    with limited(), pytest.raises(TargetError, match=r"the pattern '\(a\|b\)\*x' takes too long"):
        for _ in range(10**6):
            matches("(a|b)*x", "ab" * 500)
    with limited(), pytest.raises(TargetError, match=r"'a\|b' takes too long"):
        for _ in range(10**6):
            matches("q", "a.q", END)
        matches("a|b", "a.q", END)
    with limited(), pytest.raises(TargetError, match="'names' takes too long"), spending("'names'") as tick:
        while True:
            tick()
    assert not matches("(a|b)*x", "ab" * 500)  # outside of such a context a user's own time is not counted


def test_a_configuration_takes_any_expression_of_the_users_own():
    assert LoraConfig(target_modules=r"(q)_\1", rank_pattern={"(?P<x>v)_(?P=x)": 4}).rank_for("x.v_v") == 4
