"""All or nothing: a verb that is stopped half-way, by Ctrl-C, full memory or any error, leaves the model as it was.

    @all_or_nothing
    def inject(model, ...): ...

Before the verb runs, everything that it may change is noted: of every module the class, the attributes and the tables in them
(parameters, buffers, children, hooks); of every tensor its data and flags; of the adapters' records their fields. No value is
copied, so this takes a few microseconds a module, and so a verb must not write into the memory of a tensor that was there
before: it gives the tensor new data. What has to be written in place, because a second copy of a model may not fit, comes last,
as steps that tell by themselves whether they were done: after the first of them there is no way back, and an interruption waits
until all are done.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..cpu.masks import MaskGroup
from .wrappers import check_model

T = TypeVar("T")
Verb = TypeVar("Verb", bound=Callable[..., Any])  # what wraps a verb takes what it took


class Record:
    """An object beside the modules whose attributes a verb may change, such as the list of a model's adapters."""


_NOTED = (Record, MaskGroup)


class Before:
    """What things were, to be put back: see `restore`."""

    def __init__(self, things: Iterable[object] = ()) -> None:
        self._attributes: list[tuple[dict, str, Any]] = []
        self._objects: list[tuple[Any, type, dict]] = []
        self._tables: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, bool, Tensor, Tensor | None, dict]] = []
        self._seen: set[int] = set()
        for thing in things:
            self.note(thing)

    def note(self, thing: Any) -> None:
        """Notes a module or a record: its class, its attributes, the tables in them, and the tensors in those."""
        if id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        self._objects.append((thing, type(thing), dict(vars(thing))))
        for value in vars(thing).values():
            if isinstance(value, _NOTED):
                self.note(value)
                continue
            if isinstance(value, (dict, set, list)):
                self._tables.append((value, value.copy()))
            for entry in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
                if isinstance(entry, Tensor):
                    self.note_tensor(entry)
                elif isinstance(entry, _NOTED):
                    self.note(entry)

    def note_tensor(self, tensor: Tensor) -> None:
        """Notes whether a tensor requires gradients, what its data are, and what it carries (the scales of a 4-bit one)."""
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        self._tensors.append((tensor, tensor.requires_grad, tensor.data, tensor.grad, dict(vars(tensor))))
        for value in vars(tensor).values():
            if hasattr(value, "as_dict"):  # a quantisation state, which goes with the layout of the data
                self.note(value)

    def note_attribute(self, thing: Any, name: str) -> None:
        """Notes one attribute of an object, where noting all of them would cost more than the change."""
        self._attributes.append((vars(thing), name, vars(thing)[name]))

    def restore(self) -> None:
        """Puts everything back as it was noted. May be called again if it was interrupted."""
        for attributes, name, value in self._attributes:
            attributes[name] = value
        for thing, kind, attributes in self._objects:
            if type(thing) is not kind:
                thing.__class__ = kind
            _refill(vars(thing), attributes)
        for table, content in self._tables:
            _refill(table, content)
        for tensor, requires_grad, data, grad, attributes in self._tensors:
            if _place(tensor) != _place(data):
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad
            if attributes or vars(tensor):
                _refill(vars(tensor), attributes)


class LastSteps:
    """Changes in place, each of one tensor by one operation of torch, which raises the tensor's version by one as it writes.

    So it can be told at any time which of them are done, also if an interruption came between two lines.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, int, Callable[[], object]]] = []
        self._of_tensor: Counter[int] = Counter()

    def add(self, tensor: Tensor, step: Callable[[], object]) -> None:
        self._steps.append((tensor, tensor._version + self._of_tensor[id(tensor)], step))
        self._of_tensor[id(tensor)] += 1

    @property
    def begun(self) -> bool:
        return any(tensor._version > version for tensor, version, _ in self._steps)

    def run(self) -> None:
        """Does those that are not done yet."""
        for tensor, version, step in self._steps:
            if tensor._version == version:
                step()


def attempt(model: nn.Module, change: Callable[[LastSteps], T], also: Iterable[object] = ()) -> T:
    """Runs `change` on the model, and then the steps that it adds: all of it, or nothing.

    Args:
        model: the module at the root.
        change: what to do; it is given where to add the steps.
        also: other objects whose attributes it may change.
    """
    before, last = Before((*model.modules(), *also)), LastSteps()
    try:
        result = change(last)
        last.run()
        return result
    except BaseException:
        insist(last.run if last.begun else before.restore)
        raise


def all_or_nothing(verb: Verb) -> Verb:
    """Makes a verb, whose first argument is a model, leave that as it was if it raises anything."""

    @functools.wraps(verb)
    def whole(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_model(model)
        return attempt(model, lambda _: verb(model, *args, **kwargs))

    return cast(Verb, whole)


def insist(step: Callable[[], object]) -> None:
    """Runs a step to its end, however often Ctrl-C comes in between; it must bear to be begun anew.

    Raises:
        BaseException: what came in between; the step is done, unless it failed twice.
    """
    interruption, failed = None, False
    while True:
        try:
            step()
            break
        except KeyboardInterrupt as error:
            interruption = error
        except BaseException as error:
            if failed:
                raise
            interruption, failed = error, True
    if interruption is not None:
        raise interruption


def _refill(table: Any, content: Any) -> None:
    """Makes a dictionary, set or list hold exactly `content`; it stays the same object.

    One that holds it still is left alone: diffusers' configurations can't be written to.
    """
    pairs = zip(table.items(), content.items(), strict=False) if isinstance(table, dict) else ()
    if isinstance(table, dict) and len(table) == len(content) and all(k is n and v is w for (k, v), (n, w) in pairs):
        return
    if isinstance(table, list):
        table[:] = content
        return
    table.clear()
    table.update(content)


def _place(tensor: Tensor) -> tuple:
    if is_lazy(tensor):
        return ()
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
