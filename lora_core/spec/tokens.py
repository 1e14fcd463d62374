"""`trainable_token_indices`: which rows of which embeddings are trained, checked. Values only: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

FIELD = "trainable_token_indices"

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


def _ids(ids: Any) -> tuple[int, ...]:
    valid = isinstance(ids, (list, tuple)) and ids and all(type(i) is int and 0 <= i <= MAX_TOKEN for i in ids)
    if not valid:
        raise ConfigError(f"{FIELD} must be a list of token ids, or {{name of a module: such a list}}, not {ids!r:.99}")
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ConfigError(f"{FIELD} has the token {twice} twice; name each once")
    return tuple(ids)
