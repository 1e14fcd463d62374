"""One door for every file that is read: a regular file, opened without waiting, and no more of it than is allowed.

A directory may be anybody's. A pipe in it would be waited for for ever, a device has no end, a Git LFS pointer only stands
for a file, and JSON can be nested deeper than Python's stack. Links are followed: the Hub's cache is made of them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FileFormatError

#: How deep JSON may be nested; a model's configuration is some five levels deep.
MAX_DEPTH = 64
#: Bytes of a JSON file of which nothing else is said; the index of a base of a million tensors has as many.
MAX_JSON = 100_000_000
#: How a Git LFS pointer begins, today and in the first versions (git-lfs, docs/spec.md).
POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_file(path: Path, buffering: int = -1) -> BinaryIO:
    """A regular file, open for reading.

    Raises:
        FileFormatError: it is not there, no regular file, a Git LFS pointer, or can't be read.
    """
    try:
        _refuse_special(path, os.stat(path).st_mode)  # before it is opened: some devices act on that alone
        file = open(path, "rb", buffering, opener=_without_waiting)  # noqa: SIM115  its users close it
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        _refuse_special(path, os.fstat(file.fileno()).st_mode)
        if file.read(max(map(len, POINTERS))).startswith(POINTERS):
            raise FileFormatError(f"{path} is a Git LFS pointer, which only stands for the file; fetch that with: git lfs pull")
        file.seek(0)
    except OSError as error:
        file.close()
        raise _unreadable(path, error) from None
    except FileFormatError:
        file.close()
        raise
    return file


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file.

    Raises:
        FileFormatError: as `open_file`; or it is longer than `limit`.
    """
    with open_file(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise _unreadable(path, error) from None
    if len(data) > limit:
        raise FileFormatError(f"{path} is larger than {limit:,} bytes, which is more than such a file may have")
    return data


def parse_json(data: bytes | str, *, once: bool = True) -> Any:
    """What a JSON text says.

    Args:
        data: the text; bytes are UTF-8.
        once: whether a name that stands twice in an object is an error.

    Raises:
        ValueError: it is no JSON, or is nested deeper than MAX_DEPTH.
    """
    too_deep = f"it is nested more than {MAX_DEPTH} levels deep"
    try:
        value = json.loads(data if isinstance(data, str) else data.decode(), object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return value
    raise ValueError(too_deep)


def read_object(path: Path, limit: int = MAX_JSON, *, once: bool = True) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileFormatError: as `read_bytes`; or there is none.
    """
    data = read_bytes(path, limit)
    try:
        content = parse_json(data, once=once)
    except ValueError as error:
        raise FileFormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} holds a {type(content).__name__}; a JSON object is expected")
    return content


def check_directory(directory: Path, names: Sequence[str]) -> None:
    """Before a library reads a directory: nothing in it may make it wait, and what matches `names` must be what it seems.

    Raises:
        FileFormatError: there is a pipe or the like, or a file of these names can't be opened.
    """
    for path in sorted(directory.iterdir()):
        if path.exists() and not path.is_dir():
            _refuse_special(path, path.stat().st_mode)
    for path in (path for name in names for path in directory.glob(name)):
        open_file(path).close()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")
        raise FileFormatError(f"{path} is {kind}; a regular file is expected")


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    if isinstance(error, FileFormatError):
        return error
    return FileFormatError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} stands there twice")
        result[name] = value
    return result


def _children(node: Any) -> Any:
    """What is nested one level deeper."""
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return (child for child in inner if isinstance(child, (dict, list)))
