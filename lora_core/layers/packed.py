"""Packed parameters that are no layer's weight, as the fused experts of a mixture are.

    model.layers.0.mlp.experts.gate_up_proj        packed: (E, d_out, d_in) in one parameter with its scales

The module around them keeps its forward, and reads a parameter as ever: what it gets is dense for one product, one matrix of
the stack where no more is asked for, and again for its gradient (`maths/packed.py`). A state dict has the scales beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import base_of, base_of_weight, is_packed
from ..bases.base import Base, Format
from ..maths.loss import Cost, cost
from ..maths.packed import PackedWeight
from .base import LoraLayer
from .slots import slot_of, takes_stand_ins
from .subclass import subclass


class PackedHost(nn.Module):
    """A module some of whose parameters are packed, and read as dense ones.

    Attributes:
        packed_host_class: the module's own class.
        packed_compute: {name of a parameter: the dtype that products with it are computed in}.
    """

    prefix = "Packed"

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        packed = name in self._parameters and base_of_weight(found).packed
        return _read(self, name, found) if packed else found

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for name in packed_names(self):
            held = SimpleNamespace(weight=self._parameters[name])
            base_of(held).follow(held, fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in packed_names(self):
            held = SimpleNamespace(weight=self._parameters[name])
            parts = base_of(held).state(held)
            destination |= {f"{prefix}{name}{part.removeprefix('weight')}": t for part, t in parts.items() if part != "weight"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        for name in packed_names(self):
            base_of_weight(self._parameters[name]).revive(self._parameters[name])


def packed_names(module: nn.Module) -> list[str]:
    """The parameters of a module's own that are packed, and no layer's weight."""
    return [n for n, p in module._parameters.items() if base_of_weight(p).packed] if isinstance(module, PackedHost) else []


def packed_experts(model: nn.Module) -> dict[str, str]:
    """{path of a packed parameter: how it is packed}, whether or not adapters are folded into it now."""
    found = {}
    for path, module in model.named_modules():
        for name in module.packed_compute if isinstance(module, PackedHost) else ():
            slot = slot_of(module, name)
            folded = isinstance(slot, LoraLayer) and slot.lora_folded
            held = SimpleNamespace(weight=slot.lora_unfolded[0] if folded else slot.weight)
            found[f"{path}.{name}".lstrip(".")] = str(base_of(held).format_of(held))
    return found


def holds_packed(module: nn.Module) -> bool:
    """Whether a module's own weight or one of its parameters is packed."""
    return is_packed(module) or bool(packed_names(module))


def pack_parameters(
    host: nn.Module, names: Iterable[str], base: Base, form: Format, compute_dtype: torch.dtype | None = None
) -> None:
    """Packs parameters of a module, (E, p, q) each, in place.

    Args:
        host: the module. It becomes a `PackedHost`, of its own class still.
        names: of the parameters.
        base: what holds them then.
        form: how.
        compute_dtype: what products are computed in; None: the parameter's dtype.
    """
    if not isinstance(host, PackedHost):
        own = type(host)
        host.__class__ = subclass(PackedHost, own)  # with the forward of its own, whoever calls that
        host.packed_host_class, host.packed_compute = own, {}
    for name in names:
        W = host._parameters[name].detach()
        host._parameters[name] = base.pack_stack(W, form)
        host.packed_compute[name] = compute_dtype or W.dtype


def unpack_parameters(host: PackedHost) -> None:
    """The reverse: plain parameters with what was computed with, and the module's own class."""
    for name in packed_names(host):
        held = SimpleNamespace(weight=host._parameters[name])
        base = base_of(held)
        host._parameters[name] = nn.Parameter(base.dense(held, base.dense_dtype(held)), requires_grad=False)
    host.__class__ = host.packed_host_class
    del host.packed_host_class, host.packed_compute


def _read(host: PackedHost, name: str, parameter: nn.Parameter) -> PackedWeight | Tensor:
    """A packed parameter as the module's forward reads it."""
    held = SimpleNamespace(weight=parameter)  # also for a backward that comes when the host has another
    base = base_of(held)
    dtype = base.dense_dtype(held)
    if not takes_stand_ins(host):
        return base.dense(held, dtype)

    def unpack(index: int | Tensor | None) -> Tensor:
        if isinstance(index, int):
            return base.matrix(held, index, dtype)
        W = base.dense(held, dtype)
        return W if index is None else W[index]

    like = torch.empty((), dtype=dtype, device=parameter.device).expand(base.shape_of(parameter))
    return PackedWeight(like, unpack, host.packed_compute[name])


class PackedFolding(LoraLayer):
    """What every layer with a packed weight does as adapters are folded into it; while they are, the weight is dense."""

    def unfold(self) -> None:
        was, now = (self.lora_unfolded[2], self.weight.dtype) if self.lora_folded else (None, None)
        super().unfold()
        if was != now and (base := base_of(self)).packed and now.is_floating_point:  # the model was cast meanwhile
            base.set_dense_dtype(self, now)

    def dense_weight(self) -> Tensor:
        return base_of(self).dense(self, torch.promote_types(self.dense_dtype(), torch.float32))

    def dense_dtype(self) -> torch.dtype:
        return base_of(self).dense_dtype(self)

    def fold_packed(self, names: Iterable[str]) -> Cost:
        """`fold` into a packed weight of the same format; returns what packing lost of the update."""
        names = self.present(names)
        exact, bias, base = self.folded_weight(names), self.folded_bias(names), self.dense_weight()
        before = self.weight, self._parameters.get("bias"), self.weight.dtype
        self.weight = base_of(self).repack(self, exact)
        if bias is not self._parameters.get("bias"):
            self.bias = bias
        self.lora_unfolded, self.lora_folded = before, names
        return cost(exact, base, self.dense_weight())
