"""Facts of the public names of `lora_core`, for the golden files."""

import dataclasses
import inspect
from typing import Any

import lora_core
from lora_core import LoraError


def api_facts() -> dict[str, Any]:
    """Every public name with its signature, fields or members, and every error with what it is."""
    names = {name: _described(getattr(lora_core, name)) for name in sorted(lora_core.__all__)}
    return {"names": names, "errors": dict(sorted(_errors(LoraError).items()))}


def _described(thing: Any) -> Any:
    if not isinstance(thing, type):
        return str(inspect.signature(thing))
    found: dict[str, Any] = {"bases": [base.__name__ for base in thing.__mro__[1:-1]]}
    if dataclasses.is_dataclass(thing):
        found["fields"] = {field.name: f"{field.type} = {_default(field)}" for field in dataclasses.fields(thing)}
        found["frozen"] = thing.__dataclass_params__.frozen
    members = {name for name in vars(thing) if not name.startswith("_")} - set(found.get("fields", ()))
    found["members"] = {name: _member(vars(thing)[name]) for name in sorted(members)}
    return found


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.default_factory.__name__}()"
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def _member(member: Any) -> str:
    if isinstance(member, property) or not callable(member):
        return "property" if isinstance(member, property) else repr(member)
    return str(inspect.signature(member))


def _errors(error: type) -> dict[str, list[str]]:
    """{name: names of its bases} of the error classes of the package."""
    found = {error.__name__: [base.__name__ for base in error.__bases__]}
    for subclass in error.__subclasses__():
        if subclass.__module__.split(".")[0] == "lora_core":
            found |= _errors(subclass)
    return found
