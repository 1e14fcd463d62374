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

from .errors import AdapterFormatError


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


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; tensors that share memory are stored once a name."""
    data = safetensors.torch.save(_unshared(tensors))
    size = int.from_bytes(data[:8], "little")
    # The library writes metadata in an order that changes from call to call.
    entries = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8 : 8 + size])}
    header = json.dumps(entries, separators=(",", ":"))
    header += " " * (-len(header) % 8)  # the format aligns the tensors
    return len(header).to_bytes(8, "little") + header.encode() + data[8 + size :]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        AdapterFormatError: the file is broken.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterFormatError(f"{path} is not a whole safetensors file: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """The message of an error of another library, for one of ours."""
    return " ".join(str(error).split())


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return result
