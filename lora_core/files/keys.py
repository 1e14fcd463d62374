"""The names of an adapter's tensors in PEFT's files. The only owner of them, with the methods that say how theirs end.

    base_model.model.PATH.lora_A.weight         a tensor of one layer (an embedding's ends otherwise)
    base_model.vera_A                           one that all layers share
    base_model.model.classifier.weight          a tensor of the base that was trained whole
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import NamedTuple

from ..layers import LoraLayer
from ..methods.base import Table
from ..methods.registry import all_tables, method_of
from ..spec.config import LoraConfig

ROOT = "base_model."
PREFIX = f"{ROOT}model."


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


def layer_keys(path: str, kind: type[LoraLayer], config: LoraConfig) -> dict[str, str]:
    """{table of a layer: the key of an adapter's tensor there}."""
    return layer_keys_of(kind.file_path(path), kind.embedding_keys, config)


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


def copy_key(path: str, layers: Collection[str]) -> str:
    """The key of a trained copy: the tensor's own path, but for the bias of an adapted layer, which PEFT wraps."""
    owner, _, name = path.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{name}" if owner in layers else f"{PREFIX}{path}"


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
