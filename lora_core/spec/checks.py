"""Checks of single values of a configuration: each raises a ConfigError with the field, the value and what is allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .patterns import expression_of, is_name

#: No layer is so wide; what is larger is a mistake, and too much for a tensor's shape.
MAX_RANK = 2**20

#: The largest factor before an update: what float32 holds.
MAX_FACTOR = 2**128 - 2**104


def check_rank(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ConfigError(f"{name} must be a positive integer{bound(value, MAX_RANK)}, not {shown(value)}")


def check_alpha(name: str, value: Any) -> None:
    if not is_number(value) or not 0 < value <= MAX_FACTOR:
        raise ConfigError(f"{name} must be a positive number{bound(value, MAX_FACTOR)}, not {shown(value)}")


def check_finite(name: str, value: Any) -> None:
    if not is_number(value) or not abs(value) <= sys.float_info.max:  # an integer may be too large for isfinite
        raise ConfigError(f"{name} must be a finite number, not {shown(value)}")


def check_tolerance(name: str, value: Any) -> None:
    check_finite(name, value)
    if value < 0:
        raise ConfigError(f"{name} must be zero or more, not {value!r}: nothing deviates by less")


def frozen_ranges(name: str, ranges: Any) -> tuple[tuple[int, int], ...] | None:
    """Pairs [start, end) as tuples; None where there are none."""
    if ranges is None or ranges == []:
        return None
    listed = isinstance(ranges, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in ranges)
    valid = listed and all(type(i) is int for pair in ranges for i in pair) and all(0 <= a < b for a, b in ranges)
    if not valid:
        raise ConfigError(f"{name} must be a list of pairs [start, end), such as [[0, 4], [2, 5]], not {ranges!r:.99}")
    return tuple((a, b) for a, b in ranges)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def shown(value: Any) -> str:
    return "an integer of more than 19 digits" if isinstance(value, int) and abs(value) >= 10**19 else repr(value)


def bound(value: Any, most: int) -> str:
    if not is_number(value) or not most < value < math.inf:
        return ""
    return f" up to {most:,}" if most < 10**19 else f" up to {float(most):.3g}"


def check_regex(name: str, pattern: Any, form: str) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{name} must be a non-empty pattern, not {pattern!r}")
    try:
        if not is_name(pattern):  # there may be thousands, and expressions take time to make
            expression_of(pattern, form)
    except ValueError as error:
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression ({error})") from None
