"""Which adapters a model holds: one record for each, kept on the module that `inject` was given.

Also the one place that turns adapters on and off. Besides its LoRA layers an adapter may own trained copies of some of
the base's tensors (whole modules in `modules_to_save`, biases). While it is active these stand in the base's modules in
place of the originals, under the same names; the originals wait beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import get_ident

from torch import Tensor, nn

from .config import LoraConfig
from .errors import AdapterExistsError, ConfigError, MergeError, MixedBatchError, ShardedError, UnknownAdapterError
from .layers.base import LoraLayer
from .nf4 import replace_forward, restore_forward
from .sharding import is_spread

_ATTRIBUTE = "lora_registry"


@dataclass
class Adapter:
    """One adapter of a model.

    Attributes:
        config: its settings.
        layers: paths of the layers that carry its A and B.
        saved_modules: paths of the modules that it trains whole.
        copies: {tensor path: its own tensor, in place of the base's while it is active}.
        trainable: whether its tensors require gradients while it is active.
    """

    config: LoraConfig
    layers: tuple[str, ...]
    saved_modules: tuple[str, ...] = ()
    copies: dict[str, Tensor] = field(default_factory=dict)
    trainable: bool = True


@dataclass
class Registry:
    """The adapters of one model.

    Attributes:
        adapters: {name: record}, in the order they were added.
        active: names of the active ones.
        originals: {tensor path: the base's own tensor}, of every path that an adapter has a copy of.
        trainable_before: paths of the parameters that required gradients before the first adapter froze the base.
        layers_4bit: the 4-bit layers whose forward is ours while there are adapters.
        mixing: threads that are in a mixed batch.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    trainable_before: frozenset[str] = frozenset()
    layers_4bit: list[nn.Module] = field(default_factory=list)
    mixing: set[int] = field(default_factory=set)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and DistributedDataParallel, which rename every path."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def registry_of(model: nn.Module) -> Registry:
    """The registry of `model`.

    Raises:
        UnknownAdapterError: it holds no adapters.
    """
    registry = unwrap(model).__dict__.get(_ATTRIBUTE)
    if registry is None:
        raise UnknownAdapterError(
            f"this {type(model).__name__} holds no adapters; call inject() or load_adapter() on it first, "
            "and pass the same module that they were given"
        )
    return registry


def has_adapters(model: nn.Module) -> bool:
    return _ATTRIBUTE in unwrap(model).__dict__


def check_not_mixing(model: nn.Module) -> None:
    """Refuses to change the adapters of a model that a thread, maybe this one, is running a mixed batch on.

    Raises:
        MixedBatchError: a mixed batch is open.
    """
    if has_adapters(model) and (open_in := registry_of(model).mixing):
        where = "this thread" if get_ident() in open_in else "another thread"
        raise MixedBatchError(f"a mixed batch is open on this model in {where}; change its adapters after it is closed")


def find_adapter(model: nn.Module, name: str) -> Adapter:
    """The record of the adapter `name`.

    Raises:
        UnknownAdapterError: there is none; names those that there are.
    """
    adapters = registry_of(model).adapters
    if name not in adapters:
        raise UnknownAdapterError(f"no adapter {name!r} on this model; it holds {', '.join(map(repr, adapters))}")
    return adapters[name]


def adapter_layers(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of each layer that carries `adapter`."""
    model = unwrap(model)
    for path in adapter.layers:
        yield path, submodule(model, path)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, as `get_submodule` finds it, in a tenth of its time: most of what switching and merging did."""
    for name in path.split(".") if path else ():
        model = model._modules[name]
    return model


def lora_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """What the adapter `name` trains on its layers (A, B, ...), layer by layer."""
    for _, layer in adapter_layers(model, find_adapter(model, name)):
        yield from layer.trained(name)


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """All that the adapter `name` trains: its A, B, ..., and its copies of the base's parameters, each once."""
    yield from lora_parameters(model, name)
    copies = {id(t): t for t in find_adapter(model, name).copies.values() if isinstance(t, nn.Parameter)}
    yield from copies.values()


def check_new_name(model: nn.Module, name: str) -> None:
    """Refuses a name that can't be a directory and a key of a module, or that is taken."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]{0,127}", name) or hasattr(nn.ParameterDict(), name):
        raise ConfigError(
            f"adapter_name must be made of letters, digits, '_' and '-', at most 128, and be no attribute of torch's "
            f"ParameterDict, not {name!r}"
        )
    if has_adapters(model) and name in registry_of(model).adapters:
        raise AdapterExistsError(
            f"the model has an adapter {name!r} already; choose another adapter_name or delete_adapter(model, {name!r})"
        )


def register(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Adds a record. The first one freezes the base, and is made active."""
    model = unwrap(model)
    if not has_adapters(model):
        trainable = frozenset(path for path, p in model.named_parameters() if p.requires_grad)
        setattr(model, _ATTRIBUTE, Registry(trainable_before=trainable, layers_4bit=replace_forward(model)))
        model.requires_grad_(False)
    registry = registry_of(model)
    for path in adapter.copies:
        registry.originals.setdefault(path, get_tensor(model, path))
    registry.adapters[name] = adapter
    if len(registry.adapters) == 1:
        activate(model, (name,))


def forget(model: nn.Module, name: str) -> None:
    """Removes the record of an inactive adapter; the last one to go takes the registry along and unfreezes the base."""
    model = unwrap(model)
    registry = registry_of(model)
    del registry.adapters[name]
    if not registry.adapters:
        delattr(model, _ATTRIBUTE)
        restore_forward(registry.layers_4bit)
        for path, p in model.named_parameters():
            p.requires_grad_(path in registry.trainable_before and p.is_floating_point())  # it may be 4-bit by now


def rename(model: nn.Module, old: str, new: str) -> None:
    """Gives the adapter `old` the free name `new`; nothing else about it changes, nor about the order of adapters."""
    for _, layer in adapter_layers(model, find_adapter(model, old)):
        layer.rename_adapter(old, new)
    registry = registry_of(model)
    registry.adapters = {new if name == old else name: adapter for name, adapter in registry.adapters.items()}
    registry.active = tuple(new if name == old else name for name in registry.active)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Makes exactly `names` active. Costs what the adapters that go and come hold, however many others are loaded.

    Raises:
        UnknownAdapterError: a name is not on the model.
        MergeError: adapters are folded into the weights, or two of `names` own copies of the same tensor.
        ShardedError: an adapter owns copies, and the model is sharded.
    """
    model = unwrap(model)
    registry = registry_of(model)
    records = {name: find_adapter(model, name) for name in names}
    owners: dict[str, str] = {}
    for name, record in records.items():
        for path in record.copies:
            if path in owners:
                raise MergeError(f"adapters {owners[path]!r} and {name!r} can't be active together: both own {path!r}")
            owners[path] = name
    going = {name: registry.adapters[name] for name in registry.active}
    layers = {p: layer for record in (*going.values(), *records.values()) for p, layer in adapter_layers(model, record)}
    if any(layer.lora_folded for layer in layers.values()):
        raise MergeError("adapters are folded into the weights; call unmerge_adapter(model) before switching")
    if any(record.copies for record in (*going.values(), *records.values())) and is_spread(model):
        raise ShardedError("switching adapters that train modules whole puts others in their place; do it before fully_shard")

    for name, record in going.items():
        _set_trainable(model, name, False)
        for path in record.copies:
            _put(model, path, registry.originals[path])
    for name, record in records.items():
        for path, tensor in record.copies.items():
            _put(model, path, tensor)
        _set_trainable(model, name, record.trainable)
    for layer in layers.values():
        layer.activate(names)
    registry.active = tuple(names)


def _set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)


def get_tensor(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at `path`."""
    parent, _, name = path.rpartition(".")
    return getattr(submodule(model, parent), name)


def _put(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Puts `tensor` at `path` of `model`, in the place of the one that is there, on its device and in its dtype."""
    parent, _, name = path.rpartition(".")
    module = submodule(model, parent)
    there = getattr(module, name)
    if (tensor.device, tensor.dtype) != (there.device, there.dtype):  # the model was moved or cast while this one waited
        tensor.data = tensor.data.to(there.device, there.dtype)
    table = module._parameters if name in module._parameters else module._buffers
    table[name] = tensor


def copy_tensor(tensor: Tensor) -> Tensor:
    """A tensor of its own with the same values; a parameter if it was one."""
    data = tensor.detach().clone()
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, as a tuple without repeats."""
    return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
