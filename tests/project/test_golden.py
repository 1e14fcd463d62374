"""What the package does is what it did when the files in `tests/golden` were written; `support/golden.py` says how they are."""

import json

import pytest

from tests.support.golden import DIRECTORY, FACTS, differences, expand


@pytest.mark.parametrize("name", FACTS)
def test_it_does_what_it_did(name):
    stored = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    # As JSON has it: a tuple is a list there.
    found = json.loads(json.dumps(FACTS[name]()))
    changed = list(differences(expand(stored["facts"], stored["texts"]), found))
    assert not changed, "\n".join([f"{len(changed)} facts differ", *changed[:20]])


def test_there_is_no_file_of_something_else():
    assert {path.stem for path in DIRECTORY.iterdir()} == set(FACTS)


@pytest.mark.parametrize(
    ("found", "count"),
    [
        ({"a": [1.0, 1e-5], "float64": [1.0]}, 0),
        ({"a": [1.0, 2e-4], "float64": [1.0]}, 1),
        ({"a": [1.0, 0.0], "float64": [1.0 + 1e-6]}, 1),
        ({"a": [1.0], "float64": [1.0]}, 1),
        ({"a": "refused: ConfigError", "float64": [1.0]}, 1),
        ({"b": [1.0, 0.0], "float64": [1.0]}, 2),
    ],
)
def test_what_counts_as_another_fact(found, count):
    assert len(list(differences({"a": [1.0, 0.0], "float64": [1.0]}, found))) == count
