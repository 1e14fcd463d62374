"""An adapter comes onto a model, is switched on and off, gets another name, and goes.

Besides its LoRA layers an adapter may own trained copies of some of the base's tensors (whole modules in `modules_to_save`,
biases); `copies.py` says where these are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..bases import adopt_layers, release_layers
from ..errors import StateError
from ..layers.base import LoraLayer
from ..methods.activated import Text
from ..methods.registry import method_of
from . import copies
from .atomic import Before, insist
from .conventions import hold_back, let_go, refuse_saving
from .copies import BASE, submodule
from .registry import (
    ATTRIBUTE,
    Adapter,
    Registry,
    adapter_layers,
    adapter_parameters,
    changed_layers,
    find_adapter,
    has_adapters,
    registry_of,
    unwrap,
)
from .replicate import restore_layers
from .sharding import is_spread
from .untie import forget_ties, tie_again
from .wide import restore_class


def register(model: nn.Module, name: str, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Adds a record, and `tensors` as the copies that it speaks of. The first one freezes the base, and is made active."""
    model = unwrap(model)
    if not has_adapters(model):
        trainable = frozenset(path for path, p in model.named_parameters() if p.requires_grad)
        registry = Registry(trainable_before=trainable, held_back=hold_back(model), adopted=adopt_layers(model))
        setattr(model, ATTRIBUTE, registry)
        model.requires_grad_(False)
    registry = registry_of(model)
    copies.add(model, name, tensors, adapter.saved_modules)
    registry.adapters[name] = adapter
    _read_text(model, registry)
    if adapter.untied:  # else transformers' `tie_weights` would put the base's tensor in the place of the trained one
        before = forget_ties(model, adapter.untied)
        registry.ties = registry.ties or before
    if len(registry.adapters) == 1:
        activate(model, (name,))


def _read_text(model: nn.Module, registry: Registry) -> None:
    """Has the layers of adapters that ask for it know what the model reads, and no longer if there are none."""
    asking = [record for record in registry.adapters.values() if method_of(record.config).reads_text]
    if asking and registry.text is None:
        registry.text = Text(model)
    for _, layer in (pair for record in asking for pair in adapter_layers(model, record)):
        layer.lora_reader = registry.text
    if registry.text is not None and not asking:
        registry.text.close()
        registry.text = None


def remove(model: nn.Module, name: str) -> None:
    """Removes an adapter that is not active from its layers and the record; the last one to go unfreezes the base."""
    model = unwrap(model)
    registry = registry_of(model)
    adapter = registry.adapters[name]
    copies.remove(model, name, adapter.copied)
    others = {path for other, record in registry.adapters.items() if other != name for path in record.saved_modules}
    for path in adapter.saved_modules:
        if path not in others:
            restore_class(submodule(model, path))
    for _, layer in changed_layers(model, adapter):
        layer.delete_adapter(name)
        if not layer.lora_scaling:
            layer.release()
    del registry.adapters[name]
    _read_text(model, registry)
    if registry.ties is not None and not any(record.untied for record in registry.adapters.values()):
        tie_again(model, registry.ties)
        registry.ties = None
    if not registry.adapters:
        delattr(model, ATTRIBUTE)
        let_go(model, registry.held_back)
        release_layers(registry.adopted)
        for path, p in model.named_parameters():
            p.requires_grad_(path in registry.trainable_before and p.is_floating_point())  # it may be 4-bit by now
        restore_layers(model)


@dataclass(frozen=True)
class Taken:
    """The place of an adapter that was taken off, for another of its name.

    Attributes:
        names: of the model's adapters, in order.
        active: names of the active ones.
        trainable: whether it was.
    """

    names: tuple[str, ...]
    active: tuple[str, ...]
    trainable: bool


def take_off(model: nn.Module, name: str) -> Taken:
    """Removes an adapter, active or not, for another that gets its name and its place.

    Raises:
        StateError: adapters are folded into the weights.
    """
    registry, adapter = registry_of(model), find_adapter(model, name)
    if any(layer.lora_folded for _, layer in changed_layers(model, adapter)):
        raise StateError(f"adapters are folded into the layers of {name!r}; call unmerge_adapter(model) before replacing it")
    was = Taken(tuple(registry.adapters), registry.active, adapter.trainable)
    activate(model, [other for other in registry.active if other != name])
    remove(model, name)
    return was


def put_back(model: nn.Module, was: Taken) -> None:
    """Gives the adapters the order, and those that were active the state, from before `take_off`."""
    registry = registry_of(model)
    registry.adapters = {name: registry.adapters[name] for name in was.names}
    activate(model, was.active)


def unfold_all(model: nn.Module) -> None:
    """Takes the adapters that are folded in out of the weights, if any are, and ties what they had parted.

    Raises:
        StateError: a weight was pruned since, say; some layers are unfolded by then.
    """
    registry = registry_of(model)
    for path in dict.fromkeys(path for adapter in registry.adapters.values() for path in (*adapter.layers, *adapter.tokens)):
        try:
            submodule(unwrap(model), path).unfold()
        except StateError as error:
            raise StateError(f"{path}: {error}; nothing was changed") from None
    refuse_saving(unwrap(model))
    if registry.folded_ties is not None:
        tie_again(unwrap(model), registry.folded_ties)
        registry.folded_ties = None


def forget_replaced(model: nn.Module) -> None:
    """Makes adapters that are to go own nothing in modules that were replaced by others: what is there now stays."""
    for adapter in registry_of(model).adapters.values():
        adapter.copied = tuple(path for path in adapter.copied if copies.are_held(unwrap(model), path))


def rename(model: nn.Module, old: str, new: str) -> None:
    """Gives the adapter `old` the free name `new`; nothing else about it changes, nor about the order of adapters."""
    adapter = find_adapter(model, old)
    for _, layer in changed_layers(model, adapter):
        layer.rename_adapter(old, new)
    copies.rename(unwrap(model), old, new, adapter.copied)
    registry = registry_of(model)
    registry.adapters = {new if name == old else name: record for name, record in registry.adapters.items()}
    registry.active = tuple(new if name == old else name for name in registry.active)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Makes exactly `names` active, or changes nothing.

    Costs what the adapters that go and come hold, however many others are loaded.

    Raises:
        AdapterNameError: a name is not on the model.
        StateError: adapters are folded into the weights, or two of `names` own copies of the same tensor, or rows for the
            same token; an adapter owns copies, and the model is sharded.
    """
    model = unwrap(model)
    registry = registry_of(model)
    records = {name: find_adapter(model, name) for name in names}
    owners: dict[str, str] = {}
    for name, record in records.items():
        for path in record.copied:
            if path in owners:
                raise StateError(f"adapters {owners[path]!r} and {name!r} can't be active together: both own {path!r}")
            owners[path] = name
    _refuse_same_tokens(model, records)
    touched = {name: registry.adapters[name] for name in registry.active} | records
    layers = {p: layer for record in touched.values() for p, layer in changed_layers(model, record)}
    if any(layer.lora_folded for layer in layers.values()):
        raise StateError("adapters are folded into the weights; call unmerge_adapter(model) before switching")
    if any(record.copied for record in touched.values()) and is_spread(model):
        raise StateError("switching adapters that train modules whole puts others in their place; do it before fully_shard")

    before = _before_switching(model, registry, touched, layers.values())
    try:
        for name in registry.active:
            _set_trainable(model, name, False)
            copies.put_in_place(model, BASE, touched[name].copied)
        for name, record in records.items():
            copies.put_in_place(model, name, record.copied)
            _set_trainable(model, name, record.trainable)
        for layer in layers.values():
            layer.activate(names)
        registry.active = tuple(names)
    except BaseException:
        insist(before.restore)
        raise


def _refuse_same_tokens(model: nn.Module, records: Mapping[str, Adapter]) -> None:
    """Raises a StateError if two adapters have a row of their own for one token of one layer."""
    owners: dict[tuple[str, int], str] = {}
    for name, record in records.items():
        for path in record.tokens:
            for token in submodule(model, path).lora_token_ids[name].tolist():
                other = owners.setdefault((path, token), name)
                if other != name:
                    raise StateError(
                        f"adapters {other!r} and {name!r} can't be active together: both train token {token} of {path!r}"
                    )


def _before_switching(
    model: nn.Module, registry: Registry, touched: Mapping[str, Adapter], layers: Iterable[LoraLayer]
) -> Before:
    """What a switch changes, as it is. Not the whole model: a switch should cost next to nothing."""
    before = Before(module for record in touched.values() for module in copies.places(model, record.copied))
    for name in touched:
        for parameter in adapter_parameters(model, name):
            before.note_tensor(parameter)
    for layer in layers:
        before.note_attribute(layer, "lora_active")
    before.note_attribute(registry, "active")
    return before


def _set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)
