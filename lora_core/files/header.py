"""The header of a safetensors file: its length in 8 bytes, then JSON that says of each tensor what it is and where."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METADATA = "__metadata__"


def read_header(path: Path, limit: int) -> tuple[dict[str, Any], dict[str, str], int]:
    """({tensor: its entry}, metadata, the byte at which the tensors begin).

    Raises:
        OSError: the file can't be read.
        ValueError: the header is longer than the file or than `limit` bytes, or is no JSON object with each name once.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, limit):
            allowed = f", of which {limit:,} are allowed" if length > limit else ""
            raise ValueError(f"its header says that it is {length:,} bytes long{allowed}, and the file has {size:,}")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=no_repeats)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, header.pop(METADATA, None) or {}, 8 + length


def encode_header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a header, which depend on its content alone; the tensors are aligned after it."""
    text = json.dumps({METADATA: dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object in which no name stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands there twice")
    return result
