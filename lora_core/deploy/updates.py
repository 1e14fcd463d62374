"""An adapter without a model: what its files say about each weight of a base, by path.

    updates = read_updates("adapter/")
    updates.layers["encoder.layer.0.query"]      # its A and B, its scaling; see `layer_update.py`

The reverse of the keys that `files/storage.py` writes. What kind of layer a path is follows from the shapes and from the key
names; only a square weight leaves it open whether it is stored transposed (GPT-2's), which the configuration says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bases import base_for, parse_format
from ..bases.base import Format
from ..bases.dense import DenseFormat
from ..errors import FileFormatError
from ..files.adapter import CONFIG_FILE, FLOAT_DTYPES, AdapterFiles, read_adapter
from ..files.config import MAX_BYTES
from ..files.formats.registry import find_format, is_foreign
from ..files.keys import PREFIX, TOKENS, base_path, owner_path, parameter_paths, parse_key
from ..files.reading import read_object
from ..files.started import other_base
from ..methods.registry import all_tables, method_of
from ..spec.config import LoraConfig
from ..spec.patterns import limited, spending
from ..spec.starts import changes_base
from ..spec.targets import LayerPlan
from .layer_update import LayerUpdate

#: What a tensor that was trained whole may be stored in besides: buffers are, with the module that has them.
COPIED_DTYPES = (*FLOAT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter directory.

    Attributes:
        directory: where it is.
        config: its settings.
        layers: {path: what it has for that layer}.
        copies: {path of a tensor of the base: the adapter's own in its place}; heads and biases.
        base_tensors: {path of a tensor of the base: the same}, which PEFT stores of some embeddings and heads, trained or not.
        tokens: {path of a layer of which rows are trained: (their tokens, the rows)}.
        kept: those of `copies` that are not trained: of a vocabulary that grew (see `vocabulary.py`).
        transposed: whether the configuration says that weights are stored as (d_in, d_out).
        fingerprint: what the file says of the base; None if nothing.
        split: {path in `layers`: the parameter that it is a part of}, where a base holds experts one by one.
        called: {path in `layers`: what the files call it}, where that is another name than the base's (see `moved.py`).
    """

    directory: Path
    config: LoraConfig
    layers: dict[str, LayerUpdate]
    copies: dict[str, Tensor]
    base_tensors: dict[str, Tensor]
    transposed: bool
    fingerprint: Any
    split: Mapping[str, str] = field(default_factory=dict)
    tokens: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    called: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, LayerPlan]:
        """{path of a layer in the model that it was trained on: its rank and scaling}."""
        paths = {self.called.get(p, self.split.get(p, p)): update for p, update in self.layers.items()}
        return {path: LayerPlan(path, update.rank, update.scaling) for path, update in paths.items()}

    @property
    def labels(self) -> list[str] | None:
        """What the labels of its head are called, in their order, by its fingerprint; None if it does not say."""
        found = self.fingerprint.get("labels") if isinstance(self.fingerprint, dict) else None
        return found if isinstance(found, list) and all(isinstance(label, str) for label in found) else None

    @property
    def trained_on(self) -> str | None:
        """The format of the base's adapted weights when the adapter was saved, by its fingerprint; None if it has none."""
        base = self.fingerprint.get("base") if isinstance(self.fingerprint, dict) else None
        if not isinstance(base, dict) or not all(isinstance(line, str) for line in base.values()):
            return None
        return next((line.split(" ")[0] for line in base.values()), None)

    def dtype_of(self, path: str) -> torch.dtype | None:
        """The dtype of the base's weight at `path`, if it was dense and the adapter has a fingerprint."""
        base = self.fingerprint.get("base") if isinstance(self.fingerprint, dict) else None
        line = base.get(self.called.get(path, path)) if isinstance(base, dict) else None
        form = parse_format(line.split(" ")[0]) if isinstance(line, str) else None
        return form.dtype if isinstance(form, DenseFormat) and form.dtype in FLOAT_DTYPES else None

    @property
    def packed_form(self) -> Format | None:
        """The same, if they were packed."""
        form = parse_format(self.trained_on or "")
        return form if form is not None and base_for(form).packed else None

    @property
    def packed_experts(self) -> dict[str, Format]:
        """{path of a parameter with experts that was packed as the adapter was saved: how}, adapted or not."""
        lines = self.fingerprint.get("experts", {}) if isinstance(self.fingerprint, dict) else {}
        if not isinstance(lines, dict) or not all(isinstance(line, str) for line in lines.values()):
            raise FileFormatError(
                f"{self.directory}: what its fingerprint says of experts is not as written here; save it again"
            )
        forms = {path: parse_format(line) for path, line in lines.items()}
        if unknown := [path for path, form in forms.items() if form is None or not base_for(form).packed]:
            raise FileFormatError(f"{self.directory}: its fingerprint says of {unknown[0]} a format that is not known here")
        return forms

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """The dtype of the base's adapted weights, if they were dense and the adapter has a fingerprint."""
        form = parse_format(self.trained_on or "")
        return form.dtype if isinstance(form, DenseFormat) and form.dtype in FLOAT_DTYPES else None


def read_updates(directory: Path, *, finite: bool = True, started: bool = False) -> AdapterUpdates:
    """Reads an adapter directory; each tensor must have its place, its pair and its rank.

    Args:
        directory: with the two files.
        finite: whether NaN and infinite values are refused.
        started: whether A and B may hold a start that was taken off the base.

    Raises:
        FileFormatError: it is not there, or is broken.
    """
    if is_foreign(directory):
        tool = find_format(directory)[0].tool
        raise FileFormatError(
            f"{directory} has the format of {tool}; make PEFT's files of it first: "
            f"python -m lora_core convert {directory} --to peft --base BASE --output NEW"
        )
    files = read_adapter(directory)
    init = files.config.init_lora_weights
    if changes_base(init) and not started:
        raise FileFormatError(f"{directory}: {other_base(init)}")
    # Of the configuration file, and not of LoraConfig: this engine's layers know it themselves.
    fields = read_object(directory / CONFIG_FILE, MAX_BYTES)
    return updates_of(directory, files, finite=finite, transposed=fields.get("fan_in_fan_out") is True)


def updates_of(directory: Path, files: AdapterFiles, *, finite: bool = True, transposed: bool = False) -> AdapterUpdates:
    """The same of what was read already.

    Args:
        directory: where from, for messages.
        files: what was read.
        finite: whether NaN and infinite values are refused.
        transposed: whether a square weight is stored as (d_in, d_out).
    """
    config, tensors, mark = files
    by_path: dict[str, dict[str, Tensor]] = defaultdict(dict)
    embeddings, copies, shared, rows = set(), {}, {}, {}
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            raise FileFormatError(f"{directory}: the tensor {key!r} does not start with {PREFIX!r}, as PEFT's do")
        if tensor.dtype not in (FLOAT_DTYPES if parsed.table else COPIED_DTYPES):
            raise FileFormatError(f"{directory}: {key} is {tensor.dtype}, which has no place there")
        if finite and not tensor.isfinite().all():
            raise FileFormatError(f"{directory} has NaN or infinite values ({key})")
        if parsed.table is None:
            copies[parsed.path] = tensor
            continue
        if not parsed.path:
            shared[parsed.table] = tensor
            continue
        if all_tables()[parsed.table].tied:
            rows[parsed.path] = tensor
            continue
        by_path[parsed.path][parsed.table] = tensor
        if parsed.embedding:
            embeddings.add(parsed.path)
    if not by_path:
        raise FileFormatError(f"{directory} has no layer with A and B; is it a LoRA adapter?")
    method = method_of(config)
    layers = {}
    with limited():
        copies, base_tensors = _apart(copies, by_path, config)
        parameters = parameter_paths(by_path, config, directory)
        for key, parts in by_path.items():
            path = parameters.get(key, key)
            own = LayerPlan.of(config, owner_path(path))
            E = max(len(parts["lora_A"]) // own.r, 1) if key in parameters and "lora_A" in parts else 1
            embedding, parameter = key in embeddings, key in parameters
            layers[path] = LayerUpdate(path, parts | shared, own.scaling, embedding, method, own.r, parameter, E)
    for update in layers.values():
        _check(update, config, directory)
    tokens = _tokens(rows, config, directory)
    return AdapterUpdates(directory, config, layers, copies, base_tensors, transposed, mark, tokens=tokens)


def _tokens(rows: Mapping[str, Tensor], config: LoraConfig, directory: Path) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """{path of a layer of which rows are trained: (their tokens, the rows)}."""
    tokens, found = config.trainable_token_indices, {}
    for path, own in rows.items():
        named = [ids for name, ids in tokens.items() if path.endswith(name)] if isinstance(tokens, Mapping) else [tokens]
        # What is tied to embeddings that are named may not be; then all of them have the same.
        ids = next(iter(named or tokens.values()), None)
        if ids is None or own.dim() != 2 or len(own) != len(ids):
            raise FileFormatError(
                f"{directory}: {path} has rows of {tuple(own.shape)}, and the configuration's trainable_token_indices are {ids}"
            )
        found[path] = ids, own
    if tokens is not None and not found:
        raise FileFormatError(f"{directory} has no rows for the trainable_token_indices of its configuration")
    return found


def _apart(
    tensors: Mapping[str, Tensor], layers: Container[str], config: LoraConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({path of a tensor: the adapter's own}, {path of a tensor: the base's}) of what is there besides A and B.

    The configuration says what is trained whole. PEFT calls a layer that carries A and B "base_layer" inside of its wrapper.
    """
    own, base = {}, {}
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        layer = base_path(path).rpartition(".")[0]
        wrapped = layer != owner and (layer in layers or TOKENS in owner.split("."))
        trained = (name == "bias" and config.bias != "none") or (not wrapped and _is_saved(owner, config))
        (own if trained else base)[f"{layer}.{name}" if wrapped else path] = tensor
    return own, base


def _is_saved(path: str, config: LoraConfig) -> bool:
    """Whether a module is trained whole: it, or one around it, ends with an entry of `modules_to_save`, or is tied to such."""
    saved = tuple(config.saved_module_patterns)
    ends = [i for i, letter in enumerate(path) if letter == "."] + [len(path)]
    with spending("modules_to_save"):
        return (config.ensure_weight_tying and bool(saved)) or any(path.endswith(saved, 0, end) for end in ends)


def _check(update: LayerUpdate, config: LoraConfig, directory: Path) -> None:
    """Raises an FileFormatError unless the update has what its method needs, of the configuration's rank."""
    wanted = {table.name: table for table in update.method.files(config)}
    if wanted.keys() != update.tensors.keys():
        listed = ", ".join(sorted(update.tensors.keys() ^ wanted.keys()))
        raise FileFormatError(f"{directory}: {update.path} has a {listed} too few or too many for its configuration")
    B, r = update.tensors.get("lora_B"), update.rank
    if B is not None and B.dim() > 2 and 0 < B.shape[1] < r and not r % B.shape[1]:
        raise FileFormatError(
            f"{directory}: {update.path} is a convolution of {r // B.shape[1]} groups, whose update its kernel can't hold; "
            "such an adapter runs on its model alone"
        )
    along = {"A": 0, "B": 1, "rank": 0}  # which dimension is the rank
    ranked = {name: update.tensors[name] for name, table in wanted.items() if table.form in along}
    for name, tensor in ranked.items():
        form = wanted[name].form
        if tensor.dim() < (1 if form == "rank" else 2) or tensor.shape[along[form]] != update.rank * update.matrices:
            shapes = " and ".join(f"{n.removeprefix('lora_')} {tuple(t.shape)}" for n, t in ranked.items())
            raise FileFormatError(f"{directory}: {update.path} has {shapes}, and its configuration says rank {update.rank}")
