"""What an adapter directory holds: PEFT's two files, read and checked by themselves, without a model.

    config, tensors, fingerprint = read_adapter("out/")      # out/adapter_config.json, out/adapter_model.safetensors
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FileFormatError
from ..spec.config import LoraConfig
from .config import config_from_json
from .disk import is_directory, read_safetensors
from .keys import unwrapped_key

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LEGACY_WEIGHTS_FILE = "adapter_model.bin"
FINGERPRINT = "lora_core.fingerprint"  # in the metadata of the weights file, where PEFT does not look

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
    if not is_directory(directory):
        raise FileFormatError(f"{directory} is not a directory; expected one with {CONFIG_FILE} in it")
    config = config_from_json(_require(directory / CONFIG_FILE))
    if not (directory / WEIGHTS_FILE).exists() and (directory / LEGACY_WEIGHTS_FILE).exists():
        raise FileFormatError(
            f"{directory} holds {LEGACY_WEIGHTS_FILE}, a pickle, which can run code and is not read; "
            "load it with peft where you trust it and save it again as safetensors"
        )
    path = _require(directory / WEIGHTS_FILE)
    tensors, metadata = read_safetensors(path)
    try:
        mark = json.loads(metadata.get(FINGERPRINT, "null"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: its fingerprint is not JSON: {error}") from None
    tensors = {unwrapped_key(key): tensor for key, tensor in tensors.items()}
    # With bias="all" PEFT writes the bias of a saved module three times; the plain name holds the trained one.
    tensors = {k: v for k, v in tensors.items() if not re.search(r"\.(modules_to_save|original_module)\.", k)}
    return AdapterFiles(config, tensors, mark)


def _require(path: Path) -> Path:
    if not path.is_file():
        raise FileFormatError(f"{path} is not there; an adapter directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    return path
