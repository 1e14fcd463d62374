"""What an adapter directory holds: PEFT's two files, read and checked by themselves, without a model.

Example:

    config, tensors, fingerprint = read_adapter("out/")      # out/adapter_config.json, out/adapter_model.safetensors
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FileFormatError
from ..spec.config import LoraConfig
from .config import config_from_json
from .disk import is_directory, is_file, read_safetensors
from .keys import unwrapped_key
from .pickled import read_pickled
from .reading import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LEGACY_WEIGHTS_FILE = "adapter_model.bin"
FINGERPRINT = "lora_core.fingerprint"  # in the metadata of the weights file, where PEFT does not look

#: In so many folders an adapter is looked for that is not where it was said to be.
MAX_FOLDERS = 100
#: What A, B and copies of the base's float tensors may be stored in.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AdapterFiles(NamedTuple):
    """What an adapter directory holds.

    Attributes:
        config: the settings.
        tensors: {key: tensor}, with PEFT's keys.
        fingerprint: what it says about its base (see `fingerprint.py`); None if it says nothing.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    fingerprint: Any


def read_adapter(directory: str | os.PathLike) -> AdapterFiles:
    """What an adapter directory holds, each part checked by itself but not against a model.

    Raises:
        FileFormatError: as `load_adapter`.
    """
    directory = Path(directory)
    config = config_from_json(config_path(directory))
    tensors, metadata = read_weights(directory)
    try:
        mark = parse_json(metadata.get(FINGERPRINT, "null"), once=False)
    except ValueError as error:
        raise FileFormatError(f"{directory / WEIGHTS_FILE}: its fingerprint is not JSON: {error}") from None
    if not isinstance(mark, dict | None):
        raise FileFormatError(f"{directory}: the fingerprint of the base is not as written here; save the adapter again")
    tensors = {unwrapped_key(key): tensor for key, tensor in tensors.items()}
    # With bias="all" PEFT writes the bias of a saved module three times; the plain name holds the trained one.
    tensors = {k: v for k, v in tensors.items() if not re.search(r"\.(modules_to_save|original_module)\.", k)}
    return AdapterFiles(config, tensors, mark)


def config_path(directory: Path) -> Path:
    """The file with an adapter's settings.

    Raises:
        FileFormatError: it is not there, or the directory is not; names a folder below that has one.
    """
    if not is_directory(directory):
        raise FileFormatError(f"{directory} is not a directory; expected one with {CONFIG_FILE} in it")
    return _require(directory / CONFIG_FILE)


def weights_path(directory: Path) -> Path:
    """The file with an adapter's tensors: safetensors, or else torch's pickle.

    Raises:
        FileFormatError: there is neither.
    """
    legacy = directory / LEGACY_WEIGHTS_FILE
    return legacy if legacy.exists() and not (directory / WEIGHTS_FILE).exists() else _require(directory / WEIGHTS_FILE)


def read_weights(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({key: tensor}, metadata) of an adapter's weights file.

    Raises:
        FileFormatError: it is not there, broken, or a pickle of more than tensors.
    """
    path = weights_path(directory)
    return read_safetensors(path) if path.name == WEIGHTS_FILE else (read_pickled(path), {})


def _require(path: Path) -> Path:
    if path.exists():
        return path
    below = next((found.parent for found in _below(path)), None)
    if below is not None:
        raise FileFormatError(f"{path} is not there; {below} has one: name that directory")
    raise FileFormatError(f"{path} is not there; an adapter directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")


def _below(path: Path) -> Iterator[Path]:
    """Files of the same name in the folders beside `path`, and in those below them."""
    folders = [path.parent]
    for _ in range(2):
        folders = [below for folder in folders for below in sorted(itertools.islice(folder.glob("*/"), MAX_FOLDERS))]
        yield from (folder / path.name for folder in folders if is_file(folder / path.name))
