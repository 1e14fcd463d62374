"""Which methods there are: from a configuration to its method, and from a file's key to the table that it belongs in."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError
from ..spec.config import LoraConfig
from ..spec.peft_fields import plain
from .activated import Activated
from .base import FORMS, METHODS, Method, Table
from .bias import LoraWithBias
from .dora import ASKED as ASKED, MAGNITUDE as MAGNITUDE, Dora
from .lora import Lora
from .tokens import TokenRows
from .vera import Vera

LORA, DORA, LORA_BIAS, VERA, TOKENS, ACTIVATED = Lora(), Dora(), LoraWithBias(), Vera(), TokenRows(), Activated()

METHODS.update({method.name: method for method in (LORA, DORA, LORA_BIAS, VERA, TOKENS, ACTIVATED)})


def register_method(method: Method) -> None:
    """Makes `inject`, `load_adapter` and the command line know a method of one's own; see `methods/base.py`.

    Args:
        method: what such an adapter does. Where it asks for a configuration class of its own, its `peft_type` is its own too.

    Raises:
        ConfigError: it is no Method, or its name, a table or a key is another method's already, or of no known form.
    """
    if not isinstance(method, Method) or not re.fullmatch(r"\w+", method.name):
        raise ConfigError(f"register_method takes a Method with a name, not {method!r}; derive from lora_core.Method")
    if method.name in METHODS:
        raise ConfigError(f"there is a method {method.name!r} already; give yours another name")
    known = {table.name: table for other in METHODS.values() for table in other.tables}
    keys = {key: table.name for table in known.values() for key in (table.key, table.embedding_key) if key}
    for table in method.tables:
        if not re.fullmatch(r"[a-z]\w*", table.name) or known.get(table.name, table) != table:
            raise ConfigError(f"table {table.name!r} of method {method.name!r} is no name, or another method's table")
        if table.form not in FORMS and not table.shared:
            raise ConfigError(f"table {table.name!r} has the form {table.form!r}; it must be one of {', '.join(FORMS)}")
        for key in filter(None, (table.key, table.embedding_key)):
            if keys.get(key, table.name) != table.name:
                raise ConfigError(f"table {table.name!r} has the key {key!r}, which is that of {keys[key]!r}; choose another")
    for other in METHODS.values():
        if other.peft_type == method.peft_type and other.config is not method.config:
            raise ConfigError(f"peft_type {method.peft_type!r} is that of {other.config.__name__}; give yours one of its own")
    METHODS[method.name] = method


def method_of(config: LoraConfig) -> Method:
    """The method that a configuration asks for: the last one registered that says so."""
    return next(method for method in reversed(METHODS.values()) if method.asked_by(config))


def config_classes() -> dict[str, type[LoraConfig]]:
    """{peft_type of an adapter's file: the class of its configuration}."""
    return {method.peft_type: method.config for method in METHODS.values()}


def configuration(settings: Any) -> LoraConfig:
    """`settings` if it is a configuration, or what an object of PEFT's says, which is known by `peft_type` and `to_dict`.

    Raises:
        ConfigError: it is neither, or asks for what is not here.
    """
    if isinstance(settings, LoraConfig):
        return settings
    if isinstance(settings, dict):
        raise ConfigError("config must be a LoraConfig, not dict; pass LoraConfig(**config)")
    if not hasattr(settings, "peft_type") or not callable(getattr(settings, "to_dict", None)):
        raise ConfigError(f"config must be a LoraConfig, not {type(settings).__name__}")
    fields, classes = settings.to_dict(), config_classes()
    kind = plain(fields.pop("peft_type", None))
    if kind not in classes:
        raise ConfigError(f"config is PEFT's, of the kind {kind!r}; only {' and '.join(map(repr, classes))} are here")
    return classes[kind](**fields)


def all_tables() -> dict[str, Table]:
    """{name: table} of every method's."""
    return {table.name: table for method in METHODS.values() for table in method.tables}
