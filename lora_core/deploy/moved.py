"""Adapters and checkpoints with other names for the same modules: transformers renames them, and its files keep the old ones.

    model.language_model.layers.0.self_attn.q_proj      in an adapter of a LLaVA that transformers 5 has loaded
    language_model.model.layers.0.self_attn.q_proj      in that model's files, which an adapter from transformers 4 has too

Both are brought to what transformers calls the module in memory, by its own table; where that says nothing, by the one end that
they have in common, as in `files/moved.py`. The adapter is then merged under the names of the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import FileFormatError
from ..files.checkpoint import Checkpoint
from ..files.moved import by_new_names, by_their_ends
from ..integrations.model_class import ModelClass, known_class
from ..integrations.tied_names import may_be_tied
from .placement import architecture_of, prefixed
from .updates import AdapterUpdates


def follow(base: Checkpoint, adapter: AdapterUpdates) -> AdapterUpdates:
    """The adapter by the names of a base; as it is where all names are there, with or without a prefix, or can't be found.

    Raises:
        FileFormatError: a name could be either of two modules, or two are one.
    """
    layers = {path: update.weight for path, update in adapter.layers.items() if not update.is_parameter}
    sure = [name for name in layers.values() if not may_be_tied(name)]  # to be in the files
    if not sure or prefixed(base, sure) is not None:
        return adapter
    lost = [path for path, name in layers.items() if name in sure and name not in base.tensors]
    here = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    known = known_class(base.directory, architecture_of(base.config))
    of_now = {_now(known, path): path for path in here}
    found = {path: of_now[_now(known, path)] for path in lost if _now(known, path) in of_now}
    rest = [path for path in lost if path not in found]
    found |= by_their_ends(rest, [p for p in here if p not in {*found.values(), *adapter.layers}], adapter.directory)
    if not found:
        return adapter
    names: dict[str, str] = {}
    for old, new in found.items():
        if new in names or new in adapter.layers:
            same = f"{names.get(new, new)!r} and {old!r} are both {new!r} in {base.directory}"
            raise FileFormatError(f"{adapter.directory}: {same}; use the base it was trained on")
        names[new] = old
    tensors = {_now(known, name): name for name in base.tensors}

    def of_base(name: str) -> str:
        """What the base calls a tensor that the adapter has whole."""
        owner, _, end = name.rpartition(".")
        moved = f"{found[owner]}.{end}" if owner in found else tensors.get(_now(known, name), name)
        return name if name in base.tensors else moved

    return _renamed(adapter, base, names, lambda path: found.get(path, path), of_base)


def _now(known: ModelClass | None, name: str) -> str:
    """What transformers calls a module or tensor of this name in memory."""
    if known is None or name in known.tensors or f"{name}.weight" in known.tensors:
        return name
    return known.renamed(name)


def _renamed(
    adapter: AdapterUpdates,
    base: Checkpoint,
    names: Mapping[str, str],
    module: Callable[[str], str],
    tensor: Callable[[str], str],
) -> AdapterUpdates:
    """The adapter with other names for its modules and whole tensors; `names` are {the base's: its own}."""
    modules = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    above = {".".join(path.split(".")[:n]) for path in modules for n in range(1, path.count(".") + 2)}
    config, _ = by_new_names(adapter.config, sorted(above), names, {module(path) for path in adapter.layers})

    def renamed(held: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
        return {change(name): value for name, value in held.items()}

    layers = {module(path): dataclasses.replace(update, path=module(path)) for path, update in adapter.layers.items()}
    return dataclasses.replace(
        adapter,
        config=config,
        layers=layers,
        copies=renamed(adapter.copies, tensor),
        base_tensors=renamed(adapter.base_tensors, tensor),
        tokens=renamed(adapter.tokens, lambda path: tensor(f"{path}.weight").removesuffix(".weight")),
        kept=frozenset(map(tensor, adapter.kept)),
        called=names,
    )


def moved_names(adapters: Iterable[AdapterUpdates]) -> dict[str, str]:
    """{path in the base: what an adapter calls it}."""
    return {new: old for adapter in adapters for new, old in adapter.called.items()}
