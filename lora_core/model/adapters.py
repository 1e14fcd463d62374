"""Whole-model verbs: switch adapters, disable them, delete one, count and list parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from torch import nn

from ..bases import base_of_weight, weight_bytes
from ..cpu.masks import MaskGroup
from ..errors import StateError
from ..layers import LoraLayer
from ..methods.base import refuse_foreign_factors
from ..methods.registry import method_of
from ..spec.checks import check_alpha
from .atomic import insist
from .lifecycle import activate, forget_replaced, remove, rename, unfold_all
from .registry import (
    adapter_parameters,
    changed_layers,
    check_new_name,
    copies_of,
    find_adapter,
    has_adapters,
    lora_parameters,
    registry_of,
    unwrap,
)
from .verbs import as_names, changes_adapters, check_changeable
from .wrappers import check_model


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Makes exactly the adapters `names` active: one, or several whose updates add up.

    Their parameters require gradients again (if they were added for training), those of the others do not. The cost
    does not depend on how many adapters are loaded.

    Which adapters are active is a state of the model, not of a thread: a forward that another thread is in would use the
    old ones on some layers and the new ones on others. So threads that run one model use `mixed_batch`, and while one of
    them is in it this, like every verb that changes the model's adapters, is refused.

    Raises:
        AdapterNameError: a name is not on the model; nothing is changed.
        StateError: adapters are folded into the weights now, or two of `names` train the same tensor; a thread is in a
            mixed batch, or in `disable_adapters`.
    """
    registry_of(model)
    check_changeable(model)
    activate(model, as_names(names))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which the model is its base again: no updates, the base's own heads and biases.

    Contexts may be nested, and open in several threads: the adapters come back when the last is closed. Until then verbs that
    change adapters are refused, and in these threads mixed batches, which would apply adapters.

    Raises:
        StateError: adapters are folded into the weights now; a thread is in a mixed batch.
    """
    registry, this = registry_of(model), object()
    if not registry.disabled:
        check_changeable(model)
        registry.suspended = registry.active

    def leave() -> None:
        registry.disabled.pop(this, None)
        if not registry.disabled and registry.active != registry.suspended:
            activate(model, registry.suspended)

    try:
        try:
            registry.disabled[this] = get_ident()
            activate(model, ())
            yield
        finally:
            insist(leave)
    finally:  # an interruption may come just before the line above
        insist(leave)


@changes_adapters
def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Gives the adapter `old` the name `new`: active, trained or folded, it stays what it was.

    Raises:
        AdapterNameError: there is no `old`.
        AdapterNameError, ConfigError: `new` is taken, or not a valid name.
        StateError: a thread is in a mixed batch, or in `disable_adapters`.
    """
    find_adapter(model, old)
    check_new_name(model, new)
    rename(model, old, new)


@changes_adapters
def delete_adapter(model: nn.Module, name: str) -> tuple[str, ...]:
    """Removes an adapter and frees what it held. With the last one the model is plain again.

    No other adapter becomes active in its place: after deleting the only active one the model computes what its base does,
    until `set_adapter` names another.

    Returns:
        The names of the adapters that are active now.

    Raises:
        AdapterNameError: it is not on the model.
        StateError: adapters are folded into the weights now; a thread is in a mixed batch, or in `disable_adapters`.
    """
    adapter, registry = find_adapter(model, name), registry_of(model)
    if any(layer.lora_folded for _, layer in changed_layers(model, adapter)):
        raise StateError("adapters are folded into the weights; call unmerge_adapter(model) before deleting one")
    forget_replaced(model)
    activate(model, [other for other in registry.active if other != name])
    remove(model, name)
    return registry.active


@changes_adapters
def unload(model: nn.Module) -> nn.Module:
    """Removes every adapter: the model is exactly what it was before the first `inject`. Returns it.

    Raises:
        AdapterNameError: it holds none.
        StateError: a thread is in a mixed batch, or in `disable_adapters`.
    """
    remove_all(model)
    return model


def remove_all(model: nn.Module) -> None:
    """What `unload` does, as a part of another verb."""
    registry = registry_of(model)
    unfold_all(model)
    forget_replaced(model)
    activate(model, ())
    for name in list(registry.adapters):
        remove(model, name)


@changes_adapters
def share_dropout_masks(model: nn.Module) -> int:
    """Makes sibling LoRA layers that read one tensor share its dropout mask, in place: query, key and value; gate and up.

    By default the masks of layers are independent, as in the paper and in PEFT. Sharing saves their drawing, as the merged
    projections of loralib do: each layer still drops every element with its probability, independently of all others, but what
    one of them does not see in a step its siblings do not see either. `cpu/masks.py` says when exactly a mask is shared. Layers
    that get their first adapter later are not among them until this is called again; those in a container without a forward of
    its own, such as `nn.ModuleList`, never are.

    Returns:
        The number of layers that have siblings to share with.

    Raises:
        AdapterNameError: the model holds no adapters; call it after `inject`.
    """
    registry_of(model)
    total = 0
    for parent in list(unwrap(model).modules()):
        layers = [m for m in dict.fromkeys(parent._modules.values()) if isinstance(m, LoraLayer) and m.is_linear]
        runs = type(parent).forward is not nn.Module.forward  # a ModuleList does not: no hook would tell when it is read
        if runs and len(layers) > 1:
            total += len(layers)
            for layer in layers:
                layer.leave_mask_group()
            group = MaskGroup(parent, layers)
            for layer in layers:
                layer.lora_masks = group
    return total


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters (values, not tensors).

    Attributes:
        trainable: those that require gradients.
        adapter: the A and B of the active adapters.
        total: all that the model holds, the base's originals of what adapters train a copy of included. A 4-bit weight
            counts by the values that it stands for.
    """

    trainable: int
    adapter: int
    total: int

    @property
    def trainable_percent(self) -> float:
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return (
            f"trainable parameters: {self.trainable:,} ({self.adapter:,} in the adapter) "
            f"of {self.total:,}: {self.trainable_percent:.4f} %"
        )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of any model, with or without adapters."""
    trainable = total = adapter = 0
    for p in unwrap(model).parameters():
        size = base_of_weight(p).shape_of(p).numel()
        total += size
        trainable += size if p.requires_grad else 0
    if has_adapters(model):
        adapter = sum(p.numel() for name in registry_of(model).active for p in lora_parameters(model, name))
    return ParameterCount(trainable, adapter, total)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the counts of `count_parameters` in one line."""
    print(count_parameters(model))


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients: what to give to the optimiser. Warns if there are none but of idle adapters."""
    check_model(model)
    found = [p for p in model.parameters() if p.requires_grad]
    if not found and has_adapters(model) and (active := registry_of(model).active):
        warnings.warn(
            f"nothing is trained: {' and '.join(map(repr, active))} came to be used as it is; "
            "load_adapter(..., trainable=True) trains one further",
            stacklevel=2,
        )
    return found


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with B's learning rate `ratio` times that of all else that is trained.

    LoRA+ (Hayou et al., arXiv 2402.12354): B starts at zero and needs larger steps than A the wider the model is; the paper
    tries ratios from 2 to 32. Of an embedding, where A starts at zero, no rate is raised.

        torch.optim.AdamW(lora_plus_groups(model, lr=2e-4))

    Raises:
        ConfigError: lr or ratio is not a positive number, or an active adapter has no B of its own (VeRA).
    """
    check_model(model)
    for name, value in (("lr", lr), ("ratio", ratio)):
        check_alpha(name, value)
    for name in registry_of(model).active if has_adapters(model) else ():
        refuse_foreign_factors(method_of(find_adapter(model, name).config), "lora_plus_groups")
    layers = {m for m in unwrap(model).modules() if isinstance(m, LoraLayer) and not m.zero_A}
    fast = {id(p) for layer in layers for p in getattr(layer, "lora_B", {}).values()}
    parameters = trainable_parameters(model)
    return [
        {"params": [p for p in parameters if id(p) not in fast], "lr": lr},
        {"params": [p for p in parameters if id(p) in fast], "lr": lr * ratio},
    ]


def base_weight_bytes(model: nn.Module) -> int:
    """Bytes that the base's parameters hold, scales of 4-bit ones included, all that adapters added excluded."""
    added: set[int] = set()
    if has_adapters(model):
        names = registry_of(model).adapters
        added = {id(p) for name in names for p in (*adapter_parameters(model, name), *copies_of(model, name).values())}
        layers = (m for m in unwrap(model).modules() if isinstance(m, LoraLayer))
        added |= {id(p) for layer in layers for table in layer.lora_tables for p in getattr(layer, table).values()}
    return sum(weight_bytes(p) for p in unwrap(model).parameters() if id(p) not in added)
