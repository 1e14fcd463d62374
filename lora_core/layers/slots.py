"""A parameter of a module, seen as a layer: what fused experts are packed and adapted through."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..cpu.traced import is_traced

#: The child of a module that holds the slots of its parameters with adapters.
SLOTS = "lora_weights"
#: What transformers calls the implementations of experts that multiply by functions of torch alone; others need a tensor.
_BY_TORCH = (None, "eager", "batched_mm", "grouped_mm")


class ParameterSlot(nn.Module):
    """A parameter of a module, seen as a layer: it has a `weight`, and no forward.

    Args:
        host: the module.
        name: of its parameter.
    """

    def __init__(self, host: nn.Module, name: str) -> None:
        super().__init__()
        self.place = (host, name)  # in a tuple, or the host would be a part of its own part

    def __getattr__(self, name: str) -> Any:
        if name != "weight":
            return super().__getattr__(name)
        host, own = self.place
        return host._parameters[own] if own in host._parameters else getattr(host, own)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            host, own = self.place
            host._parameters[own] = value
        else:
            super().__setattr__(name, value)


def slot_of(host: nn.Module, name: str) -> ParameterSlot:
    """The slot of a parameter: the one with adapters if it has any, else a new one.

    Raises:
        KeyError: the module has no such parameter.
    """
    slots = host._modules.get(SLOTS, {})
    if name in slots:
        return slots[name]
    if name not in host._parameters:
        raise KeyError(name)
    return ParameterSlot(host, name)


def takes_stand_ins(host: nn.Module) -> bool:
    """Whether the forward of a module multiplies by functions of torch that ask their operands how: see `maths/standin.py`."""
    implementation = getattr(getattr(host, "config", None), "_experts_implementation", None)
    return implementation in _BY_TORCH and not is_traced()
