"""The names of an adapter's tensors in PEFT's files: each after "base_model.model." and the path of its layer."""

from __future__ import annotations

from collections.abc import Collection

from ..layers import LoraLayer
from ..spec.config import LoraConfig
from .adapter import PREFIX


def layer_keys(path: str, kind: type[LoraLayer], config: LoraConfig) -> dict[str, str]:
    """{table of a layer: the key of an adapter's tensor there}."""
    keys = {"lora_A": kind.file_form.format("A"), "lora_B": kind.file_form.format("B")}
    if config.use_dora:
        keys["lora_magnitude"] = "lora_magnitude_vector"
    if config.lora_bias:
        keys["lora_bias"] = "lora_B.bias"
    return {table: f"{PREFIX}{kind.file_path(path)}.{key}" for table, key in keys.items()}


def copy_key(path: str, layers: Collection[str]) -> str:
    """The key of a trained copy: the tensor's own path, but for the bias of an adapted layer, which PEFT wraps."""
    owner, _, name = path.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{name}" if owner in layers else f"{PREFIX}{path}"
