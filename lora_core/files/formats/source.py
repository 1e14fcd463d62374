"""`Source`: a file that may be an adapter's, opened once and strictly: safetensors, a zip of torch.save's, or GGUF.

    source = Source(Path("adapters.safetensors"))
    source.names, source.tensors(), source.beside("adapter_config.json")

Files are taken from anywhere, so nothing in them is run, and no size in them is believed before it is held against the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import FileFormatError
from ..disk import MAX_HEADER, read_safetensors
from ..header import read_header
from ..pickled import read_pickled
from ..reading import open_file, read_bytes, read_object
from .ggml import MAGIC, GgufFile

#: The kinds of file that an adapter may be in, by what they begin with (a safetensors header ends its length with zeros).
SAFETENSORS, TORCH, GGUF, OTHER = "safetensors", "torch.save", "GGUF", "unknown"
#: How files end that are looked at in a directory, where none has a name that is known.
SUFFIXES = (".safetensors", ".pt", ".pth", ".lora", ".gguf")
#: What a JSON or YAML file beside an adapter may weigh.
MAX_BESIDE = 2**20


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        path: where it is.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def kind(self) -> str:
        """SAFETENSORS, TORCH, GGUF or OTHER, by the first bytes."""
        with open_file(self.path) as file:
            start = file.read(9)
        if start[:4] == MAGIC:
            return GGUF
        if start[:4] == b"PK\x03\x04":
            return TORCH
        return SAFETENSORS if start[8:] == b"{" else OTHER

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of its tensors; none if it is of no kind that is known."""
        if self.kind == SAFETENSORS:
            return tuple(self._header[0])
        return tuple(self.tensors()) if self.kind != OTHER else ()

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What it says besides: text in a safetensors header, values in a GGUF file."""
        if self.kind == GGUF:
            return self._gguf.metadata
        return self._header[1] if self.kind == SAFETENSORS else {}

    def tensors(self) -> dict[str, Tensor]:
        """{name: tensor}, on the CPU.

        Raises:
            FileFormatError: the file is broken, or is a pickle that holds more than tensors.
        """
        return dict(self._tensors)

    def beside(self, name: str) -> dict[str, Any]:
        """The JSON object in the file of this name in the same directory; empty if there is no such file."""
        path = self.path.parent / name
        return read_object(path, MAX_BESIDE) if path.exists() else {}

    def text_beside(self, name: str) -> str:
        """The text of the file of this name in the same directory; empty if there is no such file."""
        path = self.path.parent / name
        try:
            return read_bytes(path, MAX_BESIDE).decode() if path.exists() else ""
        except UnicodeDecodeError:
            raise FileFormatError(f"{path} is not UTF-8") from None

    @cached_property
    def _header(self) -> tuple[dict[str, Any], dict[str, str]]:
        try:
            entries, metadata, _ = read_header(self.path, MAX_HEADER)
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{self} is not a whole safetensors file: {error}") from None
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise FileFormatError(f"{self} is not a whole safetensors file: its metadata is not text")
        return entries, metadata

    @cached_property
    def _gguf(self) -> GgufFile:
        return GgufFile(self.path)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        if self.kind == SAFETENSORS:
            return read_safetensors(self.path)[0]
        if self.kind == GGUF:
            return self._gguf.tensors()
        if self.kind == TORCH:
            return read_pickled(self.path, wrapped=True)
        raise FileFormatError(f"{self} is neither a safetensors file, nor one of torch.save's, nor GGUF")
