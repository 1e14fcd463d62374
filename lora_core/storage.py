"""Adapters on disk, in PEFT's format, both ways. The only owner of tensor-key names.

    save_adapter(model, "out/")          # out/adapter_config.json, out/adapter_model.safetensors
    load_adapter(model, "out/")          # onto the same base: injects what the configuration says, then loads

Reading is strict: every tensor that the configuration asks for must be there, in the right shape and finite, and nothing
else. Nothing on the model changes before all of that has been checked. Writing is whole or not at all: each file is
written under a temporary name in the same directory, synced and renamed, the configuration last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import ALL_LINEAR, LoraConfig
from .errors import AdapterExistsError, AdapterFileMissingError, AdapterFormatError, ConfigError
from .inject import InjectionReport, Plan, attach, copied_paths, describe, plan
from .layers import LoraConv1D, lora_class
from .registry import adapter_layers, check_new_name, find_adapter, get_tensor, has_adapters, registry_of, unwrap

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LEGACY_WEIGHTS_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

#: Fields that PEFT writes and that say nothing about the maths of a plain LoRA adapter.
NEUTRAL_FIELDS = frozenset(
    {
        "auto_mapping",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
    }
)

#: Values of `init_lora_weights` that leave the base alone. The others (PiSSA, OLoRA, ...) move part of W into A and B.
HARMLESS_INITIALISERS = (True, "gaussian", "orthogonal", "eva")


def save_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes one adapter as `adapter_config.json` and `adapter_model.safetensors`, readable by PEFT.

    Args:
        model: the model that holds it. While the adapter is folded in it can be saved too.
        directory: where to; made if it does not exist. Files of these two names are replaced.
        adapter_name: which adapter.

    Raises:
        UnknownAdapterError: it is not on the model.
        AdapterFormatError: it has NaN or infinite values; nothing is written.
    """
    tensors = adapter_tensors(model, adapter_name)
    _check_finite(tensors, f"adapter {adapter_name!r}", "not saved")
    config = json.dumps(_config_to_json(unwrap(model), adapter_name), indent=2, sort_keys=True) + "\n"
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / WEIGHTS_FILE, weights)
    write_whole(directory / CONFIG_FILE, config.encode())


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default", *, trainable: bool = False
) -> InjectionReport:
    """Reads an adapter that `save_adapter` or PEFT wrote.

    A model without an adapter of that name gets one, as the file's configuration says; one that has it, with the same
    settings, gets its values. The first adapter of a model becomes active. Tensors keep the file's dtype.

    Args:
        model: the base, or a model with other adapters.
        directory: the directory with the two files.
        adapter_name: the name that it gets here; it is not in the files.
        trainable: whether it is to be trained further.

    Returns:
        What `inject` reports.

    Raises:
        AdapterFileMissingError: the directory or a file is not there.
        AdapterFormatError: a file is broken or asks for something that is not supported; tensors are missing, unexpected,
            of another shape or not finite. The message lists them, and the model is as it was.
    """
    config, tensors = read_adapter(directory)
    root, found = unwrap(model), plan(model, config, strict=False)
    exists = has_adapters(model) and adapter_name in registry_of(model).adapters
    if not exists:
        check_new_name(model, adapter_name)
    elif not _same_structure(root, adapter_name, config, found):
        raise AdapterExistsError(
            f"the model has an adapter {adapter_name!r} of other layers or ranks; choose another adapter_name or "
            f"delete_adapter(model, {adapter_name!r})"
        )
    _check_tensors(tensors, _expected_shapes(root, config, found), directory)
    _check_finite(tensors, str(directory), "not loaded")
    unmatched = [pattern for pattern, count in found.layers.hits.items() if not count]
    if unmatched:
        warnings.warn(f"{directory}: target_modules {unmatched} match no module of this base", stacklevel=2)

    if exists:
        report = describe(root, adapter_name, found.layers.hits)
    else:
        report = attach(root, config, adapter_name, found, trainable)
    adapter = find_adapter(root, adapter_name)
    with torch.no_grad():
        for path, layer in adapter_layers(root, adapter):
            for part in (layer.lora_A, layer.lora_B):
                part[adapter_name].data = tensors[_lora_key(path, part is layer.lora_B)].to(part[adapter_name].device)
        for path, copy in adapter.copies.items():
            copy.copy_(tensors[_copy_key(path, adapter.layers)])
    return report


def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """{key: tensor} of an adapter, with PEFT's keys; the tensors are the model's own, detached."""
    adapter = find_adapter(model, adapter_name)
    tensors = {}
    for path, layer in adapter_layers(model, adapter):
        tensors[_lora_key(path, False)] = layer.lora_A[adapter_name].detach()
        tensors[_lora_key(path, True)] = layer.lora_B[adapter_name].detach()
    for path, copy in adapter.copies.items():
        tensors[_copy_key(path, adapter.layers)] = copy.detach()
    return tensors


def read_adapter(directory: str | os.PathLike) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter directory, each checked by itself but not against a model.

    Raises:
        AdapterFileMissingError, AdapterFormatError: as `load_adapter`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterFileMissingError(f"{directory} is not a directory; expected one with {CONFIG_FILE} in it")
    config = _config_from_json(_require(directory / CONFIG_FILE))
    if not (directory / WEIGHTS_FILE).exists() and (directory / LEGACY_WEIGHTS_FILE).exists():
        raise AdapterFormatError(
            f"{directory} holds {LEGACY_WEIGHTS_FILE}, a pickle, which can run code and is not read; "
            "load it with peft where you trust it and save it again as safetensors"
        )
    path = _require(directory / WEIGHTS_FILE)
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterFormatError(f"{path} is not a whole safetensors file: {_one_line(error)}") from None
    # With bias="all" PEFT writes the bias of a saved module three times; the plain name holds the trained one.
    return config, {k: v for k, v in tensors.items() if not re.search(r"\.(modules_to_save|original_module)\.", k)}


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all: a temporary one beside it, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- keys -----------------------------------------------------------------------------------------------------------


def _lora_key(path: str, is_B: bool) -> str:
    return f"{PREFIX}{path}.lora_{'B' if is_B else 'A'}.weight"


def _copy_key(path: str, layers: Collection[str]) -> str:
    """The key of a trained copy: the tensor's own path, but for the bias of an adapted layer, which PEFT wraps."""
    owner, _, name = path.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{name}" if owner in layers else f"{PREFIX}{path}"


def _expected_shapes(model: nn.Module, config: LoraConfig, found: Plan) -> dict[str, torch.Size]:
    """{key: shape} of the tensors that a file with this configuration must hold for this model."""
    shapes = {}
    for path in found.layers.paths:
        module, r = model.get_submodule(path), config.rank_for(path)
        d_in, d_out = lora_class(module).lora_shape(module)
        shapes[_lora_key(path, False)] = torch.Size((r, d_in))
        shapes[_lora_key(path, True)] = torch.Size((d_out, r))
    for path in copied_paths(model, found):
        shapes[_copy_key(path, found.layers.paths)] = get_tensor(model, path).shape
    return shapes


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: object) -> None:
    problems = []
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        problems.append(f"{len(missing)} missing tensors ({_listed(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors without a home on this model ({_listed(unexpected)})")
    wrong = [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} wrong shapes ({_listed(wrong)})")
    if not expected:
        problems.append("its target_modules match no layer of this model")
    if problems:
        raise AdapterFormatError(f"{source} does not fit this base: {'; '.join(problems)}; load it onto the base it was trained on")


def _check_finite(tensors: Mapping[str, Tensor], source: str, outcome: str) -> None:
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterFormatError(f"{source} has NaN or infinite values in {len(bad)} tensors ({_listed(bad)}); {outcome}")


def _same_structure(model: nn.Module, name: str, config: LoraConfig, found: Plan) -> bool:
    """Whether the adapter `name` of the model has the layers, ranks, scalings and copies of this configuration."""
    adapter = find_adapter(model, name)
    return (
        adapter.layers == found.layers.paths
        and all(adapter.config.rank_for(p) == config.rank_for(p) for p in adapter.layers)
        and all(adapter.config.scaling_for(p) == config.scaling_for(p) for p in adapter.layers)
        and set(adapter.copies) == set(copied_paths(model, found))
    )


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _require(path: Path) -> Path:
    if not path.is_file():
        raise AdapterFileMissingError(f"{path} is not there; an adapter directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    return path


# --- configuration --------------------------------------------------------------------------------------------------


def _config_to_json(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    adapter = find_adapter(model, adapter_name)
    config = adapter.config
    fields = dataclasses.asdict(config)
    if config.target_modules == ALL_LINEAR:  # what it stands for depends on the model, so it is written out
        fields["target_modules"] = adapter.layers
    return fields | {
        "peft_type": "LORA",
        "inference_mode": True,
        "fan_in_fan_out": any(isinstance(layer, LoraConv1D) for _, layer in adapter_layers(model, adapter)),
        "modules_to_save": config.saved_module_patterns or None,
        "base_model_name_or_path": config.base_model_name_or_path or getattr(model, "name_or_path", None) or None,
    }


def _config_from_json(path: Path) -> LoraConfig:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is not JSON: {_one_line(error)}") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise AdapterFormatError(f"{path}: peft_type is {kind!r}; only 'LORA' adapters can be read")
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    # An empty value, of a field known or not, means that the field is not used.
    fields = {key: value for key, value in fields.items() if value not in (None, False, "", [], {})}
    unsupported = sorted(fields.keys() - known - NEUTRAL_FIELDS)
    if unsupported:
        listed = ", ".join(f"{key}={fields[key]!r}" for key in unsupported)
        raise AdapterFormatError(f"{path} asks for {listed}, which is not supported; the adapter would compute something else")
    init = fields.pop("init_lora_weights", True)
    if init not in HARMLESS_INITIALISERS:
        raise AdapterFormatError(
            f"{path}: init_lora_weights={init!r} changed the base too, so the adapter alone is not the model that was "
            "trained; convert it to plain LoRA first (peft: path_initial_model_for_weight_conversion)"
        )
    if "target_modules" not in fields or "r" not in fields or "lora_alpha" not in fields:
        raise AdapterFormatError(f"{path}: r, lora_alpha and target_modules must be set")
    try:
        return LoraConfig(**{key: value for key, value in fields.items() if key in known})
    except ConfigError as error:
        raise AdapterFormatError(f"{path}: {error}") from None
