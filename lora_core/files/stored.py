"""The tensors of a safetensors file, each where it lies, read one by one.

    tensors, metadata = stored_tensors(path, MAX_HEADER)
    tensors["lm_head.weight"].read()

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, place) and
the values. Headers are read here, and not by the library, for two reasons: files are taken from anywhere, so every claim in
a header is checked before anything is allocated; and the library maps a file into memory, where each page that was read
counts as the process's own until the file is closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import FileFormatError
from .header import broken, read_header
from .reading import open_file

#: Bytes moved at a time where a tensor is copied as it is.
CHUNK = 8 * 2**20
MAX_DIMENSIONS = 8

#: The names of dtypes in a header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its dtype and shape, and the bytes from `start` on that hold its values, row after row."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, file: BinaryIO | None = None) -> Tensor:
        """The tensor, in memory of its own; out of `file` if that is open already."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self.nbytes:
            with open_file(self.file, buffering=0) if file is None else nullcontext(file) as source:
                source.seek(self.start)
                _fill(source, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), self.file)
        return tensor

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes as they are in the file, a few megabytes at a time."""
        buffer = memoryview(bytearray(min(CHUNK, self.nbytes)))
        with open_file(self.file, buffering=0) as file:
            file.seek(self.start)
            for done in range(0, self.nbytes, CHUNK):
                part = buffer[: min(CHUNK, self.nbytes - done)]
                _fill(file, part, self.file)
                yield part


def stored_tensors(path: Path, limit: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """({name: where it is}, metadata), in the order of the file; every byte of the file must belong to exactly one tensor.

    Raises:
        FileFormatError: the file can't be read, or its header is longer than `limit` or not true of it.
    """
    header, metadata, data = read_header(path, limit)
    size, end, tensors = path.stat().st_size, 0, {}
    try:
        entries = sorted((entry["data_offsets"], name, entry) for name, entry in header.items())
    except (TypeError, KeyError):
        raise broken(path, "an entry of its header has no place in the file") from None
    for offsets, name, entry in entries:
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise broken(path, f"{name!r} is of the dtype {entry.get('dtype')!r}, which is not known here")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
            raise broken(path, f"the shape or the place of {name!r} is not made of sizes")
        stored = StoredTensor(path, dtype, tuple(shape), data + offsets[0])
        if offsets[0] != end or offsets[1] - offsets[0] != stored.nbytes:
            raise broken(path, f"{name!r}, {dtype} of shape {shape}, does not fill the bytes {offsets[0]:,} to {offsets[1]:,}")
        if not stored.nbytes and math.prod(filter(None, shape)) > 2**40:
            raise broken(path, f"{name!r} is empty and of the shape {shape}")
        tensors[name], end = stored, offsets[1]
    if data + end != size:
        raise broken(path, f"its header speaks of {data + end:,} bytes, and it has {size:,}")
    return tensors, metadata


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _fill(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = file.readinto(buffer[done:])
        except OSError as error:
            raise FileFormatError(f"{path} can't be read: {error.strerror}") from None
        if not count:
            raise FileFormatError(f"{path} ended while it was read; was it being written?")
        done += count
