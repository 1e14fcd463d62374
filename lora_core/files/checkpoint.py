"""A base model's files, read tensor by tensor: one safetensors file, or shards and their index. Never a model.

    base = open_checkpoint("llama/")
    base.tensors["lm_head.weight"].read()          # one tensor in memory, straight from its place in the file

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, place) and
the values. Headers are read here, and not by the library, for two reasons: files are taken from anywhere, so every claim in
a header or an index is checked before anything is allocated; and the library maps a file into memory, where each page that
was read counts as the process's own until the file is closed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import FileFormatError
from .disk import is_directory
from .header import read_header as read_json_header

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: The files that tokenizers of transformers are made of, and how a language model's texts are generated.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

#: The format's own limit for a header.
MAX_HEADER = 100_000_000
#: Bytes moved at a time where a tensor is copied as it is.
CHUNK = 8 * 2**20

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

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self.nbytes:
            with self._open() as file:
                _fill(file, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), self.file)
        return tensor

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes as they are in the file, a few megabytes at a time."""
        buffer = memoryview(bytearray(min(CHUNK, self.nbytes)))
        with self._open() as file:
            for done in range(0, self.nbytes, CHUNK):
                part = buffer[: min(CHUNK, self.nbytes - done)]
                _fill(file, part, self.file)
                yield part

    def _open(self) -> BinaryIO:
        try:
            file = open(self.file, "rb", buffering=0)  # noqa: SIM115  its users close it
        except OSError as error:
            raise FileFormatError(f"{self.file} can't be read: {error.strerror}") from None
        file.seek(self.start)
        return file


@dataclass(frozen=True)
class Checkpoint:
    """The files of a base model.

    Attributes:
        directory: where they are.
        tensors: {name: where it is}, in the order of the files.
        shards: names of the files, in the index's order.
        config: what config.json says.
    """

    directory: Path
    tensors: dict[str, StoredTensor]
    shards: tuple[str, ...]
    config: dict[str, Any]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads config.json, the index if there is one, and every header; no values.

    Raises:
        FileFormatError: a file is missing, or says something that is not so; names the file and what is wrong.
    """
    if not is_directory(directory):
        raise FileFormatError(f"{directory} is not a directory; expected a saved model's, with {CONFIG_FILE} in it")
    config = read_object(directory / CONFIG_FILE)
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():  # transformers too looks for it first
        return Checkpoint(directory, read_header(single), (WEIGHTS_FILE,), config)
    if not index.is_file():
        if any((directory / name).exists() for name in PICKLES):
            raise FileFormatError(
                f"{directory} holds its weights as a pickle, which can run code and is not read; save it as safetensors"
            )
        raise FileFormatError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; is it a saved model?")
    return _open_sharded(directory, index, config)


def _open_sharded(directory: Path, index: Path, config: dict[str, Any]) -> Checkpoint:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileFormatError(f"{index} has no weight_map from the names of tensors to those of files")
    shards = tuple(dict.fromkeys(places.values()))
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):  # "../x", "/etc/x", "a/b"
            raise FileFormatError(f"{index} names the file {name!r}; only a *.safetensors file beside the index may be named")
        if not (directory / name).is_file():
            raise FileFormatError(f"{index} names the shard {name}, which is not there; fetch the checkpoint again")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        held = read_header(directory / shard)
        listed = {name for name, place in places.items() if place == shard}
        if absent := sorted(listed - held.keys()):
            raise FileFormatError(f"{index} says that {shard} holds {absent[0]!r}, and it does not; fetch them again")
        if extra := sorted(held.keys() - listed):
            raise FileFormatError(f"{directory / shard} holds {extra[0]!r}, which the index does not place there")
        tensors |= held
    return Checkpoint(directory, tensors, shards, config)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """{name: where it is}, in the order of the file; every byte of the file must belong to exactly one tensor.

    Raises:
        FileFormatError: the file can't be read, or its header is not true of it.
    """

    def broken(what: str) -> FileFormatError:
        return FileFormatError(f"{path} is not a whole safetensors file: {what}")

    try:
        header, _, data = read_json_header(path, MAX_HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise FileFormatError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise broken(str(error)) from None
    end, tensors = 0, {}
    try:
        entries = sorted((entry["data_offsets"], name, entry) for name, entry in header.items())
    except (TypeError, KeyError):
        raise broken("an entry of its header has no place in the file") from None
    for offsets, name, entry in entries:
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise broken(f"{name!r} is of the dtype {entry.get('dtype')!r}, which is not known here")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise broken(f"the shape or the place of {name!r} is not made of sizes")
        stored = StoredTensor(path, dtype, tuple(shape), data + offsets[0])
        if offsets[0] != end or offsets[1] - offsets[0] != stored.nbytes:
            raise broken(f"{name!r}, {dtype} of shape {shape}, does not fill the bytes {offsets[0]:,} to {offsets[1]:,}")
        tensors[name], end = stored, offsets[1]
    if data + end != size:
        raise broken(f"its header speaks of {data + end:,} bytes, and it has {size:,}")
    return tensors


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileFormatError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"{path} is not there; expected a saved model's directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} holds a {type(content).__name__}; a JSON object is expected")
    return content


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
