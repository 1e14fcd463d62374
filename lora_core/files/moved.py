"""Adapters of a model whose modules have other names by now: transformers renames them, wrappers come and go.

    language_model.model.layers.0.self_attn.q_proj      in the file of a PaliGemma from before transformers 4.52
    model.language_model.layers.0.self_attn.q_proj      the same layer today

A path of the file that the model has not is looked up in transformers' own table of renamings. Where that says nothing, it is
the one module of the model with the same numbered end (`layers.0.self_attn.q_proj`), if nothing but whole parts before that
were added, left out or swapped: an adapter of "bert.encoder" is not taken for one of "roberta.encoder". Two such modules are
an error that names both. What torch.compile puts into names is passed over. The patterns of the configuration were written for
the names of then, and decide by these.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..errors import FileFormatError
from ..layers import lora_class
from ..model.conventions import renaming
from ..model.plan import base_modules
from ..spec.config import LoraConfig
from ..spec.patterns import limited
from ..spec.targets import match_saved_modules, select_targets
from .keys import Parsed, parse_key, with_path


@dataclass(frozen=True)
class Moved:
    """What an adapter's files say, by the names of the model at hand.

    Attributes:
        config: the settings. Where names have moved, `target_modules` lists whole paths.
        tensors: {key: tensor}.
        names: {path of a module: what the file calls it}, of those that have moved.
        absent: layers that the patterns mean too, in parts of the model that the file says nothing of.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    names: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def follow_names(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], source: object) -> Moved:
    """What the files say, by the names of `model`; as it is where all names are there, or can't be found.

    Raises:
        FileFormatError: a name could be either of two modules, or two are one module by now.
    """
    modules = base_modules(model)
    parsed = {key: found for key in tensors if (found := parse_key(key)) is not None and found.path}
    paths = list(dict.fromkeys(_module_of(found) for found in parsed.values()))
    if all(path in modules for path in paths if path):
        return Moved(config, tensors)
    kinds = {path: kind for path, module in modules.items() if (kind := lora_class(module)) is not None}
    here = {path: path for path in modules} | {kind.file_path(path, modules[path], ()): path for path, kind in kinds.items()}
    lost = [path for path in paths if path and path not in here]
    if not lost:
        return Moved(config, tensors)
    renamed, compiled = renaming(model), {_uncompiled(path): path for path in here}
    found = {path: new for path in lost if (new := compiled.get(_uncompiled(path)) or renamed(path)) in here}
    taken = {*paths, *found.values()}
    found |= by_their_ends([path for path in lost if path not in found], [path for path in here if path not in taken], source)
    if not found:
        return Moved(config, tensors)
    if config.target_parameters and (config.rank_pattern or config.alpha_pattern):
        raise FileFormatError(
            f"{source}: modules of this model have other names, {lost[0]!r} for one, and which parameters its rank_pattern and "
            "alpha_pattern mean can't be told; load it onto the model that it was trained on"
        )
    names: dict[str, str] = {}
    for old, new in ((old.replace(".base_layer", ""), here[new]) for old, new in found.items()):
        if new in names:
            raise FileFormatError(f"{source}: {names[new]!r} and {old!r} are both {new!r} on this model; it is of another one")
        names[new] = old
    moved = {}
    for key, tensor in tensors.items():
        old = _module_of(parsed[key]) if key in parsed else None
        moved[with_path(key, old, found[old]) if old in found else key] = tensor
    held = {here.get(found.get(p.path, p.path)) for p in parsed.values() if p.table is not None}
    settled, absent = by_new_names(config, list(modules), names, held)
    means = settled.target_modules or settled.target_parameters
    return Moved(settled, moved, names, absent) if means else Moved(config, tensors)


def warn_of_moved(source: object, moved: Moved) -> None:
    """Says by an example that names were found elsewhere, and what is left without an adapter."""
    for new, old in list(moved.names.items())[:1]:
        absent = moved.absent
        left = f"; {len(absent)} layers, {absent[0]!r} among them, are in parts that it says nothing of" if absent else ""
        warnings.warn(
            f"{source} calls {len(moved.names)} modules otherwise than this model, {new!r} for one: {old!r}{left}", stacklevel=7
        )


def _module_of(parsed: Parsed) -> str:
    """The path of the module that a tensor is of, as the file has it; of a parameter's the module around that."""
    path = parsed.path if parsed.table is not None else parsed.path.rpartition(".")[0]
    return path.removesuffix(".base_layer") if parsed.table is None else re.sub(r"(\.base_layer)+$", "", path)


def by_their_ends(lost: Sequence[str], modules: Sequence[str], source: object) -> dict[str, str]:
    """{path that is lost: the only one of `modules` that it may be by now}."""
    groups, places = defaultdict(list), defaultdict(set)
    for path in lost:
        groups[_split(path)[0]].append(_split(path)[1])
    for path in modules:
        places[_split(path)[1]].add(_split(path)[0])
    found = {}
    for start, ends in groups.items():
        starts = set.intersection(*(places[end] for end in ends))
        fits = sorted(new for new in starts if _same_parts(start, new))
        if len(fits) > 1:
            could = " or ".join(repr(_join(new, ends[0])) for new in fits[:3])
            raise FileFormatError(
                f"{source}: this model has no {_join(start, ends[0])!r}, which could be {could}; load it onto the model that "
                "it was trained on, or rename its tensors"
            )
        found |= {_join(start, end): _join(fits[0], end) for end in ends if fits}
    return found


def _split(path: str) -> tuple[tuple[str, ...], str]:
    """(what stands before the list that the path goes through first, the rest); of a path without one all but the last."""
    parts = path.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts))
    return tuple(parts[: max(at - 1, 0)]), ".".join(parts[max(at - 1, 0) :])


def _join(start: Sequence[str], end: str) -> str:
    return ".".join((*start, end))


def _same_parts(old: Collection[str], new: Collection[str]) -> bool:
    """Whether one is the other with parts added, or in another order."""
    return set(old) <= set(new) or set(new) <= set(old)


def by_new_names(
    config: LoraConfig, modules: Sequence[str], names: Mapping[str, str], held: Collection[str]
) -> tuple[LoraConfig, tuple[str, ...]]:
    """The configuration with whole paths, and layers that it means in parts of the model that the file says nothing of.

    Args:
        config: whose patterns mean names of the file.
        modules: paths of the model's modules.
        names: {path of a module: what the file calls it}, of those that have moved.
        held: paths of the modules that the file has an adapter for.
    """
    starts = dict(_starts(new, old) for new, old in names.items())
    alike = {_numberless(new): _numberless(old) for new, old in names.items() if _numbers(new) == _numbers(old)}
    old = {path: names.get(path) or _renamed(path, starts, alike) for path in modules}
    with limited():
        saved = match_saved_modules(config.saved_module_patterns, config.saved_module_patterns, list(old.values()))
        chosen = set(select_targets(config, list(old.values()), (), saved, strict=False).paths)
        meant = [path for path in modules if old[path] in chosen]
        # What the file has a part of, it must have all of.
        parts = tuple(f"{start}." for start in starts if start)
        absent = tuple(p for p in meant if p not in held and not p.startswith(parts) and _numberless(p) not in alike)
        targets = tuple(path for path in meant if path not in absent)
        ranks = {path: config.rank_for(old[path]) for path in targets}
        alphas = {path: config.alpha_for(old[path]) for path in targets}
    new = {name: path for path, name in old.items()}
    return dataclasses.replace(
        config,
        target_modules=targets or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=tuple(new[path] for path in saved) or None,
        rank_pattern={path.replace(".", r"\."): r for path, r in ranks.items() if r != config.r},
        alpha_pattern={path.replace(".", r"\."): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    ), absent


def _starts(new: str, old: str) -> tuple[str, str]:
    """What differs in two paths before their common end."""
    a, b = new.split("."), old.split(".")
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)


def _renamed(path: str, starts: Mapping[str, str], alike: Mapping[str, str]) -> str:
    """What the file would call a module of this path."""
    if _numberless(path) in alike:
        numbers = iter(_numbers(path))
        return ".".join(next(numbers) if part == "#" else part for part in alike[_numberless(path)].split("."))
    inside = [start for start in starts if start and path.startswith(f"{start}.")]
    longest = max(inside, key=len, default=None)
    return path if longest is None else f"{starts[longest]}{path[len(longest) :]}".lstrip(".")


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]


def _numberless(path: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def _uncompiled(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
