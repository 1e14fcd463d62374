"""Which process writes what: a lock that a process holds as long as it lives, on a directory or on a temporary file.

    with alone("runs/mine"): ...           # the only process that writes there; a second one is told so
    clear_abandoned(Path("merged"))        # removes ".merged.3f9c....tmp" of processes that were killed

The lock is flock's: it needs no file of its own, ends with the process whatever ended it, and a fresh process can see by it
that what was begun has no owner any more. Where a file system has none, nothing is locked and nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError

_UNIQUE = re.compile(r"[0-9a-f]{32}\.tmp")


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """A block in which no other process that asks may write to an existing directory.

    Raises:
        OutputError: another does.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        if _lock(handle) is False:
            raise OutputError(f"{directory} is in use: another process writes there; wait for it, or choose another directory")
        yield
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def own(handle: int, path: Path) -> bool:
    """Locks the temporary file or directory at `path`, just made and open; False if somebody has taken it for abandoned."""
    try:
        return _lock(handle) is not False and os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def clear_abandoned(path: Path) -> bool:
    """Removes what dead processes have left of their attempts to write `path`; returns whether a living one is writing it."""
    start, alive = f".{path.name}.", False
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(start)]
    except OSError:
        return False
    for name in names:
        if _UNIQUE.fullmatch(name.removeprefix(start)):
            alive |= not _remove_if_abandoned(path.parent / name)
    return alive


def _remove_if_abandoned(path: Path) -> bool:
    """Whether nobody holds what is at `path`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True  # gone meanwhile, or nothing that is made here
    try:
        held = _lock(handle)
        if held and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif held:
            path.unlink(missing_ok=True)
        return held is not False
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether this process has the lock now; None: there are none on this file system."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
