"""What adapters do to a model besides its weights: ties that no longer hold, and what the model says of itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .atomic import Record
from .conventions import configs, own_config
from .copies import base_tensors, copy_tensor, get_tensor, original_of, submodule
from .replicate import first_of


@dataclass
class Broken(Record):
    """What untying a model changed, to be put back by `tie_again`.

    Attributes:
        tensors: {path: the tensor that was there}, where another has its place now.
        flags: `tie_word_embeddings` of each of the model's `configs`.
        keys: its `all_tied_weights_keys`, transformers' list of what is tied to what.
    """

    tensors: dict[str, Tensor]
    flags: list[bool]
    keys: dict[str, str] | None


def ties(root: nn.Module) -> dict[int, list[str]]:
    """{where it starts in memory: the paths}, of each tensor of the base that has several paths, but for `replicate`'s."""
    paths, first = defaultdict(list), first_of(root)
    for path in base_tensors(root):
        if (place := original_of(root, path).data_ptr()) != 0:
            paths[place].append(path)
    return {place: tied for place, tied in paths.items() if len(set(map(first, tied))) > 1}


def untie(root: nn.Module, ties: Iterable[Sequence[str]], changed: Container[str]) -> tuple[tuple[str, ...], Broken]:
    """Gives each path of a tie that the adapters have broken a tensor of its own, and has the model say that it is one.

    Also the paths that still are one: no library ties some of what its model ties, and not the rest.

    Returns:
        The paths, of those, that the adapters changed, and what it takes to tie them again.
    """
    untied, tensors_before = [], {}
    for paths in ties:
        tensors = {path: get_tensor(root, path) for path in paths}
        if len({tensor.data_ptr() for tensor in tensors.values()}) > 1:
            # What waits while an adapter's is in place goes into a file too, and there no two may be one.
            places = {original_of(root, path).data_ptr() for path in paths if original_of(root, path) is not tensors[path]}
            for path, tensor in tensors.items():
                if tensor.data_ptr() in places:
                    tensors_before[path] = tensor
                    _put(root, path, copy_tensor(tensor))
                places.add(tensor.data_ptr())
            untied += [path for path in paths if path in changed]
    before = forget_ties(root, untied)
    before.tensors.update(tensors_before)
    return tuple(untied), before


def tie_again(root: nn.Module, before: Broken) -> None:
    """The reverse of `untie` and of `forget_ties`."""
    for path, tensor in before.tensors.items():
        _put(root, path, tensor)
    for config, tied in zip(configs(root), before.flags, strict=True):
        if tied:
            config.tie_word_embeddings = True
    if before.keys is not None:
        root.all_tied_weights_keys.update(before.keys)


def _put(root: nn.Module, path: str, tensor: Tensor) -> None:
    parent, _, name = path.rpartition(".")
    setattr(submodule(root, parent), name, tensor)


def forget_ties(root: nn.Module, untied: Collection[str]) -> Broken:
    """Takes off a transformers model what says that these weights are tied: it would save one of them, and tie them again.

    Returns:
        What it takes to say so again.
    """
    ties = root.__dict__.get("all_tied_weights_keys")
    flags = [getattr(config, "tie_word_embeddings", False) for config in configs(root)]
    before = Broken({}, flags, dict(ties) if ties else None)
    if not untied:
        return before
    if any(flags):
        own_config(root)
    for config in configs(root):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    for path in [p for p, source in ties.items() if p in untied or source in untied] if ties else ():
        del ties[path]
    return before
