"""Does a server serve the adapter, the base alone, or something else? It is asked for the probe's completions.

    print(verify_server("adapter/", "http://localhost:8000", model="my-adapter"))

The probe holds what the model said with the adapter and without it, and how likely it held the five likeliest tokens at each
place. A server is what it is much nearer to than to the other, if that is near enough: by the mean difference of those
log-probabilities, as far as the tokens are the same. Two adapters for one task may say the same and differ in that alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, FileFormatError, one_line
from ..spec.checks import check_tolerance
from .completions import Completions, Differing, prompts_of
from .probe import Probe, read_probe
from .server import TIME_LIMIT, Answer, Place, Prompt, Server

ADAPTER, BASE, OTHER, EITHER = "the adapter", "the base alone", "something else", "the adapter or the base"
#: The mean difference of a log-probability that passes: see docs/llm.md for what servers, dtypes and other adapters give.
TOLERANCE = 0.15
#: How many times nearer to the one than to the other a server must be.
PARTED = 4
#: The share of prompts that must be answered alike, where nothing but text is to be had.
ALIKE = 0.9
END = "the end"
#: In the text of a token that is a part of a letter: it does not say which.
PART = "\ufffd"


@dataclass(frozen=True)
class Nearness:
    """How near a server's answers are to those of a model.

    Attributes:
        alike: how many prompts it answers with the same tokens.
        deviation: the mean difference of a log-probability, each answer counting as much; None if the server tells none.
        differing: where each other answer leaves the model's.
    """

    alike: int
    deviation: float | None
    differing: tuple[Differing, ...]

    def __str__(self) -> str:
        by = "" if self.deviation is None else f", log-probabilities off by {self.deviation:.2g} on average"
        return f"{self.alike} of {self.alike + len(self.differing)} answers are the same{by}"


@dataclass(frozen=True)
class Serving:
    """What `verify_server` found.

    Attributes:
        model: the name that was asked for.
        serves: "the adapter", "the base alone", "something else"; "the adapter or the base" if the probe does not part them.
        adapter, base: how near it is to either.
        tolerance: what a deviation may be.
        notes: what else is to be known, a line each.
    """

    model: str
    serves: str
    adapter: Nearness
    base: Nearness
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it serves the adapter."""
        return self.serves == ADAPTER

    def __str__(self) -> str:
        rows = {"with the adapter": self.adapter, "the base alone": self.base}
        lines = [f"{what:<18}{near}" for what, near in rows.items()]
        return "\n".join([*lines, *map(one_line, self.notes), f"{one_line(self.model)} serves {self.serves}"])


def verify_server(
    adapter: str | Path, url: str, model: str | None = None, tolerance: float | None = None, seconds: float = TIME_LIMIT
) -> Serving:
    """Asks an OpenAI-compatible server for the completions of an adapter's probe.

    Args:
        adapter: its directory, with the probe of a language model.
        url: where the server is, such as http://localhost:8000.
        model: the name to ask for; None: the only one, or that of the adapter's directory.
        tolerance: the mean difference of a log-probability that passes; None: 0.15.
        seconds: how long one answer may take.

    Raises:
        ConfigError: an argument is not allowed, or the server has several models and none is named.
        FileFormatError: there is no probe, or none of a language model.
        ServerError: the server can't be asked, or its answers are none.
    """
    tolerance = TOLERANCE if tolerance is None else tolerance
    check_tolerance("tolerance", tolerance)
    directory, server = Path(adapter), Server(url, seconds)
    probe = read_probe(directory)
    if probe.adapter is None or probe.base is None:
        raise FileFormatError(f"{directory}: its probe holds no completions; save_probe keeps them for language models")
    name = _chosen(server.models(), model, directory, url)
    prompts = [tuple(prompt.tolist()) for prompt in prompts_of(probe.inputs)]
    texts = probe.texts or [None] * len(prompts)
    size = max(probe.adapter.tokens.shape[1], probe.base.tokens.shape[1])
    answers = [server.complete(name, Prompt(*pair), size) for pair in zip(prompts, texts, strict=True)]
    adapted, base = (nearness(said, answers, probe.pieces) for said in (probe.adapter, probe.base))
    return Serving(name, _verdict(adapted, base, tolerance), adapted, base, tolerance, _notes(probe, answers, prompts))


def _chosen(names: Sequence[str], model: str | None, directory: Path, url: str) -> str:
    listed = ", ".join(names[:20])
    if model is not None:
        if model not in names:
            raise ConfigError(f"{url} serves no {model!r}; it serves {listed}")
        return model
    own = directory.resolve().name
    if len(names) > 1 and own not in names:
        raise ConfigError(f"{url} serves {listed}; say which with --model")
    return names[0] if len(names) == 1 else own


def _verdict(adapter: Nearness, base: Nearness, tolerance: float) -> str:
    if adapter.deviation is None:
        fit = [who for who, n in ((ADAPTER, adapter), (BASE, base)) if n.alike >= ALIKE * (n.alike + len(n.differing))]
        return {0: OTHER, 2: EITHER}.get(len(fit)) or fit[0]
    (near, who), (far, _) = sorted([(adapter.deviation, ADAPTER), (base.deviation, BASE)])
    if near <= tolerance and near <= far / PARTED:
        return who
    return EITHER if far <= tolerance else OTHER


def _notes(probe: Probe, answers: Sequence[Answer], prompts: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    found = []
    read = [a.read for a, prompt in zip(answers, prompts, strict=True) if a.read is not None and a.read != len(prompt)]
    if read:
        found.append(f"tokenizer: the server reads other tokens for {len(read)} of {len(prompts)} prompts")
    if any(answer.places is None for answer in answers):
        found.append("the server tells no log-probabilities, so two adapters that say the same are not told apart")
    if probe.quantized:
        found.append("the adapter was trained on a packed base: a server is as near as its base is to that")
    return tuple(found)


# --- one completion beside another ------------------------------------------------------------------------------------


def nearness(said: Completions, answers: Sequence[Answer], pieces: Mapping[int, str]) -> Nearness:
    """How near a server's answers are to what a model said."""
    differing, means = [], []
    for row, answer in enumerate(answers):
        tokens, likeliest = said[row]
        if answer.places is None:
            where = _text_differs(row, answer.text, tokens, pieces)
        else:
            differences: list[float] = []
            where = _walk(row, answer.places, tokens, likeliest, pieces, differences)
            if differences:
                means.append(sum(differences) / len(differences))
        if where is not None:
            differing.append(where)
    deviation = sum(means) / len(means) if means else None
    return Nearness(len(answers) - len(differing), deviation, tuple(differing))


def _walk(
    row: int,
    places: Sequence[Place],
    tokens: Sequence[int],
    likeliest: Sequence[Mapping[int, float]],
    pieces: Mapping[int, str],
    differences: list[float],
) -> Differing | None:
    """Where the tokens of a server leave a model's; up to there, and there, the log-probabilities are compared."""
    for at, (token, ours) in enumerate(zip(tokens, likeliest, strict=True)):
        if at == len(places):  # the token that ends an answer may be left out
            return None if at == len(tokens) - 1 else Differing(row, at, pieces.get(token, token), END, None)
        place = places[at]
        theirs = place.likeliest
        named = {one: one if one in theirs else pieces.get(one, "") for one in ours}
        named = {one: name for one, name in named.items() if isinstance(name, int) or PART not in name}
        for one, name in named.items():
            if name in theirs:
                differences.append(abs(theirs[name] - ours[one]))
            elif theirs:  # less likely there than all that are named: it differs by that at least
                differences.append(max(0.0, ours[one] - min(theirs.values())))
        if place.token not in (token, pieces.get(token)):
            other = next((one for one, name in named.items() if name == place.token), None)
            margin = None if other is None or token not in ours else ours[token] - ours[other]
            return Differing(row, at, pieces.get(token, token), pieces.get(place.token, place.token), margin)
    more = len(places) > len(tokens)
    return Differing(row, len(tokens), END, places[len(tokens)].token, None) if more else None


def _text_differs(row: int, text: str, tokens: Sequence[int], pieces: Mapping[int, str]) -> Differing | None:
    if not pieces:
        raise FileFormatError("the server tells text alone, and the probe has none; save it with save_probe(..., tokenizer)")
    for at, token in enumerate(tokens):
        piece = pieces.get(token, "")
        if not text.startswith(piece):
            return None if not text and at == len(tokens) - 1 else Differing(row, at, piece, text[:20] or END, None)
        text = text.removeprefix(piece)
    return Differing(row, len(tokens), END, text[:20], None) if text else None
