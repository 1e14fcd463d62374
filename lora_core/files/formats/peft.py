"""PEFT's two files from the contents of another tool's, and back.

Example:

    config, tensors, _ = as_peft("lora.safetensors", contents, base)
    contents = contents_of("adapter/", config, tensors)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...errors import ConfigError, FileFormatError, LoraError
from ...methods.base import refuse_unmergeable
from ...methods.registry import all_tables, method_of
from ...model.replicate import refuse_replicated
from ...spec.config import LoraConfig
from ...spec.starts import changes_base
from ..adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from ..disk import to_safetensors, write_whole
from ..keys import copy_key, layer_keys_of, parse_key
from ..started import other_base
from .base import Base, Contents, Layer
from .shared import check_factors, config_fields

#: The architectures whose linear layers are transformers' Conv1D.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
#: What `convert --to` calls this format.
PEFT = "peft"


def as_peft(source: object, contents: Contents, base: Base) -> AdapterFiles:
    """What PEFT's two files would hold."""
    try:
        config = LoraConfig(**config_fields(contents, base))
    except LoraError as error:
        raise FileFormatError(f"{source}: {error}") from None
    tensors: dict[str, Tensor] = {}
    for path, layer in contents.layers.items():
        keys = layer_keys_of(path, layer.embedding, config)
        tensors |= {keys[table]: tensor for table, tensor in layer.tensors.items()}
    tensors |= {copy_key(path, contents.layers): tensor for path, tensor in contents.biases.items()}
    return AdapterFiles(config, tensors, None)


def contents_of(source: object, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Contents:
    """The contents of PEFT's files; alpha is that of a scaling alpha / r.

    Raises:
        ConfigError: they hold what other tools have no place for: another method, modules trained whole, or a start that was
            taken off the base.
    """
    if changes_base(config.init_lora_weights):
        raise ConfigError(f"{source}: {other_base(config.init_lora_weights)}")
    method, layers, biases = method_of(config), {}, {}
    refuse_unmergeable(method, source)
    refuse_replicated(config, source)
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None or (parsed.table is not None and not parsed.path):
            raise ConfigError(f"{source} is {method.label or 'no LoRA adapter'}, which other tools' files have no place for")
        owner, _, name = parsed.path.rpartition(".")
        if parsed.table is not None and all_tables()[parsed.table].tied:
            raise ConfigError(
                f"{source} trains rows of {parsed.path} (trainable_token_indices), which other tools' adapters have no place "
                "for; merge it instead (python -m lora_core merge)"
            )
        if parsed.table is not None:
            layers.setdefault(parsed.path, {})[parsed.table] = tensor
        elif name == "bias" and config.bias == "lora_only":
            biases[f"{owner.removesuffix('.base_layer')}.bias"] = tensor
        else:
            raise ConfigError(
                f"{source} holds {parsed.path} whole, which other tools' adapters have no place for; "
                "merge it instead (python -m lora_core merge)"
            )
    embeddings = {parsed.path for key in tensors if (parsed := parse_key(key)) and parsed.embedding}
    made = {}
    for path, held in layers.items():
        if not held.keys() >= {"lora_A", "lora_B"}:
            raise ConfigError(f"{source} is {method.label}; make it plain LoRA first (convert --plain --base BASE)")
        layer = Layer(held, None, path in embeddings)
        alpha = config.scaling_for(path) * layer.rank
        made[path] = replace(layer, alpha=float(f"{alpha:.15g}"))  # 8 / 3 * 3 is 8
    fields = {"base_model_name_or_path": config.base_model_name_or_path, "task_type": config.task_type}
    contents = Contents(made, fields, biases)
    check_factors(source, contents)
    return contents


def _is_transposed(contents: Contents, base: Base) -> bool:
    """Whether a base's linear weights are stored as (d_in, d_out): by its architecture, or by the shape of one."""
    shapes = ((layer, base.shapes.get(path, ())) for path, layer in contents.layers.items() if not layer.embedding)
    reverse = [s == (v.tensors["lora_A"].shape[1], len(v.tensors["lora_B"])) for v, s in shapes if len(s) == 2 and s[0] != s[1]]
    return base.model_type in TRANSPOSED or any(reverse)


def write_peft(directory: Path, contents: Contents, base: Base) -> None:
    """Writes the two files."""
    config, tensors, _ = as_peft(directory, contents, base)
    method = method_of(config)
    fields = method.fields(config) | {"peft_type": method.peft_type, "inference_mode": True}
    fields["fan_in_fan_out"] = contents.transposed or _is_transposed(contents, base)
    write_whole(directory / WEIGHTS_FILE, to_safetensors(tensors, {"format": "pt"}))
    write_whole(directory / CONFIG_FILE, (json.dumps(dict(sorted(fields.items())), indent=2) + "\n").encode())
