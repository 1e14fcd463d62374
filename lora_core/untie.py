"""What a merge does to a model besides its weights: ties that no longer hold, and what the model says of itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import nn

from .copies import base_tensors, copy_tensor, get_tensor, original_of, submodule


def ties(root: nn.Module) -> dict[int, list[str]]:
    """{where it starts in memory: the paths}, of each tensor of the base that has several paths."""
    paths = defaultdict(list)
    for path in base_tensors(root):
        if (place := original_of(root, path).data_ptr()) != 0:
            paths[place].append(path)
    return {place: tied for place, tied in paths.items() if len(tied) > 1}


def untie(root: nn.Module, ties: Iterable[Sequence[str]], changed: Container[str]) -> tuple[str, ...]:
    """Gives each path of a tie that the adapters have broken a tensor of its own; the paths, of those, that they changed.

    Also the paths that still are one: no library ties some of what its model ties, and not the rest.
    """
    untied = []
    for paths in ties:
        tensors = {path: get_tensor(root, path) for path in paths}
        if len({tensor.data_ptr() for tensor in tensors.values()}) > 1:
            places = set()
            for path, tensor in tensors.items():
                if tensor.data_ptr() in places:
                    parent, _, name = path.rpartition(".")
                    setattr(submodule(root, parent), name, copy_tensor(tensor))
                places.add(tensor.data_ptr())
            untied += [path for path in paths if path in changed]
    return tuple(untied)


def forget_quantization(root: nn.Module) -> None:
    """Takes off a transformers model what says that its weights are 4-bit: it would save, move and load as such."""
    root.__dict__.pop("hf_quantizer", None)
    for flag in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        root.__dict__.pop(flag, None)
    if hasattr(getattr(root, "config", None), "quantization_config"):
        del root.config.quantization_config


def forget_ties(root: nn.Module, untied: Iterable[str]) -> None:
    """Takes off a transformers model what says that these weights are tied: it would save one of them, and tie them again."""
    if not untied:
        return
    for config in configs(root):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    ties = root.__dict__.get("all_tied_weights_keys")
    for path in [p for p, source in ties.items() if p in untied or source in untied] if ties else ():
        del ties[path]


def configs(root: nn.Module) -> list[Any]:
    """The configuration of a transformers model, and that of its language model if it has one of its own."""
    config = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return [c for c in (config, text) if hasattr(c, "__dict__")]
