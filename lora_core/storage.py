"""Adapters on disk, in PEFT's format, both ways. The only owner of tensor-key names.

    save_adapter(model, "out/")          # out/adapter_config.json, out/adapter_model.safetensors
    load_adapter(model, "out/")          # onto the same base: injects what the configuration says, then loads

Reading is strict: every tensor that the configuration asks for must be there, in the right shape and finite, and nothing
else. Nothing on the model changes before all of that has been checked. Writing is whole or not at all: each file is
written under a temporary name in the same directory, synced and renamed, the configuration last.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_files import CONFIG_FILE, FINGERPRINT, FLOAT_DTYPES, PREFIX, WEIGHTS_FILE, read_adapter
from .config import LoraConfig
from .config_file import config_to_json
from .errors import (
    AdapterExistsError,
    AdapterFormatError,
    MergeError,
    WrongBaseError,
)
from .files import to_safetensors, write_all
from .fingerprint import difference, fingerprint, is_weight_of
from .inject import InjectionReport, Plan, attach, copied_paths, describe, plan
from .layers import LoraEmbedding, LoraLayer, lora_class
from .registry import (
    adapter_layers,
    check_new_name,
    check_not_mixing,
    find_adapter,
    get_tensor,
    has_adapters,
    registry_of,
    unwrap,
)
from .sharding import refuse_sharded, whole, writes_files


def save_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes one adapter as `adapter_config.json` and `adapter_model.safetensors`, readable by PEFT.

    Args:
        model: the model that holds it. While the adapter is folded in it can be saved too.
        directory: where to; made if it does not exist. Files of these two names are replaced.
        adapter_name: which adapter.

    Raises:
        UnknownAdapterError: it is not on the model.
        AdapterFormatError: it has NaN or infinite values; nothing is written.
        ConfigError: `directory` is a file.
        OutputError: it can't be made or written to; each file is as it was or whole.

    A model that is sharded over processes (see `sharding.py`) is saved in all of them at once, and process 0 writes.
    """
    tensors = adapter_tensors(model, adapter_name)
    _check_finite(tensors, f"adapter {adapter_name!r}", "not saved")
    config = json.dumps(config_to_json(unwrap(model), adapter_name), indent=2) + "\n"
    adapter = find_adapter(model, adapter_name)
    mark = fingerprint(adapter_layers(model, adapter), adapter.config.as_stored())
    weights = to_safetensors(tensors, {"format": "pt", FINGERPRINT: json.dumps(mark)})
    if writes_files(model):
        write_all(Path(directory), {WEIGHTS_FILE: weights, CONFIG_FILE: config.encode()})


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    strict: bool = True,
) -> InjectionReport:
    """Reads an adapter that `save_adapter` or PEFT wrote.

    A model without an adapter of that name gets one, as the file's configuration says; one that has it, with the same
    settings, gets its values. The first adapter of a model becomes active. Tensors keep the file's dtype.

    Args:
        model: the base, or a model with other adapters.
        directory: the directory with the two files.
        adapter_name: the name that it gets here; it is not in the files.
        trainable: whether a new adapter is to be trained further; one that is there already keeps its setting.
        strict: raise if the file has a fingerprint of its base and this base has another; else warn.

    Returns:
        What `inject` reports.

    Raises:
        AdapterFileMissingError: the directory or a file is not there.
        AdapterExistsError: the model has another adapter of that name.
        MergeError: it has this one, and it is folded into the weights now.
        MixedBatchError: a thread is in a mixed batch.
        WrongBaseError: the adapter was saved on another base: other values, another dtype, or quantised otherwise.
        AdapterFormatError: a file is broken or asks for something that is not supported; tensors are missing, unexpected,
            of another shape or not finite. The message lists them, and the model is as it was.
    """
    check_not_mixing(model)
    refuse_sharded(model, "loading")
    config, tensors, mark = read_adapter(directory)
    root, found = unwrap(model), plan(model, config, strict=False)
    exists = has_adapters(model) and adapter_name in registry_of(model).adapters
    if not exists:
        check_new_name(model, adapter_name)
    elif not _same_structure(root, adapter_name, config, found):
        raise AdapterExistsError(
            f"the model has an adapter {adapter_name!r} of other layers or ranks; choose another adapter_name or "
            f"delete_adapter(model, {adapter_name!r})"
        )
    elif any(adapter_name in layer.lora_folded for _, layer in adapter_layers(root, find_adapter(root, adapter_name))):
        raise MergeError(f"adapter {adapter_name!r} is folded into the weights; call unmerge_adapter(model) before loading")
    if not found.layers.paths:
        raise AdapterFormatError(f"{directory} does not fit this base: its target_modules match no layer of this model")
    own = {f"{PREFIX}{path}.base_layer.weight": path for path in found.layers.paths}  # PEFT adds it for some embeddings
    tensors = {k: t for k, t in tensors.items() if k not in own or not is_weight_of(root.get_submodule(own[k]), t)}
    _check_tensors(tensors, _expected_tensors(root, config, found), directory)
    _check_finite(tensors, str(directory), "not loaded")
    _check_base(directory, mark, root, config, found, strict)
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
            for table, key in _layer_keys(path, type(layer), config).items():
                parameter = getattr(layer, table)[adapter_name]
                parameter.data = tensors[key].view(parameter.shape).to(parameter.device)
        for path, copy in adapter.copies.items():
            copy.copy_(tensors[_copy_key(path, adapter.layers)])
    return report


def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """{key: tensor} of an adapter, with PEFT's keys; the tensors are the model's own, detached, or gathered if sharded."""
    adapter = find_adapter(model, adapter_name)
    tensors = {}
    for path, layer in adapter_layers(model, adapter):
        factors = dict(zip(("lora_A", "lora_B"), layer.factors(adapter_name), strict=True))
        shapes = layer.file_shapes(layer, len(factors["lora_A"]))
        for table, key in _layer_keys(path, type(layer), adapter.config).items():
            tensor = factors[table] if table in factors else getattr(layer, table)[adapter_name]
            tensors[key] = whole(tensor.detach()).view(shapes[table])
    active = adapter_name in registry_of(model).active
    for path, copy in adapter.copies.items():
        # Of an active adapter the model has it in place; sharding put another object there.
        now = get_tensor(unwrap(model), path) if active else copy
        tensors[_copy_key(path, adapter.layers)] = whole(now.detach())
    return tensors


# --- keys -----------------------------------------------------------------------------------------------------------


def _layer_keys(path: str, kind: type[LoraLayer], config: LoraConfig) -> dict[str, str]:
    """{table of a layer: the key of an adapter's tensor there}."""
    form = "lora_embedding_{}" if issubclass(kind, LoraEmbedding) else "lora_{}.weight"
    keys = {"lora_A": form.format("A"), "lora_B": form.format("B")}
    if config.use_dora:
        keys["lora_magnitude"] = "lora_magnitude_vector"
    if config.lora_bias:
        keys["lora_bias"] = "lora_B.bias"
    return {table: f"{PREFIX}{path}.{key}" for table, key in keys.items()}


def _copy_key(path: str, layers: Collection[str]) -> str:
    """The key of a trained copy: the tensor's own path, but for the bias of an adapted layer, which PEFT wraps."""
    owner, _, name = path.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{name}" if owner in layers else f"{PREFIX}{path}"


def _expected_tensors(model: nn.Module, config: LoraConfig, found: Plan) -> dict[str, Tensor]:
    """{key: a tensor of that shape and kind} of what a file with this configuration must hold for this model."""
    expected = {}
    for path in found.layers.paths:
        module = model.get_submodule(path)
        kind = lora_class(module)
        shapes = kind.file_shapes(module, config.rank_for(path))
        for table, key in _layer_keys(path, kind, config).items():
            expected[key] = torch.empty(shapes[table], device="meta")
    for path in copied_paths(model, found):
        expected[_copy_key(path, found.layers.paths)] = get_tensor(model, path)
    return expected


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: object) -> None:
    problems = []
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        problems.append(f"{len(missing)} missing tensors ({_listed(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors without a home on this model ({_listed(unexpected)})")
    wrong = [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} wrong shapes ({_listed(wrong)})")
    kinds = [
        f"{key} is {tensors[key].dtype}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].dtype not in (FLOAT_DTYPES if tensor.is_floating_point() else (tensor.dtype,))
    ]
    if kinds:
        problems.append(f"{len(kinds)} tensors of a dtype that has no place there ({_listed(kinds)})")
    if problems:
        raise AdapterFormatError(
            f"{source} does not fit this base: {'; '.join(problems)}; load it onto the base it was trained on"
        )


def _check_base(source: object, stored: Any, model: nn.Module, config: LoraConfig, found: Plan, strict: bool) -> None:
    """Raises, or warns, if the stored fingerprint is that of another base."""
    if stored is None:
        return
    layers = [(path, model.get_submodule(path)) for path in found.layers.paths]
    try:
        differs = difference(stored, fingerprint(layers, config))
    except ValueError as error:
        raise AdapterFormatError(f"{source}: {error}; save the adapter again") from None
    if differs is None:
        return
    message = f"{source} was saved on another base: {differs}"
    if strict:
        raise WrongBaseError(f"{message}; load it onto its own base, quantised and cast alike, or pass strict=False")
    warnings.warn(message, stacklevel=3)


def _check_finite(tensors: Mapping[str, Tensor], source: str, outcome: str) -> None:
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterFormatError(f"{source} has NaN or infinite values in {len(bad)} tensors ({_listed(bad)}); {outcome}")


def _same_structure(model: nn.Module, name: str, config: LoraConfig, found: Plan) -> bool:
    """Whether the adapter `name` of the model is stored with this configuration's layers, tensors, scalings and copies."""
    adapter = find_adapter(model, name)
    return (
        adapter.config.as_stored() is adapter.config  # else the file's tensors hold its start too
        and (adapter.config.use_dora, adapter.config.lora_bias) == (config.use_dora, config.lora_bias)
        and adapter.layers == found.layers.paths
        and all(adapter.config.rank_for(p) == config.rank_for(p) for p in adapter.layers)
        and all(adapter.config.scaling_for(p) == config.scaling_for(p) for p in adapter.layers)
        and set(adapter.copies) == set(copied_paths(model, found))
    )


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
