"""An optimiser that was made before the adapter holds what `inject` froze, and trains nothing: its first step says so."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .copies import base_tensors, original_of
from .registry import adapter_parameters, has_adapters, registry_of

_models: WeakSet[nn.Module] = WeakSet()
_seen: WeakSet[Optimizer] = WeakSet()
_hooks: list[Any] = []


def watch_optimizers(model: nn.Module) -> None:
    """Looks at each optimiser, once, at its first step from now on, and warns if it should have been made after `inject`."""
    _models.add(model)
    _seen.clear()
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    _seen.add(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in tuple(_models):
        if has_adapters(model) and _has_only_what_was_frozen(model, held):
            warnings.warn(
                "this optimiser holds parameters that inject() froze and none of an adapter's, so it trains nothing there; "
                "make it after inject(), of trainable_parameters(model)",
                stacklevel=3,
            )
            return


def _has_only_what_was_frozen(model: nn.Module, held: set[int]) -> bool:
    registry = registry_of(model)
    trained = {id(parameter) for name in registry.adapters for parameter in adapter_parameters(model, name)}
    before = registry.trainable_before.intersection(base_tensors(model))
    frozen = {id(original_of(model, path)) for path in before}  # wherever it waits while a copy is trained
    return not held.isdisjoint(frozen - trained) and held.isdisjoint(trained)
