"""Writing a checkpoint: a directory that is there whole or not at all, and safetensors files written tensor by tensor.

    with new_directory(Path("merged")) as directory:      # ".merged.3f9c....tmp", renamed to "merged" at the end
        write_shard(directory / "model.safetensors", {"weight": Entry(torch.float32, (2, 3), make)})

Whatever ends the block early leaves no "merged": an error removes what was written, and what a process that was killed has
left is removed by the next one that writes there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import LoraError, OutputError
from .checkpoint import INDEX_FILE
from .disk import is_directory
from .header import encode_header
from .locks import clear_abandoned, own, temporary_name
from .stored import DTYPES, StoredTensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written: its dtype and shape, which stand before it in the file, and where it comes from.

    `source` is a place in another file, to copy, or makes the tensor when its turn comes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory beside `output` that is renamed to it, synced, when the block has ended well; else it is removed.

    An empty directory at `output` is replaced, and its mode kept. What processes that were killed left of the same output is
    removed.

    Raises:
        OutputError: there is something at `output` already, another process is writing it, or the disk is full or can't be
            written to.
    """
    check_free(output)
    output = Path(os.path.abspath(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if clear_abandoned(output):
            raise OutputError(f"{output} is being written by another process; wait for it, or choose another directory")
        mode = stat.S_IMODE(output.stat().st_mode) if output.is_dir() else None
        handle, staging = _begin(output, 0o777 if mode is None else 0o700)
        try:
            yield staging
            for path in staging.iterdir():
                _sync(path)
            if mode is not None:
                os.fchmod(handle, mode)
            os.fsync(handle)
            os.rename(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(handle)
        _sync(output.parent)
    except OSError as error:
        if isinstance(error, LoraError):
            raise
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"{output} can't be written: {reason}; nothing was left there") from None


def check_free(output: Path) -> None:
    """Raises an OutputError unless a directory can be made at `output`; an empty one there is replaced."""
    if os.path.islink(output):
        raise OutputError(f"{output} is a link, which can't be replaced; name the directory that is meant")
    if is_directory(output) and not any(output.iterdir()):
        if _is_mounted(output):
            raise OutputError(f"{output} is where a file system is mounted, and can't be replaced; choose a directory in it")
        return
    if os.path.lexists(output):
        raise OutputError(f"{output} exists already; remove it or choose another directory")


def _is_mounted(directory: Path) -> bool:
    """Whether a file system, or a directory of another place, is mounted there."""
    if os.path.ismount(directory):
        return True
    try:  # the kernel writes a space as \\040 and the like
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
        path = os.path.realpath(directory)
        return any(line.split(b" ")[4].decode("unicode_escape").encode("latin-1") == os.fsencode(path) for line in mounts)
    except (OSError, ValueError, IndexError):
        return False


def _begin(output: Path, mode: int) -> tuple[int, Path]:
    """A temporary directory for `output`, open and held."""
    while True:
        staging = temporary_name(output)
        staging.mkdir(mode)
        handle = os.open(staging, os.O_RDONLY)
        if own(handle, staging):
            return handle, staging
        os.close(handle)


def write_shard(path: Path, entries: Mapping[str, Entry], done: Callable[[int], object] = lambda nbytes: None) -> None:
    """Writes a safetensors file, the tensors one after another in the order given; `done` hears of the bytes of each."""
    header, end = {}, 0
    for name, entry in entries.items():
        place = [end, end := end + entry.nbytes]
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
    with open(path, "xb", buffering=0) as file:
        _write_all(file, encode_header(header, {"format": "pt"}))
        for entry in entries.values():
            if isinstance(entry.source, StoredTensor):
                for chunk in entry.source.chunks():
                    _write_all(file, chunk)
            else:
                tensor = entry.source().contiguous()
                _write_all(file, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
                del tensor
            done(entry.nbytes)


def write_index(directory: Path, places: Mapping[str, str], size: int) -> None:
    """Writes the index of a sharded checkpoint: `places`, {tensor: file}, of `size` bytes in all."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
