"""Writing a checkpoint: a directory that is there whole or not at all, and safetensors files written tensor by tensor.

    with new_directory(Path("merged")) as directory:      # ".merged.3f9c....tmp", renamed to "merged" at the end
        write_shard(directory / "model.safetensors", {"weight": Entry(torch.float32, (2, 3), make)})

Whatever ends the block early leaves no "merged": an error removes what was written, and a process that is killed leaves a
directory whose name says that it is nobody's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraError, OutputError
from .checkpoint import DTYPES, INDEX_FILE, StoredTensor
from .header import encode_header

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

    Raises:
        OutputError: there is something at `output` already, or the disk is full or can't be written to.
    """
    check_free(output)
    output = Path(os.path.abspath(output))
    staging = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        os.rename(staging, output)
        _sync(output.parent)
    except OSError as error:
        if isinstance(error, LoraError):
            raise
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"{output} can't be written: {reason}; nothing was left there") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(output: Path) -> None:
    """Raises an OutputError if something is at `output` already; an empty directory is nothing."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output} exists already; remove it or choose another directory")


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


def _write_all(file, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
