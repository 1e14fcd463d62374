"""Which adapters a model holds: one record for each, kept on the module that `inject` was given.

Also the one place that turns adapters on and off. Besides its LoRA layers an adapter may own trained copies of some of
the base's tensors (whole modules in `modules_to_save`, biases); `copies.py` says where these are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..bases import Base, adopt_layers, release_layers
from ..errors import AdapterNameError, ConfigError, StateError
from ..layers.base import LoraLayer
from ..spec.config import LoraConfig
from . import copies
from .atomic import Before, Record, insist
from .conventions import hold_back, let_go, refuse_saving
from .copies import BASE, submodule
from .sharding import is_spread
from .untie import Broken, forget_ties, tie_again
from .wide import restore_class
from .wrappers import unwrap

_ATTRIBUTE = "lora_registry"


@dataclass
class Adapter(Record):
    """One adapter of a model.

    Attributes:
        config: its settings.
        layers: paths of the layers that carry its A and B.
        saved_modules: paths of the modules that it trains whole.
        copied: paths of the base's tensors that it has a copy of, in place of the base's while it is active.
        untied: those of them that the base ties to tensors which it has no part in.
        trainable: whether its tensors require gradients while it is active.
    """

    config: LoraConfig
    layers: tuple[str, ...]
    saved_modules: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    trainable: bool = True


@dataclass
class Registry(Record):
    """The adapters of one model.

    Attributes:
        adapters: {name: record}, in the order they were added.
        active: names of the active ones.
        disabled: {of each `disable_adapters` that is open: the thread that it is in}.
        suspended: names of the adapters that are active again when the last of these is closed.
        trainable_before: paths of the parameters that required gradients before the first adapter froze the base.
        held_back: what the model's own library is not to do meanwhile; see `conventions.hold_back`.
        adopted: other libraries' layers whose forward is ours while there are adapters, and what holds their weights.
        mixing: threads that are in a mixed batch.
        folded_ties: what ties the base's weights again, once adapters that are folded in are unfolded.
        ties: what says that they are tied, again, once no adapter is left that trains some of them apart.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: dict[object, int] = field(default_factory=dict)
    suspended: tuple[str, ...] = ()
    trainable_before: frozenset[str] = frozenset()
    held_back: dict[str, Any] = field(default_factory=dict)
    adopted: list[tuple[Base, nn.Module]] = field(default_factory=list)
    mixing: set[int] = field(default_factory=set)
    folded_ties: Broken | None = None
    ties: Broken | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"disabled": {}, "mixing": set()}  # a copy of the model is in nobody's hands


def registry_of(model: nn.Module) -> Registry:
    """The registry of `model`.

    Raises:
        AdapterNameError: it holds no adapters.
    """
    registry = unwrap(model).__dict__.get(_ATTRIBUTE)
    if registry is None:
        raise AdapterNameError(
            f"this {type(model).__name__} holds no adapters; call inject() or load_adapter() on it first, "
            "and pass the same module that they were given"
        )
    return registry


def has_adapters(model: nn.Module) -> bool:
    return _ATTRIBUTE in unwrap(model).__dict__


def find_adapter(model: nn.Module, name: str) -> Adapter:
    """The record of the adapter `name`.

    Raises:
        AdapterNameError: there is none; names those that there are.
    """
    adapters = registry_of(model).adapters
    if name not in adapters:
        raise AdapterNameError(f"no adapter {name!r} on this model; it holds {', '.join(map(repr, adapters))}")
    return adapters[name]


def adapter_layers(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of each layer that carries `adapter`."""
    model = unwrap(model)
    for path in adapter.layers:
        yield path, submodule(model, path)


def lora_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """What the adapter `name` trains on its layers (A, B, ...), layer by layer."""
    for _, layer in adapter_layers(model, find_adapter(model, name)):
        yield from layer.trained(name)


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """All that the adapter `name` trains: its A, B, ..., and its copies of the base's parameters, each once."""
    yield from lora_parameters(model, name)
    yield from {id(t): t for t in copies_of(model, name).values() if isinstance(t, nn.Parameter)}.values()


def copies_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """{path: tensor} of the adapter's copies of the base's tensors."""
    return {path: copies.copy_of(unwrap(model), name, path) for path in find_adapter(model, name).copied}


def check_new_name(model: nn.Module, name: str) -> None:
    """Refuses a name that can't be a directory and a key of a module, or that is taken."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]{0,127}", name) or hasattr(nn.ParameterDict(), name):
        raise ConfigError(
            f"adapter_name must be made of letters, digits, '_' and '-', at most 128, and be no attribute of torch's "
            f"ParameterDict, not {name!r}"
        )
    if has_adapters(model) and name in registry_of(model).adapters:
        raise AdapterNameError(
            f"the model has an adapter {name!r} already; choose another adapter_name or delete_adapter(model, {name!r})"
        )


def register(model: nn.Module, name: str, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Adds a record, and `tensors` as the copies that it speaks of. The first one freezes the base, and is made active."""
    model = unwrap(model)
    if not has_adapters(model):
        trainable = frozenset(path for path, p in model.named_parameters() if p.requires_grad)
        registry = Registry(trainable_before=trainable, held_back=hold_back(model), adopted=adopt_layers(model))
        setattr(model, _ATTRIBUTE, registry)
        model.requires_grad_(False)
    registry = registry_of(model)
    copies.add(model, name, tensors, adapter.saved_modules)
    registry.adapters[name] = adapter
    if adapter.untied:  # else transformers' `tie_weights` would put the base's tensor in the place of the trained one
        before = forget_ties(model, adapter.untied)
        registry.ties = registry.ties or before
    if len(registry.adapters) == 1:
        activate(model, (name,))


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
    for _, layer in adapter_layers(model, adapter):
        layer.delete_adapter(name)
        if not layer.lora_scaling:
            layer.release()
    del registry.adapters[name]
    if registry.ties is not None and not any(record.untied for record in registry.adapters.values()):
        tie_again(model, registry.ties)
        registry.ties = None
    if not registry.adapters:
        delattr(model, _ATTRIBUTE)
        let_go(model, registry.held_back)
        release_layers(registry.adopted)
        for path, p in model.named_parameters():
            p.requires_grad_(path in registry.trainable_before and p.is_floating_point())  # it may be 4-bit by now


def unfold_all(model: nn.Module) -> None:
    """Takes the adapters that are folded in out of the weights, if any are, and ties what they had parted.

    Raises:
        StateError: a weight was pruned since, say; some layers are unfolded by then.
    """
    registry = registry_of(model)
    for path in dict.fromkeys(path for adapter in registry.adapters.values() for path in adapter.layers):
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
    for _, layer in adapter_layers(model, adapter):
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
        StateError: adapters are folded into the weights, or two of `names` own copies of the same tensor; an adapter
            owns copies, and the model is sharded.
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
    touched = {name: registry.adapters[name] for name in registry.active} | records
    layers = {p: layer for record in touched.values() for p, layer in adapter_layers(model, record)}
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
