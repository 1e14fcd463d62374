"""What adapters train whole: copies of the base's own tensors (heads and embeddings in `modules_to_save`, biases).

The copy of the active adapter stands in the base's module, under the base's name. The others wait in a child of that module,
and with them the base's own. So all of them move, are cast, saved and loaded with the model, and each stands in one place:

    classifier.weight                            the one in place
    classifier.lora_copies.NAME.weight           that of an adapter which is not active
    classifier.lora_copies.@base.weight          the base's own, while an adapter's is in place

What is in place is the truth: whoever puts another parameter there (a new head, `load_state_dict(assign=True)`) has changed the
active adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.forwards import refuse_offloaded
from ..errors import StateError, TargetError
from ..layers.base import LoraLayer
from ..layers.slots import slot_of
from ..maths.loss import Cost, cost_of_cast, refuse_overflow
from .wide import BASE, CHILD, restore_class, round_, widen


class Waiting(nn.Module):
    """The tensors of one adapter, or of the base, that are not in place.

    Attributes:
        names: of all that it owns in this module, in place or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: frozenset[str] = frozenset()

    def has_in_place(self, name: str) -> bool:
        return name in self.names and name not in self._parameters and name not in self._buffers

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """transformers asks modules for this as it saves: what may be tied, and then goes into a file once."""
        return {name: name for name in self.names}


class Copies(nn.ModuleDict):
    """{adapter or BASE: Waiting}, a child of the module that the tensors are for."""

    def owner(self, name: str) -> str:
        """Whose tensor `name` is in place."""
        return next(key for key, held in self.items() if held.has_in_place(name))

    def put_in_place(self, module: nn.Module, name: str, owner: str) -> None:
        """Exchanges the tensor `name` of `module` for that of `owner`; the one that was there waits."""
        now = self.owner(name)
        if now != owner:
            refuse_offloaded(type(module).__name__, module, "switching what adapters train whole")
            table = _table(module, name)
            _table(self[now], name, like=table is module._parameters)[name] = table[name]
            tensor = _table(self[owner], name).pop(name)
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, tensor)  # recurrent layers keep a list of their parameters
            else:
                table[name] = tensor

    def tensor(self, module: nn.Module, name: str, owner: str) -> Tensor:
        """The tensor `name` of `owner`, wherever it is.

        Raises:
            StateError: the base's own was put in the place of an adapter's from outside, as code that ties weights does.
        """
        found = self._held(module, name, owner)
        if owner != BASE and found is self._held(module, name, BASE):
            raise StateError(
                f"{type(module).__name__}.{name} of adapter {owner!r} was replaced by the base's own tensor, as "
                "code that ties weights does, and what was trained is gone; make the model again, load the adapter, "
                "and tie no weights after that"
            )
        return found

    def _held(self, module: nn.Module, name: str, owner: str) -> Tensor:
        return _table(module if self.owner(name) == owner else self[owner], name)[name]

    def route(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Sees to it that each tensor of a state dict comes to its owner, whichever was in place when it was made.

        The owner that the state dict has no waiting tensor of was in place then. Of the base's it may have none either: a file
        holds tied tensors once.
        """
        for name in sorted(self[BASE].names):
            now = self.owner(name)
            owners = [key for key, held in self.items() if name in held.names]
            keys = {owner: f"{prefix}{CHILD}.{owner}.{name}" for owner in owners}
            absent = [owner for owner, key in keys.items() if key not in state]
            then = [owner for owner in absent if owner != BASE] or absent
            if len(then) == 1 and then != [now] and f"{prefix}{name}" in state and keys[now] in state:
                state[keys[then[0]]] = state[f"{prefix}{name}"]
                state[f"{prefix}{name}"] = state.pop(keys[now])


def _table(module: nn.Module, name: str, like: bool | None = None) -> dict[str, Tensor | None]:
    """Where `module` has, or would have, the tensor `name`.

    Raises:
        TargetError: it has none of that name any more.
    """
    if like is None and name not in module._parameters and name not in module._buffers:
        raise TargetError(
            f"the {name} of a {type(module).__name__}, which adapters have copies of, is computed from other tensors since "
            "(pruned, or parametrised); make it a plain one first, as torch.nn.utils.prune.remove or remove_parametrizations do"
        )
    parameter = name in module._parameters if like is None else like
    return module._parameters if parameter else module._buffers


# --- the copies of a model, by path -----------------------------------------------------------------------------------


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, in a tenth of `get_submodule`'s time, or the slot of the parameter there (`layers/experts.py`)."""
    for name in path.split(".") if path else ():
        model = model._modules[name] if name in model._modules else slot_of(model, name)
    return model


def get_tensor(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer that is in place at `path`."""
    parent, _, name = path.rpartition(".")
    module = submodule(model, parent)
    return _table(module, name)[name]


def add(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor], saved: Iterable[str] = ()) -> None:
    """Gives an adapter its own tensors, {path: tensor}, in place of the base's; `saved` are the modules that are its own whole.

    They wait. Those in float32 beside 16-bit ones change how their modules compute: see `wide.py`.
    """
    for path, tensor in tensors.items():
        (module, name), own = _split(model, path), original_of(model, path)
        if CHILD not in module._modules:
            module.add_module(CHILD, Copies({BASE: Waiting()}))
            copies = module._modules[CHILD]
            copies.hook = module.register_load_state_dict_pre_hook(copies.route)
        copies = module._modules[CHILD]
        if adapter not in copies:
            copies[adapter] = Waiting()
        for held in (copies[BASE], copies[adapter]):
            held.names |= {name}
        _table(copies[adapter], name, like=isinstance(own, nn.Parameter))[name] = tensor
        if tensor.dtype != own.dtype:
            inside = next((m for m in saved if path.startswith(f"{m}.")), None)
            if inside is None:
                round_(module, name)
            else:
                widen(submodule(model, inside))


def remove(model: nn.Module, adapter: str, paths: Iterable[str]) -> None:
    """Drops the tensors of an adapter, and with the last ones all that `add` has left."""
    for path in paths:
        module, name = _split(model, path)
        copies = _copies(module, path)
        copies.put_in_place(module, name, BASE)
        held = copies[adapter]
        held.names -= {name}
        del _table(held, name)[name]
        if not held.names:
            del copies[adapter]
        if not any(name in held.names for key, held in copies.items() if key != BASE):
            copies[BASE].names -= {name}
        if len(copies) == 1:
            copies.hook.remove()
            del module._modules[CHILD]
            restore_class(module)


def put_in_place(model: nn.Module, owner: str, paths: Iterable[str]) -> None:
    """Puts the tensors of an adapter, or those of BASE, in place; those that are there wait."""
    for path in paths:
        module, name = _split(model, path)
        _copies(module, path).put_in_place(module, name, owner)


def copy_of(model: nn.Module, owner: str, path: str) -> Tensor:
    """The tensor of an adapter, or of BASE, at `path`, in place or not."""
    module, name = _split(model, path)
    return _copies(module, path).tensor(module, name, owner)


def original_of(model: nn.Module, path: str) -> Tensor:
    """The base's own tensor at `path`, whether or not an adapter's is in place."""
    module, name = _split(model, path)
    copies = module._modules.get(CHILD)
    waits = copies is not None and name in copies[BASE].names and not copies[BASE].has_in_place(name)
    return _table(copies[BASE] if waits else module, name)[name]


def keep(model: nn.Module, adapter: str, paths: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Cost]:
    """Makes the values of an adapter the base's own: new tensors, one where the adapter's are one.

    Args:
        model: the module at the root.
        adapter: whose.
        paths: of the tensors.
        dtype: what floating-point ones are cast to; None: that of the base's.

    Returns:
        {path: what the cast lost of the training}, of those that are cast.

    Raises:
        StateError: one is finite, and would not be in that dtype.
    """
    kept: dict[tuple[int, torch.dtype], Tensor] = {}
    spent = {}
    for path in paths:
        module, name = _split(model, path)
        copies = _copies(module, path)
        tensor, own = copies.tensor(module, name, adapter), copies.tensor(module, name, BASE)
        key = id(tensor), dtype if dtype and own.is_floating_point() else own.dtype
        if key not in kept:
            kept[key] = copy_tensor(tensor, key[1])
            refuse_overflow(tensor.detach(), kept[key].detach(), path)
        if kept[key].dtype != tensor.dtype:
            spent[path] = cost_of_cast(tensor, own, kept[key])
        copies.put_in_place(module, name, adapter)
        _table(copies[BASE], name)[name] = kept[key]
    return spent


def rename(model: nn.Module, old: str, new: str, paths: Iterable[str]) -> None:
    for module in dict.fromkeys(_split(model, path)[0] for path in paths):
        copies = module._modules[CHILD]
        copies._modules = {new if key == old else key: held for key, held in copies._modules.items()}


def without_copies(module: nn.Module) -> dict[int, Copies]:
    """{id of the `Copies` of each part: one with the base's own tensors alone}: a memo for `copy.deepcopy`."""
    memo = {}
    for part in module.modules():
        if (copies := part._modules.get(CHILD)) is not None:
            memo[id(copies)] = bare = Copies({BASE: Waiting()})
            for name in copies[BASE].names:
                own = copies.tensor(part, name, BASE)
                _table(bare[BASE], name, like=isinstance(own, nn.Parameter))[name] = own
    return memo


def are_held(model: nn.Module, path: str) -> bool:
    """Whether the module of `path` still is the one that adapters got copies for, and not another in its place."""
    return CHILD in _split(model, path)[0]._modules


def places(model: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    """The modules that hold the tensors at `paths`, in place and waiting."""
    for path in paths:
        module, _ = _split(model, path)
        yield module
        yield from _copies(module, path).modules()


def copy_tensor(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of its own with the same values, in `dtype` (None: its own); a parameter if it was one."""
    data = tensor.detach().to(dtype or tensor.dtype, copy=True)
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def base_tensors(model: nn.Module) -> list[str]:
    """The paths of all parameters of the base, under each of their names: without what adapters added."""
    tables, names = added_tables(model), (path for path, _ in model.named_parameters(remove_duplicate=False))
    return [path for path in names if CHILD not in path.split(".") and path.rpartition(".")[0] not in tables]


def added_tables(model: nn.Module) -> set[str]:
    """The paths of the tables that adapted layers hold adapters in."""
    layers = ((path, module) for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, LoraLayer))
    return {f"{path}.{table}" for path, layer in layers for table in layer.lora_tables}


def own_keys(module: nn.Module) -> list[str]:
    """The names of a module's state dict, without those of tensors that wait."""
    return [key for key in module.state_dict() if CHILD not in key.split(".")]


def _split(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return submodule(model, parent), name


def _copies(module: nn.Module, path: str) -> Copies:
    copies = module._modules.get(CHILD)
    if copies is None:
        raise TargetError(
            f"the module of {path!r} was replaced by another after adapters got copies of its tensors; put new parameters into "
            "the module that is there instead, or delete the adapters, which leaves it as it is"
        )
    return copies
