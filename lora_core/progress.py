"""Bars on standard error for what takes more than two seconds: on a terminal alone, and gone when it is done.

Example:

    for path, layer in watched(layers.items(), "quantising"): ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

#: What is done sooner shows no bar.
SECONDS = 2.0


def watched(items: Iterable[T], what: str) -> Iterable[T]:
    """The items, with a bar that counts them."""
    if not _on_a_terminal():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=SECONDS, leave=False)


@contextmanager
def counted(nbytes: int, what: str) -> Iterator[Callable[[int], object]]:
    """A context with a function that hears of bytes as they are done, of which there are about `nbytes`; a bar shows them."""
    if not _on_a_terminal():
        yield int
        return
    from tqdm import tqdm

    with tqdm(total=nbytes, desc=what, unit="B", unit_scale=True, delay=SECONDS, leave=False) as bar:
        yield bar.update


def _on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
