"""Reading an adapter of whatever format, for a base: what `load_adapter`, `inspect` and `convert` do with a format.

Example:

    form, files, others = read_any(Path("adapters.safetensors"), hints, lambda: base_of_model(model))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ConfigError, FileFormatError
from ...layers import lora_class
from ...model.registry import unwrap
from ..adapter import AdapterFiles, read_adapter
from ..checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, open_checkpoint, read_header
from ..disk import is_file
from ..reading import read_object
from .base import AdapterFormat, Base, Contents
from .peft import as_peft
from .registry import find_format, is_peft
from .shared import check_factors
from .source import Source

#: The weights of one model of a diffusion pipeline.
PIPELINE_WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_any(
    path: Path, hints: Mapping[str, Any] | None, known: Callable[[], Base]
) -> tuple[AdapterFormat | None, AdapterFiles, tuple[str, ...]]:
    """(whose format, or None for PEFT's; what it holds for the base; what it holds besides).

    Args:
        path: the file, or the directory with it.
        hints: what the user said of it.
        known: what is known of the base; asked for another tool's file alone.

    Raises:
        FileFormatError: it is no adapter, is broken, or is not the base's; says what can't be mapped.
    """
    found = None if is_peft(path) else find_format(path)
    if found is None:
        if hints:
            raise ConfigError(f"hints are for other tools' files, and {path} is none")
        return None, read_adapter(path), ()
    (form, source), base = found, known()
    contents = read_contents(form, source, base)
    _check_that_alpha_is_said(form, source, contents, base)
    contents = form.to_base(contents, base)
    return form, as_peft(source, contents, base), contents.others


def read_contents(form: AdapterFormat, source: Source, base: Base) -> Contents:
    """What a file holds, by its tool's names, checked by itself."""
    contents = form.read(source, base)
    check_factors(source, contents)
    for path, layer in contents.layers.items():
        if extra := sorted(layer.tensors.keys() - set(form.holds)):
            raise FileFormatError(f"{source}: {path} has {', '.join(extra)}, which is not read from {form.tool}'s files")
    kinds = {frozenset(layer.tensors) for layer in contents.layers.values()}
    if len(kinds) > 1:
        raise FileFormatError(f"{source}: some layers have more tensors than others; an adapter has the same on all")
    return contents


def check_holds(form: AdapterFormat, contents: Contents, source: object) -> None:
    """Raises a ConfigError if a format has no place for what an adapter has."""
    for path, layer in contents.layers.items():
        if extra := sorted(layer.tensors.keys() - set(form.holds)):
            raise ConfigError(
                f"{form.tool} has no place for {', '.join(extra)} ({path}); make it plain LoRA first "
                f"(python -m lora_core convert {source} --plain --base BASE --output NEW)"
            )
    if contents.biases and "biases" not in form.holds:
        raise ConfigError(f"{form.tool} has no place for trained biases, which {source} has; merge it instead")


def base_of_model(model: nn.Module, hints: Mapping[str, Any] | None = None) -> Base:
    """What a model says of itself."""
    root = unwrap(model)
    shapes, embeddings = {}, set()
    for path, module in root.named_modules():
        kind = lora_class(module) if path else None
        if kind is None:
            continue
        weight = getattr(module, kind.weight_name, None)
        d_in, d_out = kind.matrix_shape(module)
        shapes[path] = tuple(weight.shape) if weight is not None and weight.dim() > 2 else (d_out, d_in)
        if kind.embedding_keys:
            embeddings.add(path)
    config = getattr(root, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else {}
    return Base(_of_text(said), shapes, frozenset(embeddings), dict(hints or {}))


def base_of_directory(directory: Path | None, hints: Mapping[str, Any] | None = None) -> Base:
    """What a base's files say: config.json, and the shapes of the weights if they are there."""
    if directory is None:
        return Base(hints=dict(hints or {}))
    config, shapes, embeddings = read_object(directory / CONFIG_FILE), {}, set()
    if any(is_file(directory / name) for name in (WEIGHTS_FILE, INDEX_FILE, PIPELINE_WEIGHTS)):
        single = directory / PIPELINE_WEIGHTS
        held = read_header(single) if is_file(single) else open_checkpoint(directory).tensors
        for name, tensor in held.items():
            path, _, end = name.rpartition(".")
            if end == "weight" and len(tensor.shape) > 1:
                shapes[path] = tensor.shape
                if path.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings"):
                    embeddings.add(path)
    return Base(_of_text(config), shapes, frozenset(embeddings), dict(hints or {}))


def _check_that_alpha_is_said(form: AdapterFormat, source: Source, contents: Contents, base: Base) -> None:
    """Raises unless either the file or the user says what alpha is, and not both."""
    if any(layer.alpha is None for layer in contents.layers.values()):
        raise FileFormatError(
            f"{source}: {form.tool}'s files don't say lora_alpha, nor does one beside it; say it as it was in training "
            "(hints={'lora_alpha': 16}, --lora-alpha 16)"
        )
    hints = dict(base.hints)
    if (asked := hints.pop("lora_alpha", None)) is not None:
        said = [layer.alpha for layer in form.read(source, replace(base, hints=hints)).layers.values()]
        if None not in said:
            raise ConfigError(f"{source} says alpha {said[0]:g} itself; leave lora_alpha={asked:g} out")


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model, where it stands inside of another's."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "num_attention_heads" not in config else config
