"""Adapters on disk, in PEFT's format, both ways.

    save_adapter(model, "out/")          # out/adapter_config.json, out/adapter_model.safetensors
    load_adapter(model, "out/")          # onto the same base: injects what the configuration says, then loads

Reading is strict: every tensor that the configuration asks for must be there, in the right shape and finite, and nothing
else. Nothing on the model changes before all of that has been checked. Writing is whole or not at all: each file is
written under a temporary name in the same directory, synced and renamed, the configuration last.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterNameError, ConfigError, FileFormatError, LoraError, StateError
from ..layers.packed import packed_experts
from ..methods.registry import all_tables, method_of
from ..model.defaults import settle_targets
from ..model.inject import attach
from ..model.lifecycle import put_back, take_off
from ..model.notices import warn_of_untied
from ..model.plan import Plan
from ..model.registry import (
    adapter_layers,
    changed_layers,
    check_new_name,
    copies_of,
    find_adapter,
    has_adapters,
    registry_of,
    unwrap,
)
from ..model.replicate import replicate_layers
from ..model.report import InjectionReport, describe
from ..model.sharding import refuse_sharded, whole, writes_files
from ..model.verbs import changes_adapters
from ..spec.config import LoraConfig
from .adapter import CONFIG_FILE, FINGERPRINT, FLOAT_DTYPES, WEIGHTS_FILE
from .config import config_to_json, label_names
from .disk import to_safetensors, write_all
from .fingerprint import fingerprint
from .fit import check_base, check_finite, fitting_tensors, plan_for_file
from .formats.exchange import base_of_model, read_any
from .fused import fuse_experts, warn_of_fused
from .keys import copy_key, layer_keys, shared_keys, token_key
from .moved import follow_names, warn_of_moved
from .started import settle_start
from .vocabulary import describe_vocabulary, grown_tensors, with_kept


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    save_embedding_layers: bool | str = "auto",
) -> None:
    """Writes one adapter as `adapter_config.json` and `adapter_model.safetensors`, readable by PEFT.

    Args:
        model: the model that holds it. While the adapter is folded in it can be saved too.
        directory: where to; made if it does not exist. Files of these two names are replaced.
        adapter_name: which adapter.
        dtype: what its floating-point tensors are cast to; None: as they are, which is float32 beside a 16-bit base. The base's
            own embeddings are not cast.
        save_embedding_layers: whether the base's embeddings and output layer go into the file too: "auto": if the vocabulary
            is not that of the base on disk (`resize_token_embeddings`), as in PEFT, unless the adapter trains all new rows.

    Raises:
        AdapterNameError: it is not on the model.
        FileFormatError: it has NaN or infinite values, or would have in `dtype`; nothing is written.
        ConfigError: `directory` is a file, or an argument is not allowed.
        StateError: an embedding or output layer that should be stored is packed.
        OutputError: it can't be made or written to; each file is as it was or whole.

    A model that is sharded over processes (see `sharding.py`) is saved in all of them at once, and process 0 writes.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers must be True, False or 'auto', not {save_embedding_layers!r}")
    tensors, adapter = adapter_tensors(model, adapter_name), find_adapter(model, adapter_name)
    kept = {copy_key(path, adapter.layers, adapter.tokens) for path in adapter.kept}
    grown = {key: tensors.pop(key) for key in kept} | grown_tensors(unwrap(model), adapter_name, save_embedding_layers)
    if dtype is not None:
        if dtype not in FLOAT_DTYPES:
            raise ConfigError(f"dtype must be float64, float32, bfloat16 or float16, not {dtype}")
        tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    tensors |= grown
    check_finite(tensors, f"adapter {adapter_name!r}", "not saved")
    config = json.dumps(config_to_json(unwrap(model), adapter_name), indent=2) + "\n"
    mark = fingerprint(adapter_layers(model, adapter), adapter.stored, adapter.stored_layers)
    if packed := packed_experts(unwrap(model)):
        mark["experts"] = packed
    if lines := describe_vocabulary(unwrap(model), adapter_name, grown):
        mark["vocabulary"] = lines
    if labels := label_names(unwrap(model), adapter.config.task_type):
        mark["labels"] = labels
    weights = to_safetensors(tensors, {"format": "pt", FINGERPRINT: json.dumps(mark)})
    if writes_files(model):
        write_all(Path(directory), {WEIGHTS_FILE: weights, CONFIG_FILE: config.encode()})


@changes_adapters
def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    strict: bool = True,
    hints: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> InjectionReport:
    """Reads an adapter that `save_adapter` or PEFT wrote, or another tool (see `formats/`), told by what is in its file.

    One that started from the weight (PiSSA, OLoRA) subtracts that start, worked out again from this base; PEFT takes it off
    the base. One whose start changed the base otherwise (CorDA, LoRA-GA, LoftQ) goes onto the changed one: see `started.py`.

    A model without an adapter of that name gets one, as the file's configuration says; one that has it, with the same
    settings, gets its values. The first adapter of a model becomes active. A and B keep the file's dtype. Tensors that
    the base ties and the file has apart stay apart, as in PEFT: the tie is gone while the adapter is active, and a warning says
    so. Embeddings that the file holds of a vocabulary that grew are the adapter's own, in place of the base's while it is
    active; a model whose vocabulary has another size must be resized first.

    Args:
        model: the base, or a model with other adapters.
        directory: the directory with the two files; another tool's file, or the directory with it.
        adapter_name: the name that it gets here; it is not in the files.
        trainable: whether a new adapter is to be trained further; one that is there already keeps its setting.
        strict: raise if the file has a fingerprint of its base and this base has another, or the adapter's start changed its
            base and this is not known to be that one; else warn. Also whether embeddings in the file must be this base's but
            for the rows of new tokens, at the end.
        hints: what another tool's file does not say: its "lora_alpha"; of a pipeline's models the "component"; which parts of
            loralib's merged layers are adapted, "enable_lora".
        replace: what to do about an adapter of that name of other layers, ranks or settings: put this one in its place, active
            and trained as it was, at once or not at all. Its parameters are new: an optimiser must be made again.

    Returns:
        What `inject` reports, with the tool whose format it was.

    Raises:
        FileFormatError: the directory or a file is not there.
        AdapterNameError: the model has another adapter of that name, and it is not to be replaced.
        StateError: it has this one, and it is folded into the weights now; a thread is in a mixed batch, or in
            `disable_adapters`; the base's weights are on the meta device, or a module to be replaced whole is offloaded.
        WrongBaseError: the adapter was saved on another base: other values, another dtype, or quantised otherwise; or its
            start changed the base.
        FileFormatError: a file is broken or asks for something that is not supported; tensors are missing, unexpected,
            of another shape or not finite; another tool's layers have no counterpart in the model. The message lists them,
            and the model is as it was.
        ConfigError: `hints` has an entry that is not known, or that the file says otherwise.
    """
    refuse_sharded(model, "loading")
    form, files, others = read_any(Path(directory), hints, lambda: base_of_model(model, hints))
    root = unwrap(model)
    replicate_layers(root, files.config, registry_of(model).adapters if has_adapters(model) else ())
    settled, architecture = settle_targets(model, files.config)
    fused = fuse_experts(root, settled, files.tensors, directory)
    moved = follow_names(root, fused.config, fused.tensors, directory)
    config, tensors = moved.config, moved.tensors
    exists = has_adapters(model) and adapter_name in registry_of(model).adapters
    was = take_off(root, adapter_name) if exists and replace and not _fits(root, adapter_name, config, tensors) else None
    if was is not None:  # with the last adapter the layers are the model's own again
        replicate_layers(root, config, was.names if has_adapters(model) else ())
    exists = exists and was is None
    found = with_kept(root, tensors, plan_for_file(model, config, tensors), directory, strict)
    if not exists:
        check_new_name(model, adapter_name)
    elif not _same_structure(root, adapter_name, config, found):
        raise AdapterNameError(
            f"the model has an adapter {adapter_name!r} of other layers or ranks; pass replace=True, choose another "
            f"adapter_name, or delete_adapter(model, {adapter_name!r})"
        )
    elif any(adapter_name in layer.lora_folded for _, layer in changed_layers(root, find_adapter(root, adapter_name))):
        raise StateError(f"adapter {adapter_name!r} is folded into the weights; call unmerge_adapter(model) before loading")
    if not found.targets.paths:
        raise FileFormatError(f"{directory} does not fit this base: its target_modules match no layer of this model")
    config = settle_start(directory, config, root, found.targets.paths, strict)
    tensors = fitting_tensors(root, config, tensors, found, directory)
    known = {**moved.names, **fused.names}
    names = {path: known.get(path, path) for path in found.targets.paths if path not in fused.stacked}
    stacked = fused.layers(root) if files.fingerprint else {}
    check_base(directory, files.fingerprint, root, settled, names, found, strict, stacked)
    unmatched = [pattern for pattern, count in found.targets.hits.items() if not count]
    if unmatched:
        warnings.warn(f"{directory}: target_modules {unmatched} match no module of this base", stacklevel=2)

    warn_of_fused(directory, fused)
    warn_of_moved(directory, moved)
    if str(config.init_lora_weights).startswith("pissa_niter"):
        warnings.warn(
            f"{directory}: its start ({config.init_lora_weights}) was drawn at random, and is drawn again, as in PEFT: it "
            "computes something near to what was trained; convert --plain with --initial is exact",
            stacklevel=6,
        )
    if exists:
        report = describe(root, adapter_name, found)
    else:
        warn_of_untied(found)
        report = attach(root, config, adapter_name, found, was.trainable if was else trainable)
    adapter = find_adapter(root, adapter_name)
    for path, layer in adapter_layers(root, adapter):
        for table, key in (layer_keys(path, layer, adapter.layers, config) | shared_keys(config)).items():
            parameter = getattr(layer, table)[adapter_name]
            parameter.data = tensors[key].view(parameter.shape).to(parameter.device)
    for path, rows in found.tokens.items():
        parameter = root.get_submodule(path).lora_tokens[adapter_name]
        parameter.data = tensors[token_key(rows.owner)].to(parameter.device)
    for path, copy in copies_of(root, adapter_name).items():
        copy.data = tensors[copy_key(path, adapter.layers, adapter.tokens)].to(copy)
    if was is not None:
        put_back(root, was)
    absent = dict.fromkeys(moved.absent, "the file has no tensors for it")
    return dataclasses.replace(
        report,
        architecture=architecture,
        moved=known,
        left_out={**report.left_out, **absent},
        tool=form and form.tool,
        other_parts=others,
    )


@torch.no_grad()
def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """{key: tensor} of an adapter, with PEFT's keys; the tensors are the model's own, detached, or gathered if sharded."""
    adapter = find_adapter(model, adapter_name)
    tensors = {}
    for path, layer in adapter_layers(model, adapter):
        layer.check_shape(path, adapter_name)
        method = layer.lora_method[adapter_name]
        stored = method.stored(layer, adapter_name)
        shapes = layer.file_shapes(layer, method.rank(stored) // layer.matrices(layer))
        for table, key in layer_keys(path, layer, adapter.layers, adapter.config).items():
            tensors[key] = whole(stored[table].detach()).view(shapes[all_tables()[table].form])
        for table, key in shared_keys(adapter.config).items():
            tensors[key] = whole(stored[table].detach())
    stored: dict[int, str] = {}
    for path, layer in changed_layers(model, adapter):
        if path in adapter.tokens:
            layer.check_shape(path, adapter_name)
            _check_ids(model, path, adapter_name, adapter.config.trainable_token_indices)
            rows = layer.lora_tokens[adapter_name]
            if stored.setdefault(id(rows), path) == path:  # what is tied to these embeddings has the same
                tensors[token_key(path)] = whole(rows.detach())
    for path, copy in copies_of(model, adapter_name).items():
        tensors[copy_key(path, adapter.layers, adapter.tokens)] = whole(copy.detach())
    return tensors


def _check_ids(model: nn.Module, path: str, name: str, tokens: Any) -> None:
    """Raises a StateError if a layer's rows are no longer those of the tokens that the configuration names."""
    known = tokens.values() if isinstance(tokens, Mapping) else [tokens]
    if (found := tuple(_layer_ids(model, path, name))) not in map(tuple, known):
        raise StateError(
            f"{path}: adapter {name!r} has rows of the tokens {found!r:.99}, and its configuration names others: it got the "
            "state dict of another adapter; load that one's files, with load_adapter"
        )


def _layer_ids(model: nn.Module, path: str, name: str) -> list[int]:
    return model.get_submodule(path).lora_token_ids[name].tolist()


def _method(config: LoraConfig) -> tuple[Any, ...]:
    method = method_of(config)
    return method.name, *method.settings(config)


def _fits(model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the adapter `name` of the model can take this file's values as it is."""
    try:
        return _same_structure(model, name, config, with_kept(model, tensors, plan_for_file(model, config, tensors), "", False))
    except LoraError:  # of a plan beside the one that is to be replaced
        return False


def _same_structure(model: nn.Module, name: str, config: LoraConfig, found: Plan) -> bool:
    """Whether the adapter `name` of the model is stored with this configuration's layers, tensors, scalings and copies."""
    adapter = find_adapter(model, name)
    return (
        adapter.config.as_stored() is adapter.config  # else the file's tensors hold its start too
        and _method(adapter.config) == _method(config)
        and [(p, own.r) for p, own in adapter.layers.items()] == [(p, new.r) for p, new in found.targets.layers.items()]
        and all(math.isclose(adapter.scale * s.scaling, found.targets.layers[p].scaling) for p, s in adapter.layers.items())
        and set(adapter.copied) == set(found.copies)
        and set(adapter.kept) == set(found.kept)
        and {p: (*_layer_ids(model, p, name),) for p in adapter.tokens} == {p: rows.ids for p, rows in found.tokens.items()}
    )
