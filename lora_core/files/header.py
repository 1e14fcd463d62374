"""The header of a safetensors file: its length in 8 bytes, then JSON that says of each tensor what it is and where."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .reading import open_file, parse_json

METADATA = "__metadata__"
#: Of a tensor's name. The longest that transformers makes have some 150 characters.
MAX_NAME = 1_000


def read_header(path: Path, limit: int) -> tuple[dict[str, Any], dict[str, str], int]:
    """({tensor: its entry}, metadata, the byte at which the tensors begin).

    Raises:
        FileFormatError: the file can't be read; its header is longer than the file or than `limit` bytes, or is no JSON object
            with each name once, or a name is longer than MAX_NAME.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise broken(path, f"it has {size} bytes")
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, limit):
                allowed = f", of which {limit:,} are allowed" if length > limit else ""
                raise broken(path, f"its header says that it is {length:,} bytes long{allowed}, and the file has {size:,}")
            data = file.read(length)
        except (OSError, struct.error):
            raise broken(path, "it ended while it was read") from None
    try:
        header = parse_json(data)
    except ValueError as error:
        raise broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise broken(path, "its header is not a JSON object")
    _check_names(path, header)
    metadata = header.pop(METADATA, None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken(path, "its metadata are not texts by name")
    return header, metadata, 8 + length


def encode_header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a header, which depend on its content alone; the tensors are aligned after it.

    Raises:
        FileFormatError: a name is longer than MAX_NAME.
    """
    _check_names("the file", entries)
    text = json.dumps({METADATA: dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def broken(path: Path, what: str) -> FileFormatError:
    """The error for a file that is not as it should be."""
    return FileFormatError(f"{path} is not a whole safetensors file: {what}")


def _check_names(path: Path | str, names: Mapping[str, Any]) -> None:
    if long := next((name for name in names if len(name) > MAX_NAME), None):
        raise FileFormatError(
            f"{path} has a tensor whose name has {len(long):,} characters, and {MAX_NAME:,} are allowed: {long[:60]!r} ..."
        )
