"""Golden files: what is in `tests/golden`, how it is written and how it is compared.

    python -m tests.support.golden --write       # writes them again, after a change of behaviour that is meant

Each file is JSON: facts by name, where a text of some length is kept once in "texts" and stands as "#" and its number. Texts,
hashes and flags must be equal; lists of numbers must be near, as `golden_layers.BASES` says.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.support import ROOT
from tests.support.golden_api import api_facts
from tests.support.golden_layers import BASES, KINDS, layer_facts
from tests.support.golden_models import MODELS, model_facts
from tests.support.golden_starts import start_facts

DIRECTORY = ROOT / "tests" / "golden"
#: A text that is longer is kept once.
LONG = 24
#: {file: how to find out what is in it now}
FACTS: dict[str, Callable[[], dict[str, Any]]] = {"api": api_facts, "starts": start_facts}
FACTS |= {f"layer-{kind.replace(' ', '-')}": partial(layer_facts, kind) for kind in KINDS}
FACTS |= {f"model-{name.replace(' ', '-')}": partial(model_facts, name) for name in MODELS}


def differences(expected: Any, found: Any, where: str = "", tolerance: float = 1e-4) -> Iterator[str]:
    """One line for each fact that is another, new or gone."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            near = BASES[key].tolerance if key in BASES else tolerance
            yield from differences(expected.get(key, "absent"), found.get(key, "absent"), f"{where}/{key}", near)
    elif not _near(expected, found, tolerance):
        yield f"{where}: was {expected}, is {found}"


def _near(expected: Any, found: Any, tolerance: float) -> bool:
    both = (expected, found)
    if not all(isinstance(values, list) and values and all(type(v) is float for v in values) for values in both):
        return expected == found
    allowed = tolerance * max(map(abs, expected))
    return len(expected) == len(found) and all(abs(a - b) <= allowed for a, b in zip(*both, strict=True))


def shorten(facts: Any, texts: list[str]) -> Any:
    """The facts with a number in place of each long text, which is in `texts` then."""
    if isinstance(facts, dict):
        return {key: shorten(value, texts) for key, value in facts.items()}
    if not isinstance(facts, str) or len(facts) <= LONG:
        return facts
    if facts not in texts:
        texts.append(facts)
    return f"#{texts.index(facts)}"


def expand(facts: Any, texts: list[str]) -> Any:
    """The inverse of `shorten`."""
    if isinstance(facts, dict):
        return {key: expand(value, texts) for key, value in facts.items()}
    return texts[int(facts[1:])] if isinstance(facts, str) and facts.startswith("#") else facts


def write() -> None:
    """Writes every file, one line for each method, so that a change can be read in a diff."""
    for path in DIRECTORY.glob("*.json"):
        path.unlink()
    for name, facts in FACTS.items():
        texts: list[str] = []
        short = {"texts": texts, "facts": shorten(facts(), texts)}
        (DIRECTORY / f"{name}.json").write_text(_dump(short) + "\n", encoding="utf-8")


def _dump(value: Any, depth: int = 3) -> str:
    if not depth or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, list):
        return "[\n" + ",\n".join(_dump(v, depth - 1) for v in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(k)}:{_dump(v, depth - 1)}" for k, v in value.items()) + "\n}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
