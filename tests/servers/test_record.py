"""The record of a run of `make test-servers` that is kept here: every prompt is accounted for, and enough of them agree."""

import json

import pytest

from tests.support import ROOT

RECORD = json.loads((ROOT / "tests" / "servers" / "record.json").read_text(encoding="utf-8"))
COMPARED = [(server, name, one) for server, found in RECORD["servers"].items() for name, one in found["models"].items()]


@pytest.mark.parametrize(("server", "name", "one"), COMPARED, ids=[f"{server}: {name}" for server, name, _ in COMPARED])
def test_enough_prompts_agree_and_those_that_differ_are_named(server, name, one):
    assert one["agree"] >= 48 and RECORD["dtype"] == "float32"
    differing = one["differing"]
    assert one["agree"] + len(differing) == len(RECORD["prompts"]) == 50
    assert all(0 <= each["prompt"] < 50 and each["margin"] is not None for each in differing)


def test_each_server_was_told_for_what_it_served():
    expected = {"base": "the base alone", "a": "the adapter", "merged": "the adapter", "b": "something else"}
    told = [(name, one) for found in RECORD["servers"].values() for name, one in found["verify"].items()]
    assert told and all(one["serves"] == expected[name] for name, one in told)


def test_the_tokens_of_each_model_are_there():
    for rows in RECORD["tokens"].values():
        assert len(rows) == 50 and all(rows)
    assert RECORD["tokens"]["a"] != RECORD["tokens"]["base"]
