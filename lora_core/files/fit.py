"""Does what a file holds fit a model? Every tensor that the configuration asks for must be there, and nothing else."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.forwards import stored_weight
from ..errors import FileFormatError, StateError, TargetError, WrongBaseError, one_line
from ..layers import lora_class
from ..methods.registry import all_tables, method_of
from ..model.copies import original_of, submodule
from ..model.plan import Plan, plan
from ..spec.config import LoraConfig
from ..spec.targets import LayerPlan
from .adapter import FLOAT_DTYPES
from .fingerprint import difference, fingerprint, is_weight_of, same_values
from .keys import base_path, copy_key, layer_keys, parse_key, shared_keys, token_key
from .vocabulary import vocabulary_differs

#: The tied modules that PEFT's `ensure_weight_tying` knows; of others it trains the one that is named, apart.
TIED_BY_PEFT = ("embed_tokens", "lm_head")


def plan_for_file(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Plan:
    """The plan for an adapter from a file, whose tensors say whether what `ensure_weight_tying` means was trained as one."""
    found = plan(model, config, strict=False)
    if config.ensure_weight_tying:
        absent = [path for path in found.copies if copy_key(path, found.targets.paths, found.tokens) not in tensors]
        present = {path.split(".")[-2] for path in found.copies if path not in absent}
        if absent and present.isdisjoint(TIED_BY_PEFT):
            return plan(model, dataclasses.replace(config, ensure_weight_tying=False), strict=False)
    return found


def fitting_tensors(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], found: Plan, source: object
) -> dict[str, Tensor]:
    """{key: tensor} of what the plan needs, and no other.

    Raises:
        FileFormatError: tensors are missing, unexpected, of another shape or dtype, not finite, or two where one is needed.
        StateError: the model has no weights yet.
    """
    for path in found.targets.paths:
        layer = submodule(model, path)
        stored_weight(layer, path, lora_class(layer).weight_name)  # or the file's values would be lost on the meta device
    expected = _expected_tensors(model, config, found)
    tensors = {k: t for k, t in tensors.items() if k in expected or not _is_of_the_base(model, k, t)}
    tensors |= _tied_tensors(tensors, config, found, source)
    again = _tied_rows(tensors, found, source)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in again}
    _check_tensors(tensors, expected, source)
    check_finite(tensors, str(source), "not loaded")
    return tensors


def check_base(
    source: object,
    stored: Any,
    model: nn.Module,
    config: LoraConfig,
    names: Mapping[str, str],
    found: Plan,
    strict: bool,
    others: Mapping[str, tuple[Any, LayerPlan]] = MappingProxyType({}),
) -> None:
    """Raises, or warns, if the stored fingerprint is that of another base.

    Args:
        source: the file, for messages.
        stored: its fingerprint; None if it has none.
        model: the module at the root.
        config: the settings, as the file has them.
        names: {path of an adapted layer: what the file calls it}.
        found: what the file means on the model.
        strict: whether to raise.
        others: {what the file calls a layer that the model has as a part of one: (what holds its weight, its settings)}.
    """
    if stored is None:
        return
    layers = {old: (submodule(model, path), found.targets.layers[path]) for path, old in names.items()} | dict(others)
    try:
        held = [(old, layer) for old, (layer, _) in layers.items()]
        now = fingerprint(held, config, {old: plan for old, (_, plan) in layers.items()})
        for path, old in names.items():
            if lora_class(submodule(model, path)).weight_path(path) in found.kept:  # the file brings its own
                del now["base"][old]
        differs = difference(stored, now) or vocabulary_differs(model, stored.get("vocabulary", {}), found)
    except ValueError as error:
        raise FileFormatError(f"{source}: {error}; save the adapter again") from None
    if differs is None:
        return
    message = f"{source} was saved on another base: {differs}"
    if strict:
        raise WrongBaseError(f"{message}; load it onto its own base, quantised and cast alike, or pass strict=False")
    warnings.warn(one_line(message), stacklevel=3)


def check_finite(tensors: Mapping[str, Tensor], source: str, outcome: str) -> None:
    if any(tensor.is_meta for tensor in tensors.values()):
        raise StateError(f"{source} is on the meta device; load the model's weights before injecting; {outcome}")
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise FileFormatError(f"{source} has NaN or infinite values in {len(bad)} tensors ({listed(bad)}); {outcome}")


def listed(items: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _is_of_the_base(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether it is the base's own: PEFT stores that of some embeddings and heads, inside of its wrapper if adapted."""
    parsed = parse_key(key)
    if parsed is None or parsed.table is not None:
        return False
    owner, _, name = parsed.path.rpartition(".")
    for path in (owner, base_path(parsed.path).rpartition(".")[0]):
        try:
            module, original = model.get_submodule(path), original_of(model, f"{path}.{name}")
        except (AttributeError, LookupError, TargetError):  # no such module or tensor
            continue
        if name == "weight" and original is module.weight:
            return is_weight_of(module, tensor)
        return original is not None and not original.is_meta and same_values(original, tensor)
    return False


def _expected_tensors(model: nn.Module, config: LoraConfig, found: Plan) -> dict[str, Tensor]:
    """{key: a tensor of that shape and kind} of what a file with this configuration must hold for this model."""
    expected, sizes, tables = {}, [], all_tables()
    for path, settings in found.targets.layers.items():
        module = submodule(model, path)
        kind = lora_class(module)
        shapes = kind.file_shapes(module, settings.r)
        for table, key in layer_keys(path, module, found.targets.paths, config).items():
            expected[key] = torch.empty(shapes[tables[table].form], device="meta")
        sizes.append(kind.matrix_shape(module))
    shared = method_of(config).shared_shapes(config, sizes)
    for table, key in shared_keys(config).items():
        expected[key] = torch.empty(shared[table], device="meta")
    for path, rows in found.tokens.items():
        weight = model.get_submodule(path).weight
        expected[token_key(rows.owner)] = torch.empty(len(rows.ids), weight.shape[1], device="meta")
    for path in found.copies:
        expected[copy_key(path, found.targets.paths, found.tokens)] = original_of(model, path)
    return expected


def _tied_rows(tensors: Mapping[str, Tensor], found: Plan, source: object) -> set[str]:
    """Keys of rows that the file has twice, since PEFT stores those of tied layers under both names.

    Raises:
        FileFormatError: they differ.
    """
    again = {token_key(path): token_key(rows.owner) for path, rows in found.tokens.items() if path != rows.owner}
    for key, owner in again.items():
        if key in tensors and owner in tensors and not _equal(tensors[key], tensors[owner]):
            raise FileFormatError(f"{source}: {key} and {owner} differ, and the model ties them; it is of another model")
    return set(again)


def _tied_tensors(tensors: Mapping[str, Tensor], config: LoraConfig, found: Plan, source: object) -> dict[str, Tensor]:
    """{key: tensor} of copies that the file has under another name: of tensors that stay one, it may have any, or all.

    Raises:
        FileFormatError: it has two that differ.
    """
    filled: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    keys = {path: copy_key(path, found.targets.paths, found.tokens) for path in found.copies}
    for path, group in found.copies.items():
        if keys[path] not in tensors:
            continue
        other = first.setdefault(group, keys[path])
        if not _equal(tensors[other], tensors[keys[path]]):
            reason = "ensure_weight_tying is set" if config.ensure_weight_tying else "the model has them as one tensor"
            raise FileFormatError(f"{source}: {other} and {keys[path]} differ, and {reason}; it is of another model")
    for path, group in found.copies.items():
        if keys[path] not in tensors and group in first:
            filled[keys[path]] = tensors[first[group]]
    return filled


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: object) -> None:
    problems = []
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        problems.append(f"{len(missing)} missing tensors ({listed(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors without a home on this model ({listed(unexpected)})")
    wrong = [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} wrong shapes ({listed(wrong)})")
    kinds = [
        f"{key} is {tensors[key].dtype}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].dtype not in (FLOAT_DTYPES if tensor.is_floating_point() else (tensor.dtype,))
    ]
    if kinds:
        problems.append(f"{len(kinds)} tensors of a dtype that has no place there ({listed(kinds)})")
    if problems:
        raise FileFormatError(
            f"{source} does not fit this base: {'; '.join(problems)}; load it onto the base it was trained on"
        )
