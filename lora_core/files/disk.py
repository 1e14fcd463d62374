"""Files that are there whole or not at all, and safetensors files whose bytes depend on their content alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..errors import ConfigError, OutputError
from ..progress import watched
from .header import METADATA, encode_header
from .locks import clear_abandoned, own, temporary_name
from .reading import open_file
from .stored import stored_tensors

#: Of a header; an adapter on the experts of the largest models has half of it.
MAX_HEADER = 25_000_000


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all: a temporary one beside it, synced, then renamed.

    A file that is replaced keeps its mode. What a process that was killed left of the same file is removed.
    """
    clear_abandoned(path)
    mode = _mode_of(path)
    handle, temporary = _begin(path, 0o666 if mode is None else 0o600)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(handle, mode)
            os.fsync(handle)
            os.replace(temporary, path)  # still open, and so still locked
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
    stored, metadata = stored_tensors(path, MAX_HEADER)
    with open_file(path, buffering=0) as file:
        return {name: tensor.read(file) for name, tensor in watched(stored.items(), f"reading {path.name}")}, metadata


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


def _begin(path: Path, mode: int) -> tuple[int, Path]:
    """A temporary file for `path`, open for writing and held."""
    while True:
        temporary = temporary_name(path)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        if own(handle, temporary):
            return handle, temporary
        os.close(handle)


def _mode_of(path: Path) -> int | None:
    """The permissions of a regular file; None if there is none."""
    try:
        found = os.lstat(path).st_mode
    except OSError:
        return None
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return result
