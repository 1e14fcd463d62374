"""Reading a GGUF file (llama.cpp's container), strictly: every size is held against the file before it is believed.

    magic "GGUF", version, number of tensors, number of values
    values: key, type, value            tensors: name, shape (fastest dimension first), type, offset
    padding to `general.alignment`, then the tensors

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileFormatError
from ..reading import open_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: An adapter's header is small; a model's, which has a vocabulary, is not read here.
MAX_HEADER, MAX_ENTRIES = 2**24, 100_000

#: Scalars by the number of their type: a format of `struct`. 8 is a text, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
#: Tensor types that are read.
_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_Q8_0, _BLOCK = 8, 32  # blocks of 32 values: a scale in float16, then 32 bytes


class GgufFile:
    """A GGUF file.

    Attributes:
        metadata: {key: value}.

    Raises:
        FileFormatError: it is broken, or of a version or a type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as file:
            self._size = os.fstat(file.fileno()).st_size
            self._head = file.read(MAX_HEADER)
        self._at = len(MAGIC)
        version, n_tensors, n_values = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in VERSIONS:
            raise self._broken(f"it is of version {version}, and 2 and 3 are read")
        if max(n_tensors, n_values) > MAX_ENTRIES:
            raise self._broken(f"it speaks of {n_tensors:,} tensors and {n_values:,} values; is it a model?")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = self._text()
            self.metadata[key] = self._value(self._scalar("I"))
        self._places = self._read_places(n_tensors)

    def tensors(self) -> dict[str, Tensor]:
        """{name: tensor}, in float32, float16 or bfloat16; 8-bit ones in float32."""
        with open_file(self.path) as file:
            return {name: self._load(file, *place) for name, place in self._places.items()}

    def _read_places(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int, int]]:
        """{name: (shape, type, first byte, bytes)}."""
        found = {}
        for _ in range(count):
            name, n_dims = self._text(), self._scalar("I")
            if not 1 <= n_dims <= 4 or name in found:
                raise self._broken(f"the tensor {name!r} has {n_dims} dimensions, or stands there twice")
            shape = tuple(reversed([self._scalar("Q") for _ in range(n_dims)]))
            kind, offset = self._scalar("I"), self._scalar("Q")
            values = math.prod(shape)
            if kind == _Q8_0 and not shape[-1] % _BLOCK:
                nbytes = values // _BLOCK * (2 + _BLOCK)
            elif kind in _TYPES:
                nbytes = values * _TYPES[kind].itemsize
            else:
                raise self._broken(f"{name} is of the type {kind}; F32, F16, BF16 and Q8_0 are read")
            found[name] = (shape, kind, offset, nbytes)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**16:
            raise self._broken(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for name, (_, _, offset, nbytes) in found.items():
            if start + offset + nbytes > self._size:
                raise self._broken(f"{name} would end after byte {self._size:,}, which is the last")
        return {name: (shape, kind, start + offset, nbytes) for name, (shape, kind, offset, nbytes) in found.items()}

    def _load(self, file: Any, shape: tuple[int, ...], kind: int, start: int, nbytes: int) -> Tensor:
        file.seek(start)
        data = bytearray(file.read(nbytes))
        if len(data) != nbytes:
            raise self._broken("it ended while it was read; was it being written?")
        if not nbytes:
            return torch.empty(shape, device="cpu")
        raw = torch.frombuffer(data, dtype=torch.uint8)
        if kind != _Q8_0:
            return raw.view(_TYPES[kind]).view(shape)
        blocks = raw.view(-1, 2 + _BLOCK)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        return (scale * blocks[:, 2:].contiguous().view(torch.int8)).view(shape)

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if self._at + size > len(self._head):
            raise self._broken("its header ends too early")
        (value,) = struct.unpack_from("<" + code, self._head, self._at)
        self._at += size
        return value

    def _text(self) -> str:
        length = self._scalar("Q")
        if length > len(self._head) - self._at:
            raise self._broken("a text in its header is longer than the header")
        data = self._head[self._at : self._at + length]
        self._at += length
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken("a text in its header is not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._broken(f"a value is of the type {kind}, which there is not")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner == _ARRAY or count > MAX_HEADER:
            raise self._broken("an array in its header is too deep or too long")
        return [self._value(inner) for _ in range(count)]

    def _broken(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is not a whole GGUF adapter: {what}")
