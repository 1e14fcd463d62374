"""Name patterns as regular expressions: how they match a path, and which are refused when they come from a file.

A file may be anybody's, and Python's `re` tries every way in which a pattern can match before it gives up: "(a+)+b" has
2^n of them on n characters. So before a pattern of a file is used its ways are counted, on a path of LENGTH characters: a
repeat has one for each number of times, an alternation one for each branch that may match, and what stands in a row
multiplies. "(a+)+b" has more than MAX_WAYS, and so has a fifth ".*". What may pass can still be slow on long paths, so all
matching for one model together gets MAX_SECONDS.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

from ..errors import TargetError

try:
    from re import _parser
except ImportError:  # Python 3.10
    import sre_parse as _parser

#: How a pattern is put into an expression: a whole path; the end of one, after a dot; the list that a layer stands in.
WHOLE, END, LAYERS = "{}", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<layer>\d+)\."

LENGTH = 64
MAX_WAYS = 2 * LENGTH**4
MAX_CHARACTERS = 2_000  # of one pattern
MAX_SECONDS = 2.0

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


def matches(pattern: str, path: str, form: str = WHOLE) -> re.Match | None:
    """The match of a path by a pattern in one of the forms.

    Raises:
        TargetError: the time of a `limited` context is over.
    """
    if form == END and path[-1:] != pattern[-1:] and is_name(pattern):
        return None
    expression, left, start = expression_of(pattern, form), _left.get(), time.thread_time()
    found = expression.fullmatch(path) if form == WHOLE else expression.match(path)
    if left is not None:
        left[0] -= time.thread_time() - start
        if left[0] < 0:
            raise TargetError(f"the pattern {pattern!r} takes too long to match; name the modules in a list instead")
    return found


def is_name(pattern: str) -> bool:
    """Whether a pattern is but a name or the end of a path: valid, quick, and matched only by what ends like it."""
    return _NAME.fullmatch(pattern) is not None


@functools.lru_cache(maxsize=2**14)  # the cache of `re` is too small for one pattern a layer
def expression_of(pattern: str, form: str = WHOLE) -> re.Pattern:
    """The regular expression of a pattern.

    Raises:
        ValueError: there is none; says why.
    """
    try:
        re.compile(pattern)  # alone: what it opens it must close
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
        many = _ways(_parser.parse(form.format(pattern))) > MAX_WAYS
    except (re.error, OverflowError, RecursionError):
        return "is not a regular expression"
    return "has too many ways to match, which takes too long; name the modules in a list instead" if many else None


def _ways(items: Sequence[tuple[Any, Any]]) -> int:
    """In how many ways at most the items, one after the other, match the start of a path; MAX_WAYS + 1 stands for more."""
    ways = 1
    for operation, argument in items:
        ways = min(ways * _ways_of(str(operation), argument), MAX_WAYS + 1)
    return ways


def _ways_of(operation: str, argument: Any) -> int:
    if operation.endswith("_REPEAT"):
        least, most, body = argument
        if least > LENGTH:
            return MAX_WAYS + 1  # no name is so long
        most, each = min(most, LENGTH), _ways(body)
        if each == 1:
            return max(most - least + 1, least, 1)
        return sum(each**times for times in range(least, most + 1))
    if operation == "BRANCH":
        _, branches = argument
        return 1 if _exclude_each_other(branches) else max(len(branches), sum(map(_ways, branches)))
    if operation == "GROUPREF_EXISTS":
        return sum(_ways(branch or ()) for branch in argument[1:])
    nested = {"SUBPATTERN": -1, "ATOMIC_GROUP": None, "ASSERT": 1, "ASSERT_NOT": 1}
    if operation in nested:
        place = nested[operation]
        return _ways(argument if place is None else argument[place])
    return 1  # a character, a class of characters, a position


def _exclude_each_other(branches: Sequence[Sequence[tuple[Any, Any]]]) -> bool:
    """Whether the branches are plain words of which none starts another: one at most can match, and in one way."""
    if not all(str(operation) == "LITERAL" for branch in branches for operation, _ in branch):
        return False
    words = sorted(tuple(code for _, code in branch) for branch in branches)
    return not any(later[: len(word)] == word for word, later in pairwise(words))
