"""Which layers can carry adapters: from a base layer's class to its subclass that does."""

from __future__ import annotations

import functools
import importlib

from torch import nn

from ..bases import is_packed
from ..cpu.products import FastLinear
from .base import LoraLayer
from .conv import LoraConv
from .embedding import LoraEmbedding
from .linear import LoraConv1D, LoraFastLinear, LoraLinear, LoraPacked


def lora_class(module: nn.Module) -> type[LoraLayer] | None:
    """The class that carries adapters on layers of `module`'s exact type; None if there is none.

    A subclass of `nn.Linear` that we don't know may have a forward of its own, which ours would replace: it has none.
    """
    base = type(module)
    if issubclass(base, LoraLayer):
        return base
    if base is nn.Linear:
        return LoraLinear
    if base is FastLinear:
        return LoraFastLinear
    if is_packed(module) and isinstance(module, nn.Linear):
        return _subclass(LoraPacked, base)
    if base.__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' class, which is not imported here
        return _subclass(LoraConv1D, base)
    if base in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1:
        return _subclass(LoraConv, base)
    if base is nn.Embedding and module.max_norm is None:  # max_norm rescales rows of the weight as they are read
        return LoraEmbedding
    return None


@functools.cache
def _subclass(kind: type[LoraLayer], base: type[nn.Module]) -> type[LoraLayer]:
    made = type(f"Lora{base.__name__}", (kind, base), {"__doc__": kind.__doc__, "__module__": __name__})
    # Pickle finds a class by this name, in `__getattr__` below.
    made.__qualname__ = f"{kind.__name__}:{base.__module__.replace('.', '/')}:{base.__qualname__}"
    return made


def __getattr__(name: str) -> type[LoraLayer]:
    kind, *base = name.split(":")
    if len(base) != 2:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, name = base
    return _subclass(globals()[kind], getattr(importlib.import_module(module.replace("/", ".")), name))
