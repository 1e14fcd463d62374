"""What stands beside merged weights: config.json, the tokenizer's files and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bases import base_for
from ..bases.base import Format
from ..files.checkpoint import CONFIG_FILE, TOKENIZER_CONFIG, TOKENIZER_FILES, Checkpoint
from ..integrations.tied_names import OUTPUT_LAYERS
from ..methods.registry import method_of
from ..model.merge import MergeReport
from .recipe import packing_of
from .updates import AdapterUpdates

CARD = "README.md"
GENERATION_CONFIG = "generation_config.json"


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


def write_companions(directory: Path, base: Checkpoint, adapters: Sequence[AdapterUpdates], result: Result) -> None:
    """Writes and copies them into `directory`. A tokenizer that came with an adapter goes before the base's."""
    (directory / CONFIG_FILE).write_text(json.dumps(_config(result), indent=2) + "\n", encoding="utf-8")
    (directory / CARD).write_text(_card(base, adapters, result), encoding="utf-8")
    sources = [*(adapter.directory for adapter in adapters), base.directory]
    tokenizer = next((source for source in sources if (source / TOKENIZER_CONFIG).is_file()), base.directory)
    for pattern in TOKENIZER_FILES:
        for path in tokenizer.glob(pattern):
            shutil.copyfile(path, directory / path.name)
    if (base.directory / GENERATION_CONFIG).is_file():
        shutil.copyfile(base.directory / GENERATION_CONFIG, directory / GENERATION_CONFIG)


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
    name = Path(name).name if name and Path(name).is_absolute() else name or base.directory.name
    packing, repacks = packing_of(result.base_as)
    if packing is None:
        into = "the base's weights as they were"
    elif repacks:
        into = f"what the adapters were trained against; the result is packed in {packing.label}"
    else:
        into = f"the base's weights packed in {packing.label} and unpacked again, as QLoRA trained against them"
    listed = "\n".join(
        f"- `{a.directory.name}`: rank {a.config.r}, alpha {a.config.lora_alpha:g}"
        f"{label and ', '}{label}, {len(a.layers)} layers"
        + (f"; whole: {', '.join(sorted(a.copies))}" if a.copies else "")
        for a, label in ((a, method_of(a.config).label) for a in adapters)
    )
    return (
        f"---\nlibrary_name: transformers\nbase_model: {name}\nbase_model_relation: finetune\n---\n\n"
        f"# {name} with LoRA adapters merged in\n\nMerged by lora-core, in float32, cast once to {_name(result.dtype)}.\n\n"
        f"{listed}\n\nFolded into {into}.\n\nM{str(result.report)[1:]}.\n"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
