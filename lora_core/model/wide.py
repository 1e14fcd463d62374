"""Training in float32 what belongs to a 16-bit base: heads, embeddings and biases, as A and B are.

Most steps of an optimiser are smaller than what 16 bits can tell apart, and float16 overflows. So beside a 16-bit parameter a
trained copy is float32 (`copies.py`), and the module that has it is given a class of its own, made of the one it had:

    a module trained whole      computes in float32: its inputs are cast to that, and its outputs back to what the base gives
    any other, with a bias      reads the bias rounded to 16 bits, beside the weights that it computes with

Under autocast, torch casts the inputs. With the base's own tensors in place these classes do nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..bases.forwards import change_class
from ..errors import TargetError

#: The child of a module that holds what is not in place, and in that the base's own: no adapter can have this name.
CHILD, BASE = "lora_copies", "@base"

#: Parameters of these are trained as copies in float32.
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def widen(module: nn.Module) -> None:
    """Makes a module that is trained whole compute in float32 while its copies are in place.

    Raises:
        TargetError: another adapter trains a bias in it, which it would have to read in two ways.
    """
    if any(isinstance(part, _Rounding) for part in module.modules()):
        raise TargetError(
            "a module to be trained whole has a bias that another adapter of this 16-bit base trains; leave it out"
        )
    if not isinstance(module, _Wide):
        change_class(module, _mixed(_Wide, type(module), ()))


def round_(module: nn.Module, name: str) -> None:
    """Makes a module read its parameter `name` rounded to 16 bits while a copy in float32 is in place."""
    kind, names = type(module), ()
    if isinstance(module, _Rounding):
        kind, names = kind.plain, kind.names
    change_class(module, _mixed(_Rounding, kind, tuple(sorted({*names, name}))))


def restore_class(module: nn.Module) -> None:
    """Gives a module the class that it had."""
    if isinstance(module, (_Wide, _Rounding)):
        change_class(module, type(module).plain)


class _Mixed:
    """A class made of one of the two below and of the module's own.

    Attributes:
        plain: the class that the module had.
        names: of the parameters that it reads rounded.
    """

    plain: type[nn.Module]
    names: tuple[str, ...]

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)
        mixin = _Wide if isinstance(self, _Wide) else _Rounding
        return _unpickled, (mixin, self.plain, self.names), *rest


class _Wide(_Mixed):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dtype = _base_dtype(self)
        if dtype is None:
            return super().forward(*args, **kwargs)
        floats = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        if any(x.dtype in SIXTEEN_BITS for x in floats) and not torch.is_autocast_enabled(floats[0].device.type):
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        elif floats:  # in float32 already, as inside of another such module, or cast by autocast
            return super().forward(*args, **kwargs)
        return tree_map_only(Tensor, lambda y: y.to(dtype) if y.dtype == torch.float32 else y, super().forward(*args, **kwargs))


class _Rounding(_Mixed):
    pass


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in SIXTEEN_BITS else x


def _base_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the base's own parameters, if copies in float32 are in the place of all of them that have 16 bits."""
    dtype = None
    for path, part in module.named_modules():
        if CHILD in path.split("."):
            continue
        if any(p is not None and p.dtype in SIXTEEN_BITS for p in part._parameters.values()):
            return None
        if (copies := part._modules.get(CHILD)) is not None:
            waiting = copies._modules[BASE]._parameters.values()
            dtype = next((own.dtype for own in waiting if own.dtype in SIXTEEN_BITS), dtype)
    return dtype


def _rounded(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        tensor, copies = module._parameters[name], module._modules[CHILD]
        own = copies._modules[BASE]._parameters.get(name)  # None while it is in place itself
        return tensor if own is None else tensor.to(own.dtype)

    return property(read, lambda module, value: nn.Module.__setattr__(module, name, value))


@functools.cache
def _mixed(mixin: type[_Mixed], kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members = {name: _rounded(name) for name in names}
    return type(kind.__name__, (mixin, kind), members | {"plain": kind, "names": names})


def _unpickled(mixin: type[_Mixed], kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    mixed = _mixed(mixin, kind, names)
    return mixed.__new__(mixed)
