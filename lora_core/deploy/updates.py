"""An adapter without a model: what its files say about each weight of a base, by path.

    updates = read_updates("adapter/")
    layer = updates.layers["encoder.layer.0.query"].layer(weight)      # a layer with the adapter on it; the base is not needed
    layer.fold(["default"])

The reverse of the keys that `files/storage.py` writes. What kind of layer a path is follows from the shapes and from the key
names; only a square weight leaves it open whether it is stored transposed (GPT-2's), which the configuration says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import base_for, parse_format
from ..bases.base import Format
from ..bases.dense import DenseFormat
from ..errors import ConfigError, FileFormatError
from ..files.adapter import CONFIG_FILE, FLOAT_DTYPES, read_adapter
from ..files.config import MAX_BYTES, other_base
from ..files.keys import PREFIX, parse_key
from ..files.reading import read_object
from ..layers import LoraLayer, lora_class
from ..methods.base import Method
from ..methods.registry import all_tables, method_of
from ..spec.config import MAX_FACTOR, LoraConfig, starts_from_weight
from ..spec.patterns import limited, spending

#: What a tensor that was trained whole may be stored in besides: buffers are, with the module that has them.
COPIED_DTYPES = (*FLOAT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class LayerUpdate:
    """What an adapter has for one layer.

    Attributes:
        path: the layer's.
        tensors: {table of a layer: as in the file}.
        scaling: the factor before B A.
        embedding: whether the layer is an embedding.
        method: what the adapter adds.
        rank: of the update.
    """

    path: str
    tensors: dict[str, Tensor]
    scaling: float
    embedding: bool
    method: Method
    rank: int

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A, (r, d_in), and B, (d_out, r), float32 or wider, without the scaling; None if the file has no A and B."""
        if not self.method.owns_factors:
            return None
        A, B = self.tensors["lora_A"].flatten(1), self.tensors["lora_B"].flatten(1)
        return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in (A, B))

    def put_on(self, layer: LoraLayer, name: str, weight: float = 1.0) -> None:
        """Gives the adapted `layer` this update times `weight`, as the adapter `name`.

        Raises:
            FileFormatError: it is of other shapes.
            ConfigError: `weight` makes the factor before B A larger than float32 holds.
        """
        shared = [table.name for table in self.method.tables if table.shared and table.name not in self.tensors]
        if shared:
            raise FileFormatError(
                f"{self.path}: the file has no {' and '.join(shared)}, which the layers share; load it onto its model, and "
                "save it with them (save_projection=True)"
            )
        if abs(weight * self.scaling) > MAX_FACTOR:
            factor = f"{weight:g} times the scaling {self.scaling:g}"
            raise ConfigError(f"weights: {factor} of {self.path} is more than float32 holds")
        shapes = layer.file_shapes(layer, self.rank)
        layer.add_tables(table.name for table in self.method.tables)
        for table, tensor in self.tensors.items():
            form = all_tables()[table].form
            if form and tuple(tensor.shape) != shapes[form]:
                raise FileFormatError(
                    f"{self.path}: {table} is {tuple(tensor.shape)}, and on this base's weight of "
                    f"{tuple(layer.weight.shape)} it would be {shapes[form]}; use the base it was trained on"
                )
            value = tensor.flatten(1) if form in ("A", "B", "") else tensor.flatten()
            getattr(layer, table)[name] = nn.Parameter(value, requires_grad=False)
        layer.put(name, self.method, weight * self.scaling, 0.0)

    def bias(self) -> Tensor | None:
        """s c, (d_out,), which the update adds to the layer's bias; None if it has none."""
        return None if self.method.bias_table is None else self.tensors[self.method.bias_table] * self.scaling

    def plain_layer(self, weight: Tensor, transposed: bool) -> nn.Module:
        """The base layer that this update is for, with this weight and no bias. A transposed weight is seen upright."""
        if self.embedding:
            layer = nn.Embedding(*weight.shape, device="meta")
        elif weight.dim() in _CONVOLUTIONS:
            d_out, channels, *size = weight.shape
            layer = _CONVOLUTIONS[weight.dim()](channels, d_out, tuple(size), bias=False, device="meta")
        elif weight.dim() == 2:
            weight = weight.t() if self.is_transposed(weight.shape, transposed) else weight
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        else:
            raise FileFormatError(f"{self.path}: its weight has {weight.dim()} dimensions; no adapter goes on that")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def is_transposed(self, shape: tuple[int, ...], otherwise: bool) -> bool:
        """Whether a weight of this shape is stored as (d_in, d_out); `otherwise` decides for a square one."""
        d_in, d_out = self.method.sizes(self.tensors)
        if d_in is None:  # only d_out is known
            return otherwise if shape[0] == shape[1] else shape[0] != d_out
        return tuple(shape) == (d_in, d_out) if d_in != d_out else otherwise


def carrier(layer: nn.Module) -> LoraLayer:
    """`layer`, turned into one that carries adapters."""
    return lora_class(layer).adopt(layer)


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter directory.

    Attributes:
        directory: where it is.
        config: its settings.
        layers: {path: what it has for that layer}.
        copies: {path of a tensor of the base: the adapter's own in its place}; heads and biases.
        base_tensors: {path of a tensor of the base: the same}, which PEFT stores of some embeddings and heads, trained or not.
        transposed: whether the configuration says that weights are stored as (d_in, d_out).
        fingerprint: what the file says of the base; None if nothing.
    """

    directory: Path
    config: LoraConfig
    layers: dict[str, LayerUpdate]
    copies: dict[str, Tensor]
    base_tensors: dict[str, Tensor]
    transposed: bool
    fingerprint: Any

    @property
    def trained_on(self) -> str | None:
        """The format of the base's adapted weights when the adapter was saved, by its fingerprint; None if it has none."""
        base = self.fingerprint.get("base") if isinstance(self.fingerprint, dict) else None
        if not isinstance(base, dict) or not all(isinstance(line, str) for line in base.values()):
            return None
        return next((line.split(" ")[0] for line in base.values()), None)

    @property
    def packed_form(self) -> Format | None:
        """The same, if they were packed."""
        form = parse_format(self.trained_on or "")
        return form if form is not None and base_for(form).packed else None

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
    config, tensors, mark = read_adapter(directory)
    if starts_from_weight(config.init_lora_weights) and not started:
        raise FileFormatError(f"{directory}: {other_base(config.init_lora_weights)} --base BASE")
    by_path: dict[str, dict[str, Tensor]] = defaultdict(dict)
    embeddings, copies, shared = set(), {}, {}
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
        by_path[parsed.path][parsed.table] = tensor
        if parsed.embedding:
            embeddings.add(parsed.path)
    if not by_path:
        raise FileFormatError(f"{directory} has no layer with A and B; is it a LoRA adapter?")
    method = method_of(config)
    with limited():
        copies, base_tensors = _apart(copies, by_path, config)
        layers = {
            path: LayerUpdate(path, parts | shared, config.scaling_for(path), path in embeddings, method, config.rank_for(path))
            for path, parts in by_path.items()
        }
    for update in layers.values():
        _check(update, config, directory)
    # Of the configuration file, and not of LoraConfig: this engine's layers know it themselves.
    fields = read_object(directory / CONFIG_FILE, MAX_BYTES)
    return AdapterUpdates(directory, config, layers, copies, base_tensors, fields.get("fan_in_fan_out") is True, mark)


def _apart(
    tensors: Mapping[str, Tensor], layers: Container[str], config: LoraConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({path of a tensor: the adapter's own}, {path of a tensor: the base's}) of what is there besides A and B.

    The configuration says what is trained whole. PEFT calls a layer that carries A and B "base_layer" inside of its wrapper.
    """
    own, base = {}, {}
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        layer = owner.removesuffix(".base_layer")
        wrapped = layer != owner and layer in layers
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
        if tensor.dim() < (1 if form == "rank" else 2) or tensor.shape[along[form]] != update.rank:
            shapes = " and ".join(f"{n.removeprefix('lora_')} {tuple(t.shape)}" for n, t in ranked.items())
            raise FileFormatError(
                f"{directory}: {update.path} has {shapes}, and its configuration says rank {update.rank}"
            )
