"""Subclasses for modules of a model that carry adapters, or packed parameters, made so that pickle finds them again.

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
    name = f"{getattr(kind, 'prefix', 'Lora')}{base.__name__}"
    made = type(name, (kind, base), {"__doc__": kind.__doc__, "__module__": __name__})
    # Pickle finds a class by this name, in `__getattr__` below; a dot would mean an attribute to it.
    parts = (kind.__module__, kind.__qualname__, base.__module__, base.__qualname__)
    made.__qualname__ = ":".join(part.replace(".", "/") for part in parts)
    return made


def __getattr__(name: str) -> type[nn.Module]:
    parts = name.split(":", 3)
    if len(parts) != 4:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return subclass(_class(*parts[:2]), _class(*parts[2:]))


def _class(module: str, name: str) -> type[nn.Module]:
    """The class of that name, which may be one of those that are made here, with an adapter on top of it."""
    found = importlib.import_module(module.replace("/", "."))
    return getattr(found, name) if ":" in name else operator.attrgetter(name.replace("/", "."))(found)
