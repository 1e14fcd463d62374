"""Subclasses that carry adapters, made for the classes of a model's own modules, so that pickle finds them again.

Example:

    subclass(LoraLinear, MyLinear)      # class LoraMyLinear(LoraLinear, MyLinear)
"""

from __future__ import annotations

import functools
import importlib
import operator

from torch import nn


@functools.cache
def subclass(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with what `kind` does to it; `kind` itself where that is one already."""
    if issubclass(kind, base):
        return kind
    made = type(f"Lora{base.__name__}", (kind, base), {"__doc__": kind.__doc__, "__module__": __name__})
    # Pickle finds a class by this name, in `__getattr__` below; a dot would mean an attribute to it.
    parts = (kind.__module__, kind.__qualname__, base.__module__, base.__qualname__)
    made.__qualname__ = ":".join(part.replace(".", "/") for part in parts)
    return made


def __getattr__(name: str) -> type[nn.Module]:
    parts = name.replace("/", ".").split(":")
    if len(parts) != 4:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind, base = (operator.attrgetter(parts[i + 1])(importlib.import_module(parts[i])) for i in (0, 2))
    return subclass(kind, base)
