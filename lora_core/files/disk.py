"""Files that are there whole or not at all, and safetensors files whose bytes depend on their content alone."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import ConfigError, FileFormatError, OutputError
from .header import METADATA, encode_header, read_header

#: Of a header; an adapter on the experts of the largest models has half of it.
MAX_HEADER = 25_000_000


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all: a temporary one beside it, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_all(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a directory, one after the other, each whole; makes the directory if it is not there.

    Raises:
        ConfigError: a file is in its place.
        OutputError: it can't be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{directory} can't be made a directory: a file is in its place; choose another") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{directory} can't be made: {getattr(error, 'strerror', None) or error}; choose another") from None
    try:
        for name, data in files.items():
            write_whole(directory / name, data)
    except OSError as error:
        raise OutputError(f"{directory} can't be written to: {error.strerror or error}") from None


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; tensors that share memory are stored once a name."""
    data = safetensors.torch.save(_unshared(tensors))
    size = int.from_bytes(data[:8], "little")
    # The library writes metadata in an order that changes from call to call.
    entries = json.loads(data[8 : 8 + size])
    entries.pop(METADATA, None)
    return encode_header(entries, metadata) + data[8 + size :]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FileFormatError: the file is broken.
    """
    try:
        _, metadata, _ = read_header(path, MAX_HEADER)  # which refuses what the library lets pass: a name that is there twice
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise FileFormatError(f"{path} is not a whole safetensors file: {error}") from None


def is_directory(path: Path) -> bool:
    """Whether `path` is a directory; what can't be a path at all (too long, say) is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether `path` is a file, likewise."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def expanded(reference: str) -> Path:
    """`reference` as a path, with the home directory in the place of "~"; "~nobody" stays as it is."""
    try:
        return Path(reference).expanduser()
    except RuntimeError:
        return Path(reference)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return result
