"""Experts that an adapter was trained on in 4 bits: a base with these as they were then, made dense.

A parameter is packed whole, and most files hold its matrices one by one: so these are put together, packed, made dense, and
taken apart again. transformers has no 4-bit form for them, so they stay dense in what is written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..bases import base_for
from ..bases.base import Format
from ..errors import StateError, WrongBaseError
from ..files.checkpoint import Checkpoint
from ..files.fingerprint import describe_layer
from ..files.stored import StoredTensor
from .basis import LOADED, check_line
from .parameters import stored_experts
from .updates import AdapterUpdates


@dataclass(frozen=True)
class TrainedExperts:
    """The experts of a base that adapters were trained on packed.

    Attributes:
        base: the checkpoint, in which they read as they were then.
        paths: of the parameters.
        names: of their tensors in the base.
        loaded: the dtype that the base had before it was packed, as far as they tell.
    """

    base: Checkpoint
    paths: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    loaded: torch.dtype | None = None


@dataclass(frozen=True)
class _Dequantized(StoredTensor):
    """A part of a parameter that was packed: `whole` makes that dense, and `first` is where in it the part begins."""

    whole: Callable[[], Tensor]
    first: int

    def read(self, file: BinaryIO | None = None) -> Tensor:
        return self.whole().view(-1)[self.first :][: math.prod(self.shape)].view(self.shape).clone()

    def chunks(self) -> Any:
        yield memoryview(self.read().to(self.dtype).view(-1).view(torch.uint8).numpy())


def as_trained(base: Checkpoint, adapters: Sequence[AdapterUpdates], loaded: torch.dtype | None) -> TrainedExperts:
    """The base with experts as the adapters were trained on them, by their fingerprints.

    Args:
        base: as its files are.
        adapters: what they say of experts is checked.
        loaded: the dtype that the base had before it was packed, if other layers tell; None: that of its files.

    Raises:
        WrongBaseError: it has other experts. StateError: it holds some under names that are not known.
    """
    dense = functools.lru_cache(maxsize=2)(_dense)  # the files have the parts of two parameters by turns
    asked = {path: (adapter, form) for adapter in adapters for path, form in adapter.packed_experts.items()}
    tensors, names = dict(base.tensors), set()
    first = sorted(asked, key=lambda path: path not in asked[path][0].settings)  # those that an adapter is on tell `loaded`
    for path in first:
        adapter, form = asked[path]
        experts, held = stored_experts(base, path)
        if not held:
            raise StateError(
                f"{adapter.directory.name} was trained with {path} in 4 bits, and what {base.directory} calls that is not "
                "known; merge in memory: load_adapter, then merge_and_unload"
            )
        parts = [base.tensors[name] for name in held]
        if path in adapter.settings:
            loaded = _dtype_before(adapter, path, parts, experts, form)
        whole = functools.partial(dense, tuple(parts), experts, form, loaded)
        starts = [0]
        for name, part in zip(held, parts, strict=True):
            tensors[name] = _Dequantized(part.file, part.dtype, part.shape, part.start, whole, starts[-1])
            starts.append(starts[-1] + math.prod(part.shape))
        names |= set(held)
    return TrainedExperts(replace(base, tensors=tensors), tuple(asked), frozenset(names), loaded)


def _dtype_before(adapter: AdapterUpdates, path: str, parts: Sequence[StoredTensor], experts: int, form: Format) -> torch.dtype:
    """The dtype that a parameter had before it was packed, by the adapter's fingerprint.

    Raises:
        WrongBaseError: it was another parameter.
    """
    problem = None
    for dtype in dict.fromkeys((parts[0].dtype, *LOADED)):
        try:
            check_line(adapter, path, describe_layer(_packed(parts, experts, form, dtype)))
            return dtype
        except WrongBaseError as error:
            problem = problem or error
    raise problem


def _packed(parts: Sequence[StoredTensor], experts: int, form: Format, dtype: torch.dtype | None) -> SimpleNamespace:
    """A parameter, packed, of which these are the parts: itself, or one expert's matrices after the other's, of one width."""
    read = [part.read() for part in parts]
    W = torch.cat(read).view(experts, -1, read[0].shape[-1])
    return SimpleNamespace(weight=base_for(form).pack_stack(W.to(dtype or W.dtype), form))


def _dense(parts: Sequence[StoredTensor], experts: int, form: Format, dtype: torch.dtype | None) -> Tensor:
    held = _packed(parts, experts, form, dtype)
    return base_for(form).dense(held, base_for(form).dense_dtype(held))
