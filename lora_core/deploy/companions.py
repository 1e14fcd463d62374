"""What stands beside merged weights: config.json, the tokenizer's files and a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ..bases import base_for
from ..bases.base import Format
from ..errors import FileFormatError, one_line
from ..files.checkpoint import CONFIG_FILE, TOKENIZER_CONFIG, TOKENIZER_FILES, Checkpoint
from ..files.reading import open_file, read_bytes
from ..integrations.tied_names import OUTPUT_LAYERS
from ..methods.registry import method_of
from ..model.merge import MergeReport
from .recipe import packing_of
from .updates import AdapterUpdates

CARD = "README.md"
GENERATION_CONFIG = "generation_config.json"
#: Bytes of all that goes along; the largest tokenizers have some forty million.
MAX_SIZE = 2**29


@dataclass(frozen=True)
class Result:
    """A merge, as far as its description needs it.

    Attributes:
        config: the model's configuration.
        dtype: of the floating-point weights.
        base_as: what the adapters were folded into.
        form: of packed weights; None if there are none.
        dense: paths of the layers that are not packed.
        report: what it cost.
    """

    config: dict[str, Any]
    dtype: torch.dtype
    base_as: str
    form: Format | None
    dense: tuple[str, ...]
    report: MergeReport


def companions(directory: Path, names: Sequence[str]) -> list[Path]:
    """The files in a directory that match `names`, to be copied along. Each is its own: a regular file in the directory, or in
    the Hub's cache that the directory belongs to, which is made of links.

    Raises:
        FileFormatError: one is something else, or lies elsewhere, or they are too large.
    """
    found, size = sorted(p for p in directory.iterdir() if any(fnmatchcase(p.name, name) for name in names)), 0
    home = Path(os.path.realpath(directory))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in found:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(home) for home in homes):
            raise FileFormatError(f"{path} is a link to {real}, outside of its directory; if it is meant, copy it there")
        with open_file(path) as file:
            size += os.fstat(file.fileno()).st_size
        if size > MAX_SIZE:
            raise FileFormatError(f"{path} and what else goes along have {size:,} bytes, and {MAX_SIZE:,} are allowed")
    return found


def copy_companions(paths: Sequence[Path], directory: Path) -> None:
    """Copies them into `directory`.

    Raises:
        FileFormatError: one can't be read.
    """
    for path in paths:
        (directory / path.name).write_bytes(read_bytes(path, MAX_SIZE))


def companions_of_merge(base: Checkpoint, adapters: Sequence[AdapterUpdates]) -> list[Path]:
    """What is copied beside merged weights. A tokenizer that came with an adapter goes before the base's.

    Raises:
        FileFormatError: as `companions`; also of config.json, whose content is written again.
    """
    sources = [*(adapter.directory for adapter in adapters), base.directory]
    tokenizer = next((source for source in sources if (source / TOKENIZER_CONFIG).exists()), base.directory)
    companions(base.directory, [CONFIG_FILE])
    return companions(tokenizer, TOKENIZER_FILES) + companions(base.directory, [GENERATION_CONFIG])


def write_companions(directory: Path, base: Checkpoint, adapters: Sequence[AdapterUpdates], result: Result) -> None:
    """Writes and copies them into `directory`."""
    (directory / CONFIG_FILE).write_text(json.dumps(_config(result), indent=2) + "\n", encoding="utf-8")
    (directory / CARD).write_text(_card(base, adapters, result), encoding="utf-8")
    copy_companions(companions_of_merge(base, adapters), directory)


def _config(result: Result) -> dict[str, Any]:
    dtype = _name(result.dtype)
    config = {key: value for key, value in result.config.items() if key != "torch_dtype"} | {"dtype": dtype}
    if result.form is None:
        return config
    # Output layers too that the file does not hold, since they are tied: transformers would pack them.
    skipped = tuple(dict.fromkeys((*result.dense, *OUTPUT_LAYERS)))
    return config | {"quantization_config": base_for(result.form).quantization_config(result.form, skipped, dtype)}


def _card(base: Checkpoint, adapters: Sequence[AdapterUpdates], result: Result) -> str:
    name = next((a.config.base_model_name_or_path for a in adapters if a.config.base_model_name_or_path), None)
    name = one_line(Path(name).name if name and Path(name).is_absolute() else name or base.directory.name)
    packing, repacks = packing_of(result.base_as)
    if packing is None:
        into = "the base's weights as they were"
    elif repacks:
        into = f"what the adapters were trained against; the result is packed in {packing.label}"
    else:
        into = f"the base's weights packed in {packing.label} and unpacked again, as QLoRA trained against them"
    listed = "\n".join(
        f"- {_quoted(a.directory.name)}: rank {a.config.r}, alpha {a.config.lora_alpha:g}"
        f"{label and ', '}{label}, {len(a.layers)} layers"
        + (f"; whole: {', '.join(map(_quoted, sorted(a.copies)))}" if a.copies else "")
        for a, label in ((a, method_of(a.config).label) for a in adapters)
    )
    return (
        f"---\nlibrary_name: transformers\nbase_model: {json.dumps(name)}\nbase_model_relation: finetune\n---\n\n"
        f"# {_quoted(name)} with LoRA adapters merged in\n\n"
        f"Merged by lora-core, in float32, cast once to {_name(result.dtype)}.\n\n"
        f"{listed}\n\nFolded into {into}.\n\n{_quoted('M' + str(result.report)[1:])}.\n"
    )


def _quoted(text: str) -> str:
    """A text out of a file as code in Markdown, where it is no more than a text."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
