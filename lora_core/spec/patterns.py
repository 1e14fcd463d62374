"""Name patterns as regular expressions: how they match a path, and which are refused when they come from a file.

Patterns and names may both be anybody's, so they are matched by `matching.py`, whose time does not explode, and all that is
matched for one model gets MAX_SECONDS together. A pattern that only `re` can match is a user's own: a file's is refused.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import TargetError
from .matching import Part, Text, Unsupported, compiled

#: How a pattern is put into an expression: a whole path; the end of one, after a dot; what stands before a layer's number.
WHOLE, END, LAYERS = "{}", r"(.*\.)?({})$", r"(?:^|.*?\.){}\."

MAX_CHARACTERS = 2_000  # of one pattern
MAX_SECONDS = 1.0
SECONDS_OF_A_NAME = 5e-7  # counted for one name, since to look at the clock takes as long

_NAME = re.compile(r"[\w.-]*[\w-]")
_left: ContextVar[list[float] | None] = ContextVar("seconds left for matching", default=None)


@contextmanager
def limited() -> Iterator[None]:
    """A context in which matching may take MAX_SECONDS of this thread's time altogether."""
    token = _left.set([MAX_SECONDS])
    try:
        yield
    finally:
        _left.reset(token)


@contextmanager
def spending(what: str) -> Iterator[Callable[[], None]]:
    """Counts the time of its block as that of matching `what`; gives a function that raises when there is none left.

    Raises:
        TargetError: the time of a `limited` context is over.
    """
    left, start = _left.get(), time.thread_time()

    def tick() -> None:
        if left is not None and time.thread_time() - start >= left[0]:
            raise TargetError(f"{what} takes too long to match; name fewer modules, and no patterns")

    try:
        yield tick
        tick()
    finally:
        if left is not None:
            left[0] -= time.thread_time() - start


def matches(pattern: str, path: str, form: str = WHOLE) -> bool:
    """Whether a pattern in the form WHOLE or END matches a path.

    Raises:
        TargetError: the time of a `limited` context is over.
    """
    if form == END and is_name(pattern) and "\n" not in path:
        if left := _left.get():
            left[0] -= SECONDS_OF_A_NAME
        return _is_end(pattern, path)
    with spending(f"the pattern {pattern!r}") as tick:
        part, text = expression_of(pattern, form), Text(path, tick)
        if isinstance(part, re.Pattern):
            return bool(part.fullmatch(path) if form == WHOLE else part.match(path))
        found = part(text, 1, False)
        return bool(found >> len(path) if form == WHOLE else found)


def _is_end(name: str, path: str) -> bool:
    """Whether a path ends with a name, at its start or after a dot. Its own dots are an expression's: they match anything."""
    if name[-1] != path[-1:] or len(name) > len(path):
        return False
    start = len(path) - len(name)
    return path[max(start - 1, 0) : start] in ("", ".") and all(a in (".", b) for a, b in zip(name, path[start:], strict=True))


def layer_of(pattern: str, path: str) -> int | None:
    """The number that stands in `path` after the list of layers that a pattern names: the first; None if there is none.

    Raises:
        TargetError: the time of a `limited` context is over.
    """
    with spending(f"the pattern {pattern!r}") as tick:
        part = expression_of(pattern, LAYERS)
        if isinstance(part, re.Pattern):
            ends = {match.end() for match in [part.match(path)] if match}
        else:
            found = part(Text(path, tick), 1, False)
            ends = {i for i in range(len(path)) if found >> i & 1}
        numbers = (re.compile(r"(\d+)\.").match(path, end) for end in ends)
        return next((int(match[1]) for match in numbers if match), None)


def is_name(pattern: str) -> bool:
    """Whether a pattern is but a name or the end of a path: valid, quick, and matched only by what ends like it."""
    return _NAME.fullmatch(pattern) is not None


@functools.lru_cache(maxsize=2**14)  # one pattern a layer
def expression_of(pattern: str, form: str = WHOLE) -> Part | re.Pattern:
    """What matches a pattern; an expression of `re` where nothing else can.

    Raises:
        ValueError: it is no regular expression; says why.
    """
    try:
        re.compile(pattern)  # alone: what it opens it must close
        try:
            return compiled(form.format(pattern))
        except Unsupported:
            return re.compile(form.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def refusal(pattern: str, form: str = WHOLE) -> str | None:
    """Why a pattern of a file is not used, in half a line; None: it is."""
    if len(pattern) > MAX_CHARACTERS:
        return f"has {len(pattern):,} characters, and {MAX_CHARACTERS:,} are allowed"
    if is_name(pattern):
        return None
    try:
        part = expression_of(pattern, form)
    except ValueError:
        return "is not a regular expression"
    if isinstance(part, re.Pattern):
        return "refers back to what a part of it matched, which can take too long; name the modules in a list instead"
    return None
