"""A model's own layers, made of what costs less on a CPU: the same meaning, and other kernels.

Example:

    use_fast_linear(model)       # nn.Linear, by oneDNN where that is faster: see `cpu/products.py`
    use_fast_dropout(model)      # nn.Dropout, with masks that are cheap to draw: see `cpu/dropout.py`
"""

from __future__ import annotations

from torch import nn

from ..bases.forwards import change_class, is_hidden
from ..cpu.dropout import FastDropout
from ..cpu.products import FastLinear
from .wrappers import check_model


def use_fast_linear(model: nn.Module) -> int:
    """Makes every `nn.Linear` of `model` a `FastLinear`, in place; returns how many there were.

    Those that carry adapters already, and 4-bit ones, which multiply by `product` anyway, are left alone: call it first. So is
    one with a forward of its own on the instance, which would hide the new one.
    """
    check_model(model)
    layers = [m for m in model.modules() if type(m) is nn.Linear and not is_hidden(m)]
    for layer in layers:
        change_class(layer, FastLinear)
    return len(layers)


def use_fast_dropout(model: nn.Module) -> int:
    """Makes every `nn.Dropout` of `model` a `FastDropout`, in place; returns how many there were.

    One with a forward of its own on the instance, which would hide the new one, is left alone.
    """
    check_model(model)
    layers = [m for m in model.modules() if type(m) is nn.Dropout and not is_hidden(m)]
    for layer in layers:
        change_class(layer, FastDropout)
    return len(layers)
