"""A deeper model of the same weights: layers of a stack that come again, each time with adapters of its own.

    layer_replication=[[0, 4], [2, 5]]        layers 0 1 2 3 4  ->  0 1 2 3 2 3 4

As in PEFT, and as mergekit's passthrough stacks them (Kim et al., arXiv 2312.15166, train such models). A layer that comes
again is another module with the same parameters. The first time it is the model's own layer: `unload` takes the others out, and
the model is what it was. Merged for good, each layer has weights of its own, and the model stays as deep as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError, StateError, TargetError
from ..spec.config import LoraConfig
from .atomic import Record
from .conventions import configs, own_config
from .wrappers import unwrap

#: The attribute of a model whose layers were replicated.
ATTRIBUTE = "lora_replicated"
#: What stacks of layers are called.
STACKS = ("layers", "layer", "h", "blocks")


@dataclass
class Replicated(Record):
    """What became of a model's stack of layers.

    Attributes:
        ranges: as the configuration has them.
        path: of the stack.
        order: which of the layers that were there stands in each place.
        left_out: {place that it had: layer} of those that stand nowhere now.
        indices: (module, what its `layer_idx` was), for those that have one.
        settings: (configuration, name, value that it had) of what the model's configurations say of its layers.
    """

    ranges: tuple[tuple[int, int], ...]
    path: str
    order: tuple[int, ...]
    left_out: dict[int, nn.Module]
    indices: list[tuple[nn.Module, int]]
    settings: list[tuple[Any, str, Any]]


def replicated(model: nn.Module) -> Replicated | None:
    """What became of the model's layers; None: nothing."""
    return vars(unwrap(model)).get(ATTRIBUTE)


def replicate_layers(model: nn.Module, config: LoraConfig, adapters: Collection[str]) -> None:
    """Stacks the model's layers as `layer_replication` says; where they are stacked so already, nothing is to be done.

    Args:
        model: the model.
        config: the settings of an adapter that is to come.
        adapters: names of those that the model has.

    Raises:
        ConfigError: there are some, and the layers are stacked otherwise.
        TargetError: no stack of layers is found, or it has not that many.
    """
    model, ranges = unwrap(model), config.layer_replication
    if ranges is None or (replicated(model) is not None and replicated(model).ranges == ranges):
        return
    if adapters:
        raise ConfigError(
            f"layer_replication={[list(pair) for pair in ranges]} makes another model, and this one holds "
            f"{', '.join(map(repr, adapters))}; unload first, or add this adapter before the others"
        )
    path = _stack_of(model)
    stack = model.get_submodule(path)
    known, order = list(stack), tuple(i for start, end in ranges for i in range(start, end))
    if max(order) >= len(known):
        raise TargetError(f"layer_replication names layer {max(order)} of {path!r}, which has {len(known)} layers, from 0 on")
    layers = [known[i] if i not in order[:place] else _again(known[i]) for place, i in enumerate(order)]
    indices = [(module, module.layer_idx) for layer in layers for module in layer.modules() if hasattr(module, "layer_idx")]
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    left_out = {i: layer for i, layer in enumerate(known) if i not in order}
    setattr(model, ATTRIBUTE, Replicated(ranges, path, order, left_out, indices, _count_again(model, len(known), order)))
    _refill(stack, layers)


def restore_layers(model: nn.Module) -> None:
    """The reverse of `replicate_layers`, if the layers were replicated.

    Raises:
        StateError: layers were added or taken out since.
    """
    if (was := replicated(model)) is None:
        return
    stack = model.get_submodule(was.path)
    if len(stack) != len(was.order):
        raise StateError(f"{was.path!r} has {len(stack)} layers, and layer_replication made {len(was.order)}; put them back")
    layers = was.left_out | {i: stack[was.order.index(i)] for i in set(was.order)}
    _refill(stack, [layers[i] for i in range(len(layers))])
    for module, index in was.indices:
        module.layer_idx = index
    for config, name, value in was.settings:
        setattr(config, name, value)
    delattr(model, ATTRIBUTE)


def keep_layers(model: nn.Module) -> None:
    """Makes the stack of layers the model's own: those that come again get parameters of their own, if there are any."""
    if (was := replicated(model)) is None:
        return
    stack = model.get_submodule(was.path)
    for place, i in enumerate(was.order):
        shared, copies = {id(p) for p in stack[was.order.index(i)].parameters()}, {}
        for module in stack[place].modules() if i in was.order[:place] else ():
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in shared:
                    setattr(module, name, copy.deepcopy(parameter, copies))
    delattr(model, ATTRIBUTE)


def first_of(model: nn.Module) -> Callable[[str], str]:
    """What the path of a tensor is where its layer stands first: the same for all that are one since the layer comes again."""
    if (was := replicated(model)) is None:
        return lambda path: path
    inside = f"{was.path}."

    def first(path: str) -> str:
        if not path.startswith(inside):
            return path
        place, _, rest = path.removeprefix(inside).partition(".")
        return f"{inside}{was.order.index(was.order[int(place)])}.{rest}"

    return first


def refuse_replicated(config: LoraConfig, source: object) -> None:
    """Raises a ConfigError if an adapter, which `source` names, is for a model that is built in memory alone."""
    if config.layer_replication is not None:
        raise ConfigError(
            f"{source} is for a model whose layers are replicated (layer_replication), which no files hold; load it onto its "
            "base (load_adapter), then merge_and_unload(model) and model.save_pretrained(...) make files of the deeper model"
        )


def _stack_of(model: nn.Module) -> str:
    """The path of the stack of layers: where PEFT finds it, or else the only one.

    Raises:
        TargetError: there is none, or there are several.
    """
    stacks = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    inner, holder = "", model
    while name := next((name for name in ("model", "bert") if isinstance(getattr(holder, name, None), nn.Module)), None):
        inner, holder = f"{inner}{name}.", getattr(holder, name)
    for name in ("layers", "encoder.layer", "h"):
        if f"{inner}{name}" in stacks:
            return f"{inner}{name}"
    found = [path for path in stacks if path.rpartition(".")[2] in STACKS]
    if len(found) != 1:
        which = f"these are: {', '.join(found)}" if found else "there is none"
        raise TargetError(f"layer_replication needs one stack of layers, called {' or '.join(STACKS)}, and {which}")
    return found[0]


def _again(layer: nn.Module) -> nn.Module:
    """Another module with the same parameters. Buffers are its own, as in PEFT."""
    kept = [*layer.parameters(), *(vars(m)["config"] for m in layer.modules() if "config" in vars(m))]
    return copy.deepcopy(layer, {id(thing): thing for thing in kept})


def _count_again(model: nn.Module, count: int, order: Sequence[int]) -> list[tuple[Any, str, Any]]:
    """Has the model's configurations say how many layers there are, and of what types; (configuration, name, value before)."""
    before: list[tuple[Any, str, Any]] = []
    if configs(model):
        own_config(model)
    for config in {id(config): config for config in configs(model)}.values():
        if getattr(config, "num_hidden_layers", None) != count:
            continue
        types = {name: value for name, value in vars(config).items() if name.endswith("layer_types") and value}
        changed = {name: [value[i] for i in order] for name, value in types.items() if len(value) == count}
        for name, value in (changed | {"num_hidden_layers": len(order)}).items():
            before.append((config, name, getattr(config, name)))
            setattr(config, name, value)
    return before


def _refill(stack: nn.ModuleList, layers: Sequence[nn.Module]) -> None:
    """Makes `stack` hold exactly these layers."""
    del stack[:]
    stack.extend(layers)
