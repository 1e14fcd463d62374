"""What every verb that changes a model's adapters shares: when it is refused, and that it is done or undone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any, TypeVar, cast

from torch import nn

from ..errors import StateError
from .atomic import LastSteps, Verb, attempt
from .conventions import configs
from .registry import has_adapters, registry_of, unwrap

T = TypeVar("T")


def check_changeable(model: nn.Module) -> None:
    """Refuses to change the adapters of a model while someone counts on them as they are.

    Raises:
        StateError: a thread, maybe this one, is in a mixed batch, or in `disable_adapters`.
    """
    if not has_adapters(model):
        return
    registry = registry_of(model)
    if registry.mixing:
        where = "this thread" if get_ident() in registry.mixing else "another thread"
        raise StateError(f"a mixed batch is open on this model in {where}; change its adapters after it is closed")
    if registry.disabled:
        raise StateError("disable_adapters is open on this model; change its adapters after it is closed")


def changes_adapters(verb: Verb) -> Verb:
    """Makes a verb, whose first argument is a model, all or nothing, and refuses it where `check_changeable` does."""

    @functools.wraps(verb)
    def whole(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return change_adapters(model, lambda _: verb(model, *args, **kwargs))

    return cast(Verb, whole)


def change_adapters(model: nn.Module, change: Callable[[LastSteps], T]) -> T:
    """`atomic.attempt` on a model and its configuration, refused where `check_changeable` does."""
    root = unwrap(model)
    check_changeable(model)
    return attempt(root, change, configs(root))


def as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, as a tuple without repeats."""
    return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
