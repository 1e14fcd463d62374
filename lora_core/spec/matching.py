"""Whether a regular expression matches a text, in time that does not explode.

`re` tries one way to match after another, and "(a+)+b" has 2^n of them on n characters. Here all ways are followed at once
(Thompson, "Regular expression search algorithm", CACM 11:6, 1968): what is kept is the set of places in the text that the
pattern may have come to, and each part of a pattern makes of such a set another. A set is an integer, bit i of which stands
for the place before character i.

    "abb":   {0}  a  {1}  b*  {1, 2, 3}

The pattern is parsed by `re`, and what one character or one position matches is asked of it too, so that nothing matches here
that does not match there. A lookahead is the set of the places from which its pattern leads somewhere, found from the
end backwards. What depends on the way that was taken has no such set: backreferences, conditions on groups, atomic parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from re import _compiler, _parser  # type: ignore[attr-defined]
from typing import Any

CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


class Unsupported(ValueError):
    """A pattern whose match depends on the way that was taken."""


class Text:
    """A text that is matched.

    Attributes:
        text: itself.
        everywhere: the set of all places.
        places: {character: the places before it}.
        tick: called in each round of a repeat; raises when there is no time left.
    """

    def __init__(self, text: str, tick: Callable[[], None]) -> None:
        self.text, self.tick, self.everywhere = text, tick, (2 << len(text)) - 1
        self.places: dict[str, int] = {}
        for i, character in enumerate(text):
            if not i % 1_000:
                tick()
            self.places[character] = self.places.get(character, 0) | 1 << i


#: (text, places, whether to go backwards) -> the places that a part of a pattern leads to from these.
Part = Callable[[Text, int, bool], int]


def compiled(pattern: str) -> Part:
    """The pattern, ready to match.

    Raises:
        Unsupported: it has no such form. re.error, OverflowError, RecursionError: it is no regular expression.
    """
    parsed = _parser.parse(pattern)
    return _row(parsed, parsed.state.flags)


def _row(items: Iterable, flags: int) -> Part:
    """Parts one after the other."""
    parts = [_part(str(operation), argument, (operation, argument), flags) for operation, argument in items]

    def row(text: Text, places: int, back: bool) -> int:
        for part in reversed(parts) if back else parts:
            if not places:
                break
            places = part(text, places, back)
        return places

    return parts[0] if len(parts) == 1 else row


def _part(operation: str, argument: Any, item: tuple, flags: int) -> Part:
    if operation in CHARACTERS:
        return _step(_before(item, flags))
    if operation == "AT":
        return _position(item, flags)
    if operation in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, body = argument
        if len(body) == 1 and str(body[0][0]) in CHARACTERS and most == _parser.MAXREPEAT:
            return _run(_before(body[0], flags), least)
        return _repeat(_row(body, flags), least, most)
    if operation == "BRANCH":
        return _branch([_row(branch, flags) for branch in argument[1]])
    if operation == "SUBPATTERN":
        _, added, removed, body = argument
        return _row(body, (flags | added) & ~removed)
    if operation in ("ASSERT", "ASSERT_NOT"):
        direction, body = argument
        return _look(_row(body, flags), ahead=direction > 0, wanted=operation == "ASSERT")
    if operation == "FAILURE":
        return lambda text, places, back: 0
    raise Unsupported("refers back to what a part of it has matched")


def _alone(item: tuple, flags: int) -> re.Pattern:
    """One item of a parsed pattern as an expression of `re`."""
    state = _parser.State()
    state.flags = flags
    return _compiler.compile(_parser.SubPattern(state, [item]), flags)


def _before(item: tuple, flags: int) -> Callable[[Text], int]:
    """Which places of a text stand before a character that the item matches."""
    if str(item[0]) == "LITERAL" and not flags & re.IGNORECASE:
        return lambda text: text.places.get(chr(item[1]), 0)
    expression, known = _alone(item, flags), {}

    def before(text: Text) -> int:
        found = 0
        for letter, places in text.places.items():
            if letter not in known:
                known[letter] = expression.match(letter) is not None
            if known[letter]:
                found |= places
        return found

    return before


def _step(before: Callable[[Text], int]) -> Part:
    """One character."""

    def step(text: Text, places: int, back: bool) -> int:
        return (places >> 1) & before(text) if back else (places & before(text)) << 1

    return step


def _run(before: Callable[[Text], int], least: int) -> Part:
    """A character, `least` times or more. Forwards an addition does it: its carry runs through each row of such characters."""
    any_number, first = _repeat(_step(before), 0, _parser.MAXREPEAT), _repeat(_step(before), least, least)

    def run(text: Text, places: int, back: bool) -> int:
        places = first(text, places, back)
        if back:
            return any_number(text, places, back)
        here = before(text)
        return ((places & here) + here) ^ here | places

    return run


def _position(item: tuple, flags: int) -> Part:
    expression = _alone(item, flags)

    def position(text: Text, places: int, back: bool) -> int:
        return sum(1 << i for i in range(len(text.text) + 1) if places >> i & 1 and expression.match(text.text, i))

    return position


def _repeat(body: Part, least: int, most: int) -> Part:
    def repeat(text: Text, places: int, back: bool) -> int:
        for _ in range(least):
            text.tick()
            before, places = places, body(text, places, back)
            if places == before:  # and so it stays
                break
        new = places
        for _ in range(most - least):
            text.tick()
            new = body(text, new, back) & ~places
            if not new:
                break
            places |= new
        return places

    return repeat


def _branch(branches: list[Part]) -> Part:
    def branch(text: Text, places: int, back: bool) -> int:
        found = 0
        for part in branches:
            found |= part(text, places, back)
        return found

    return branch


def _look(body: Part, ahead: bool, wanted: bool) -> Part:
    def look(text: Text, places: int, back: bool) -> int:
        found = body(text, text.everywhere, ahead)  # to look ahead is to come from anywhere backwards
        return places & (found if wanted else ~found)

    return look
