"""Name patterns -> module paths, with a hit count for each pattern. Strings only: no torch.

A list entry matches the module of exactly that path, or any path that ends in `.entry`; a string is a regular
expression that must match the whole path. A pattern that matches nothing is an error that names what comes closest:
a misspelt target must not pass because another one matched.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import TargetError
from .config import ALL_LINEAR, LoraConfig
from .patterns import END, layer_of, matches, spending

#: What the heads of pretrained models are called. They are trained whole or not at all; never quantised.
HEAD_NAMES = ("classifier", "pre_classifier", "score", "qa_outputs", "lm_head", "embed_out")

#: {what transformers 4 called the layers of an expert: the parameter of transformers 5 that has them in it}.
FUSED = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | dict.fromkeys(("down_proj", "w2"), "down_proj")

#: The parameters that fused experts are held in, in the order in which the classes of transformers 5 make them.
EXPERTS = ("gate_proj", "gate_up_proj", "up_proj", "w1", "v1", "down_proj", "w2")


@dataclass(frozen=True)
class LayerPlan:
    """What a configuration means for one layer. It is worked out once, and carried to whatever asks.

    Attributes:
        owner: the path that its settings are for: its own, or that of the layer that it goes with.
        r: rank.
        scaling: s, the factor before B A.
    """

    owner: str
    r: int
    scaling: float

    @classmethod
    def of(cls, config: LoraConfig, owner: str) -> LayerPlan:
        return cls(owner, config.rank_for(owner), config.scaling_for(owner))


@dataclass(frozen=True)
class Targets:
    """The layers that a configuration selects.

    Attributes:
        layers: {path: what it means there}: paths of modules, and then of parameters, each in model order.
        hits: {pattern: number of paths it matched, before exclusions}.
    """

    layers: Mapping[str, LayerPlan]
    hits: Mapping[str, int]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.layers)


def select_targets(
    config: LoraConfig,
    paths: Sequence[str],
    linear: Collection[str],
    saved: Collection[str],
    strict: bool = True,
    parameters: Sequence[str] = (),
) -> Targets:
    """The paths that `config` targets.

    Args:
        config: whose `target_modules`, `exclude_modules`, `layers_to_transform` and patterns decide.
        paths: every module path of the model, in order.
        linear: those of linear layers, which `"all-linear"` takes, less any that HEAD_NAMES names.
        saved: paths of modules trained whole; they and what is inside them are never targets.
        strict: raise for a pattern that matches nothing; else leave it with zero hits.
        parameters: every path of a parameter, in order, of which `target_parameters` names some.

    Raises:
        TargetError: no targets are given, a pattern matches nothing, or nothing is left after exclusions.
    """
    targets = config.target_modules
    if targets is None and not config.target_parameters:
        raise TargetError(f"target_modules is not set; name the layers to adapt, or pass {ALL_LINEAR!r}")
    free = [p for p in paths if not _inside(p, saved)]
    if targets == ALL_LINEAR:
        chosen = [p for p in free if p in linear and not is_head(p)]
        hits = {ALL_LINEAR: len(chosen)}
    else:
        try:
            found = match_patterns("target_modules", targets or (), free, strict, parameters)
        except TargetError:
            _refuse_saved(targets, paths, saved)
            raise
        hits = {pattern: len(hit) for pattern, hit in found.items()}
        matched = set().union(*found.values())
        chosen = [p for p in free if p in matched]
    excluded = excluded_paths(config, paths, strict)
    chosen = [p for p in chosen if p not in excluded]
    chosen = [p for p in chosen if in_selected_layer(config, p)]
    found = _select_parameters(config, parameters, excluded, strict)
    hits |= {pattern: len(hit) for pattern, hit in found.items()}
    matched = {p for hit in found.values() for p in hit if not _inside(p, saved)}
    chosen += [p for p in parameters if p in matched]
    layers = {path: LayerPlan.of(config, path) for path in chosen}
    if not strict:
        return Targets(layers, hits)
    if not chosen:
        raise TargetError(
            f"target_modules {targets!r} leaves no layer to adapt; "
            "check exclude_modules, modules_to_save, and layers_to_transform (a list of layers at the top of the model "
            "must be named in layers_pattern)"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(matches(pattern, p, END) for p in chosen):
                raise TargetError(
                    f"{field}: {pattern!r} matched none of the {len(chosen)} adapted layers{closest(pattern, chosen)}"
                )
    return Targets(layers, hits)


def _select_parameters(
    config: LoraConfig, parameters: Sequence[str], excluded: Collection[str], strict: bool
) -> dict[str, list[str]]:
    """{entry of `target_parameters`: the paths it matches}. In PEFT nothing thins them out."""
    found = match_patterns("target_parameters", config.target_parameters or (), parameters, strict)
    paths = [p for hit in found.values() for p in hit]
    if strict and paths and config.layers_to_transform is not None:
        raise TargetError(
            f"layers_to_transform chooses among modules, not parameters; name these whole in target_parameters ({paths[0]!r})"
        )
    if strict and (out := next((p for p in paths if _inside(p, excluded)), None)):
        raise TargetError(f"exclude_modules excludes a module around {out!r}, which target_parameters names; leave one out")
    return found


def _inside(path: str, modules: Collection[str]) -> bool:
    """Whether `path` is one of these, or inside one."""
    return any(path == m or path.startswith(f"{m}.") for m in modules)


def excluded_paths(config: LoraConfig, paths: Sequence[str], strict: bool = True) -> set[str]:
    """The paths that `exclude_modules` matches.

    Raises:
        TargetError: `strict`, and a pattern matches nothing.
    """
    if config.exclude_modules is None:
        return set()
    return set().union(*match_patterns("exclude_modules", config.exclude_modules, paths, strict).values())


def match_patterns(
    field: str, patterns: str | Iterable[str], paths: Sequence[str], strict: bool = True, parameters: Sequence[str] = ()
) -> dict[str, list[str]]:
    """{pattern: the paths it matches}; a string is one regular expression, anything else a collection of names.

    Raises:
        TargetError: `strict`, and a pattern matches no path; names `field`, the pattern and the closest names, or that it is
            one of `parameters`.
    """
    hits = _hits(field, patterns, paths)
    for pattern, found in hits.items():
        if strict and not found:
            hint = _as_names(pattern, paths) if isinstance(patterns, str) else ""
            if held := _hits(field, patterns, parameters)[pattern]:
                hint = f"; {held[0]} is a parameter, as fused experts are, and goes in target_parameters"
            fused = f".experts.{FUSED.get(pattern.rpartition('.')[2])}"
            if held := [p for p in parameters if p.endswith(fused)]:
                hint = f"; transformers 5 holds experts in parameters, such as {held[0]}, which go in target_parameters"
            noun = "parameter" if field == "target_parameters" else "module"
            raise TargetError(f"{field}: {pattern!r} matched no {noun}{hint or closest(pattern, paths, noun)}")
    return hits


def _hits(field: str, patterns: str | Iterable[str], paths: Sequence[str]) -> dict[str, list[str]]:
    if isinstance(patterns, str):
        return {patterns: [p for p in paths if matches(patterns, p)]}
    hits = {}
    for name in patterns:
        with spending(field):
            hits[name] = [p for p in paths if p == name or p.endswith(f".{name}")]
    return hits


def _refuse_saved(targets: str | Sequence[str] | None, paths: Sequence[str], saved: Collection[str]) -> None:
    """Raises a TargetError for a pattern that matches what is trained whole, and nothing else."""
    for pattern, hit in match_patterns("target_modules", targets or (), paths, strict=False).items():
        if hit and all(_inside(path, saved) for path in hit):
            raise TargetError(
                f"target_modules: {pattern!r} is trained whole (modules_to_save, or a task_type); leave it out of one of them"
            )


def match_saved_modules(patterns: Iterable[str], optional: Collection[str], paths: Sequence[str]) -> tuple[str, ...]:
    """The paths of the modules to train whole: those that end with a pattern, as bare text, as PEFT matches them.

    A module inside another that matched is left out: it is trained with its parent. A pattern in `optional` (a head that
    a task type may bring) may match nothing.

    Raises:
        TargetError: another pattern matches nothing.
    """
    found: set[str] = set()
    optional = set(optional)
    for pattern in patterns:
        with spending("modules_to_save"):
            hits = [p for p in paths if p.endswith(pattern)]
        if not hits and pattern not in optional:
            raise TargetError(f"modules_to_save: {pattern!r} matched no module{closest(pattern, paths)}")
        found.update(hits)
    return tuple(p for p in paths if p in found and not any(p.startswith(f"{outer}.") for outer in found))


def shortest_names(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names that match `paths` and none of `others`: of each path the shortest end that will do, each once.

        ["h.0.q", "h.0.up", "h.1.q", "h.1.up"], ["h", "h.0", "h.1", "up"]      ->  ["q", "h.0.up", "h.1.up"]

    None begins with a layer's number. PEFT shortens long lists alike (`find_minimal_target_modules`).
    """
    taken = {end for path in others for end in _ends(path)}
    ends = ((path, [end for end in _ends(path) if end not in taken and not end[0].isdigit()]) for path in paths)
    return list(dict.fromkeys(min(found, key=len, default=path) for path, found in ends))


def _ends(path: str) -> Iterator[str]:
    """The path, and what is left of it after each dot."""
    while path:
        yield path
        path = path.partition(".")[2]


def in_selected_layer(config: LoraConfig, path: str) -> bool:
    """Whether `path` lies in a layer that `layers_to_transform` names, by PEFT's rules; True when it is not set."""
    wanted, names = config.layers_to_transform, config.target_modules or ()
    if wanted is None or path in names:  # a whole path says its layer itself
        return True
    lists = config.layers_pattern
    if lists is None:
        lists = r"[^.]*\.[^.]*"  # any list, but not one at the top of the model
    # The first numbered segment counts: in "model.layers.1.experts.0.w" the layer is 1.
    found = (layer_of(name, path) for name in ((lists,) if isinstance(lists, str) else lists))
    first = next((layer for layer in found if layer is not None), None)
    return first == wanted if isinstance(wanted, int) else first in wanted


def is_head(path: str) -> bool:
    """Whether `path` is a module that HEAD_NAMES names, or inside one (RoBERTa's `classifier.dense`)."""
    return not set(path.split(".")).isdisjoint(HEAD_NAMES)


def is_embedding(path: str) -> bool:
    """Whether a module of this path is an embedding, by the names that transformers gives them."""
    return any("embed" in part or part in ("wte", "wpe", "shared", "relative_attention_bias") for part in path.split("."))


def _as_names(expression: str, paths: Sequence[str]) -> str:
    """What to write where an expression matches no whole path, and means names; "" if it does not."""
    names = [name for name in re.split(r"[,|\s]+", expression.strip("()[]")) if name]
    if names and all(any(p == name or p.endswith(f".{name}") for p in paths) for name in names):
        return f"; a string is an expression for the whole path, names go in a list: {names}"
    if any(matches(expression, p, END) for p in paths):
        return f"; a string is an expression for the whole path: {f'.*({expression})'!r} matches what ends so"
    return ""


def closest(pattern: str, paths: Sequence[str], noun: str = "module") -> str:
    """The names, as deep as the pattern, that look most like it, as the end of a message: "; closest: 'q_lin' (6 modules)"."""
    depth = pattern.count(".") + 1
    names = Counter(".".join(p.split(".")[-depth:]) for p in paths if p)
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if not close:
        example = max(paths, key=len, default="")
        return f"; {noun} paths look like {example!r}" if example else f"; the model has no such {noun}s"
    return "; closest: " + ", ".join(f"{n!r} ({names[n]} {noun}{'s' * (names[n] > 1)})" for n in close)
