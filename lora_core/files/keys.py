"""The names of an adapter's tensors in PEFT's files. The only owner of them, with the methods that say how theirs end.

Four kinds of names:

    base_model.model.PATH.lora_A.weight         a tensor of one layer (an embedding's ends otherwise)
    base_model.model.experts.base_layer.lora_A.weight      one of a parameter: see `parameter_paths`
    base_model.vera_A                           one that all layers share
    base_model.model.classifier.weight          a tensor of the base that was trained whole
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn

from ..errors import FileFormatError
from ..layers import lora_class
from ..layers.attention import LoraAttention
from ..methods.base import Table
from ..methods.registry import all_tables, method_of
from ..spec.config import LoraConfig
from ..spec.targets import EXPERTS, match_patterns

ROOT = "base_model."
PREFIX = f"{ROOT}model."
TOKENS = "token_adapter"  # what PEFT wraps a layer in of which rows are trained


class Parsed(NamedTuple):
    """What a key says.

    Attributes:
        path: of the layer; "" for a tensor that all layers share; of the tensor itself if it is the base's.
        table: the table that it belongs in; None for a tensor of the base.
        embedding: whether the layer is an embedding.
    """

    path: str
    table: str | None
    embedding: bool = False


def layer_keys(path: str, layer: nn.Module, layers: Collection[str], config: LoraConfig) -> dict[str, str]:
    """{table of a layer: the key of an adapter's tensor there}, for the adapter on `layers`; adopted or not."""
    kind = lora_class(layer)
    return layer_keys_of(kind.file_path(path, layer, layers), kind.embedding_keys, config)


def layer_keys_of(path: str, embedding: bool, config: LoraConfig) -> dict[str, str]:
    """The same, where it is known whether the layer is an embedding."""
    return {
        table.name: f"{PREFIX}{path}.{(embedding and table.embedding_key) or table.key}"
        for table in method_of(config).files(config)
        if not table.shared
    }


def shared_keys(config: LoraConfig) -> dict[str, str]:
    """{shared table: the key of its tensor}."""
    return {table.name: f"{ROOT}{table.key}" for table in method_of(config).files(config) if table.shared}


def token_key(path: str) -> str:
    """The key of the rows that are trained of the layer at `path`."""
    return f"{PREFIX}{path}.{all_tables()['lora_tokens'].key}"


def copy_key(path: str, layers: Collection[str], tokens: Collection[str] = ()) -> str:
    """The key of a tensor of the base: its own path, but inside of PEFT's wrapper of each layer that is adapted.

    Args:
        path: of the tensor.
        layers: paths of those with A and B.
        tokens: paths of those of which rows are trained.
    """
    *modules, name = path.split(".")
    owner, found = "", PREFIX
    for module in modules:
        owner = f"{owner}.{module}" if owner else module
        inside = "base_layer." if owner in layers else f"{TOKENS}.base_layer." if owner in tokens else ""
        found += f"{module}.{inside}"
    return f"{found}{name}"


def base_path(path: str) -> str:
    """The path of a tensor of the base, from what `parse_key` says, which may be inside of PEFT's wrapper of a layer."""
    owner, _, name = path.rpartition(".")
    return f"{owner.removesuffix('.base_layer').removesuffix(f'.{TOKENS}')}.{name}"


def owner_path(path: str) -> str:
    """The path whose settings a layer in an adapter's keys has: its own; of attention's second weight, the attention's."""
    attention, _, name = path.rpartition(".base_layer.")
    return attention if attention and name in LoraAttention.parts else path


def parameter_paths(paths: Iterable[str], config: LoraConfig, source: object) -> dict[str, str]:
    """{path of a layer in an adapter's keys: path of the parameter that it is for}, of those that are for one.

    PEFT wraps a module once for each adapted parameter, in their order, so its keys tell them by their depth alone.

    Raises:
        FileFormatError: a module has several, and their order is not known.
    """
    wrapped: dict[str, dict[int, str]] = defaultdict(dict)  # {module: {depth: path}}
    for path in paths if config.target_parameters else ():
        outer, *inner = path.split(".base_layer")
        if not any(inner):
            wrapped[outer][len(inner)] = path
    names, found = {entry.rpartition(".")[2] for entry in config.target_parameters or ()}, {}
    for outer, levels in wrapped.items():
        if any(match_patterns("target_modules", config.target_modules or (), [outer], strict=False).values()):
            continue
        held = [f"{outer}.{name}" for name in names]
        hits = match_patterns("target_parameters", config.target_parameters, held, strict=False)
        here = list(set().union(*hits.values()))
        known = len(here) < 2 or all(path.rpartition(".")[2] in EXPERTS for path in here)
        if here and (sorted(levels) != list(range(len(here))) or not known):
            raise FileFormatError(
                f"{source}: {outer} has {len(levels)} updates of parameters, and which of {', '.join(sorted(here))} they are "
                "for depends on its model; load the adapter there (load_adapter), and use merge_and_unload"
            )
        if len(here) > 1:
            here.sort(key=lambda path: EXPERTS.index(path.rpartition(".")[2]), reverse=True)
        found |= {levels[depth]: path for depth, path in enumerate(here)}
    return found


def parse_key(key: str) -> Parsed | None:
    """What a key means; None if it does not start as PEFT's do."""
    tables = all_tables()
    shared, ends, layer = _forms(tuple(tables.values()))
    if key in shared:
        return Parsed("", shared[key])
    if not key.startswith(PREFIX):
        return None
    path = key.removeprefix(PREFIX)
    match = layer.fullmatch(path)
    if match is None:
        return Parsed(path, None)
    name = ends[match["end"]]
    return Parsed(match["path"], name, match["end"] == tables[name].embedding_key)


@functools.lru_cache(maxsize=8)
def _forms(tables: tuple[Table, ...]) -> tuple[dict[str, str], dict[str, str], re.Pattern[str]]:
    """({key: name} of shared tables, {end of a key: name} of a layer's, the expression for "path.end"): asked for often."""
    tables = tuple(table for table in tables if table.key)
    shared = {f"{ROOT}{table.key}": table.name for table in tables if table.shared}
    ends = {end: table.name for table in tables if not table.shared for end in (table.key, table.embedding_key) if end}
    return shared, ends, re.compile(rf"(?P<path>.+)\.(?P<end>{'|'.join(map(re.escape, ends))})", re.DOTALL)


def with_path(key: str, old: str, new: str) -> str:
    """The key of a tensor of the module `new` that has the key `key` where that module is called `old`."""
    return f"{PREFIX}{new}{key.removeprefix(f'{PREFIX}{old}')}"


def unwrapped_key(key: str) -> str:
    """The key without what DistributedDataParallel and torch.compile put before the names of what they wrap."""
    return re.sub(rf"^((module|_orig_mod)\.)+(?={re.escape(ROOT)})", "", key)
