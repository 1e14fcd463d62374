"""Token ids in a configuration, checked: which rows of which embeddings are trained, and what invokes an adapter. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

FIELD, INVOCATION = "trainable_token_indices", "alora_invocation_tokens"

#: No vocabulary is larger.
MAX_TOKEN = 2**31 - 1


def frozen_tokens(tokens: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """Token ids, or {name of a module: token ids}, as tuples; None stays None.

    Raises:
        ConfigError: it is neither, or a token is there twice.
    """
    if isinstance(tokens, Mapping):
        if not tokens or not all(isinstance(name, str) and name for name in tokens):
            raise ConfigError(f"{FIELD} must name modules and their tokens, {{'embed_tokens': [5]}}, not {tokens!r:.99}")
        return {name: _ids(ids) for name, ids in tokens.items()}
    return None if tokens is None else _ids(tokens)


def frozen_invocation(ids: Any) -> tuple[int, ...] | None:
    """The tokens that activate an adapter, in their order; None where there are none.

    Raises:
        ConfigError: it is no list of token ids.
    """
    if ids is None or ids == []:
        return None
    if not _are_tokens(ids):
        raise ConfigError(f"{INVOCATION} must be a list of token ids, such as [529, 9], not {ids!r:.99}")
    return tuple(ids)


def _are_tokens(ids: Any) -> bool:
    listed = isinstance(ids, (list, tuple)) and len(ids) > 0
    return listed and all(type(i) is int and 0 <= i <= MAX_TOKEN for i in ids)


def _ids(ids: Any) -> tuple[int, ...]:
    if not _are_tokens(ids):
        raise ConfigError(f"{FIELD} must be a list of token ids, or {{name of a module: such a list}}, not {ids!r:.99}")
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ConfigError(f"{FIELD} has the token {twice} twice; name each once")
    return tuple(ids)
