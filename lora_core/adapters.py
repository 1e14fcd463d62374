"""Whole-model verbs: switch adapters, disable them, delete one, count and list parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import ConfigError, MergeError
from .layers import LoraLayer
from .nf4 import parameter_bytes
from .registry import (
    activate,
    adapter_layers,
    adapter_parameters,
    as_names,
    check_new_name,
    check_not_mixing,
    find_adapter,
    forget,
    has_adapters,
    lora_parameters,
    registry_of,
    rename,
    unwrap,
)


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Makes exactly the adapters `names` active: one, or several whose updates add up.

    Their parameters require gradients again (if they were added for training), those of the others do not. The cost
    does not depend on how many adapters are loaded.

    Which adapters are active is a state of the model, not of a thread: a forward that another thread is in would use the
    old ones on some layers and the new ones on others. So threads that run one model use `mixed_batch`, and while one of
    them is in it this, like every verb that changes the model's adapters, is refused.

    Raises:
        UnknownAdapterError: a name is not on the model; nothing is changed.
        MergeError: adapters are folded into the weights now, or two of `names` train the same tensor.
        MixedBatchError: a thread is in a mixed batch.
    """
    check_not_mixing(model)
    activate(model, as_names(names))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which the model is its base again: no updates, the base's own heads and biases.

    Raises:
        MergeError: adapters are folded into the weights now.
        MixedBatchError: a thread is in a mixed batch.
    """
    active = registry_of(model).active
    check_not_mixing(model)
    activate(model, ())
    try:
        yield
    finally:
        activate(model, active)


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Gives the adapter `old` the name `new`: active, trained or folded, it stays what it was.

    Raises:
        UnknownAdapterError: there is no `old`.
        AdapterExistsError, ConfigError: `new` is taken, or not a valid name.
        MixedBatchError: a thread is in a mixed batch.
    """
    find_adapter(model, old)
    check_new_name(model, new)
    check_not_mixing(model)
    rename(model, old, new)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter and frees what it held. With the last one the model is plain again.

    Raises:
        UnknownAdapterError: it is not on the model.
        MergeError: adapters are folded into the weights now.
        MixedBatchError: a thread is in a mixed batch.
    """
    adapter = find_adapter(model, name)
    active = registry_of(model).active
    check_not_mixing(model)
    activate(model, [other for other in active if other != name])
    for _, layer in adapter_layers(model, adapter):
        if layer.lora_folded:
            raise MergeError("adapters are folded into the weights; call unmerge_adapter(model) before deleting one")
        layer.delete_adapter(name)
        if not layer.lora_scaling:
            layer.release()
    forget(model, name)


def unload(model: nn.Module) -> nn.Module:
    """Removes every adapter: the model is exactly what it was before the first `inject`. Returns it."""
    registry = registry_of(model)
    for adapter in registry.adapters.values():
        for _, layer in adapter_layers(model, adapter):
            layer.unfold()
    for name in list(registry.adapters):
        delete_adapter(model, name)
    return model


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
    for p in _all_parameters(model):
        total += _size(p)
        trainable += _size(p) if p.requires_grad else 0
    if has_adapters(model):
        adapter = sum(p.numel() for name in registry_of(model).active for p in lora_parameters(model, name))
    return ParameterCount(trainable, adapter, total)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the counts of `count_parameters` in one line."""
    print(count_parameters(model))


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients: what to give to the optimiser."""
    return [p for p in model.parameters() if p.requires_grad]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with B's learning rate `ratio` times that of all else that is trained.

    LoRA+ (Hayou et al., arXiv 2402.12354): B starts at zero and needs larger steps than A the wider the model is; the paper
    tries ratios from 2 to 32. Of an embedding, where A starts at zero, no rate is raised.

        torch.optim.AdamW(lora_plus_groups(model, lr=2e-4))

    Raises:
        ConfigError: lr or ratio is not a positive number.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a positive number, not {value!r}")
    layers = {m for m in unwrap(model).modules() if isinstance(m, LoraLayer) and not m.zero_A}
    fast = {id(p) for layer in layers for p in layer.lora_B.values()}
    parameters = trainable_parameters(model)
    return [
        {"params": [p for p in parameters if id(p) not in fast], "lr": lr},
        {"params": [p for p in parameters if id(p) in fast], "lr": lr * ratio},
    ]


def base_weight_bytes(model: nn.Module) -> int:
    """Bytes that the base's parameters hold, scales of 4-bit ones included, all that adapters added excluded."""
    added: set[int] = set()
    if has_adapters(model):
        added = {id(p) for name in registry_of(model).adapters for p in adapter_parameters(model, name)}
    return sum(parameter_bytes(p) for p in _all_parameters(model) if id(p) not in added)


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that the model holds, each once: those in place, and those that wait for their turn."""
    seen = {id(p): p for p in unwrap(model).parameters()}
    if has_adapters(model):
        registry = registry_of(model)
        waiting = [registry.originals.values(), *(adapter.copies.values() for adapter in registry.adapters.values())]
        seen |= {id(t): t for tensors in waiting for t in tensors if isinstance(t, nn.Parameter)}
    yield from seen.values()


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
