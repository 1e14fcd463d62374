"""What formats share: pairing A with B, mapping names, the order of rows in heads, one alpha for all, the configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import FileFormatError
from ...methods.registry import ASKED, MAGNITUDE
from ..adapter import FLOAT_DTYPES
from .base import Base, Contents, Layer
from .source import Source


def paired(source: Source, tensors: Mapping[str, tuple[str, str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """{layer: {table: tensor}} from {name in the file: (layer, table, tensor)}, each of them checked.

    Raises:
        FileFormatError: a layer has an A without a B, or two of them, or a tensor of a dtype or a number of dimensions that has
            no place in an adapter.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, (path, table, tensor) in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise FileFormatError(f"{source}: {name} is {tensor.dtype}; an adapter's tensors are floating-point numbers")
        if tensor.dim() < (2 if table in ("lora_A", "lora_B") else 1):
            raise FileFormatError(f"{source}: {name} has the shape {tuple(tensor.shape)}; a matrix or a kernel is expected")
        if table in layers.setdefault(path, {}):
            raise FileFormatError(f"{source}: {path} has two tensors for {table}, the second is {name}")
        layers[path][table] = tensor
    if not layers:
        raise FileFormatError(f"{source} has no layer with A and B")
    for path, held in layers.items():
        if not held.keys() >= {"lora_A", "lora_B"}:
            raise FileFormatError(f"{source}: {path} has {' and '.join(held)} alone; an adapter's layer has A and B")
    return layers


def check_factors(source: object, contents: Contents) -> None:
    """Raises a FileFormatError unless every layer's A and B are of one rank, and every value is finite."""
    for path, layer in contents.layers.items():
        A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
        if A.dim() != B.dim() or A.dim() not in (2, 3, 4, 5) or A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
            raise FileFormatError(f"{source}: {path} has A {tuple(A.shape)} and B {tuple(B.shape)}, which are of no one rank")
        for table, tensor in layer.tensors.items():
            if table == MAGNITUDE and tensor.numel() != len(B):
                raise FileFormatError(f"{source}: {path} has {tensor.numel()} values of {table} for {len(B)} outputs")
            if not tensor.isfinite().all():
                raise FileFormatError(f"{source} has NaN or infinite values ({path}, {table})")
        if layer.alpha is not None and not (math.isfinite(layer.alpha) and layer.alpha > 0):
            raise FileFormatError(f"{source}: the alpha of {path} is {layer.alpha}; a positive number is expected")


def refuse_unmapped(source: object, names: Sequence[str], why: str) -> None:
    """Raises a FileFormatError that lists what has no place on the other side, if there is anything."""
    if names:
        shown = ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")
        raise FileFormatError(f"{source}: {len(names)} layers can't be mapped ({shown}); {why}")


def renamed(contents: Contents, names: Mapping[str, str | None], source: object, why: str) -> Contents:
    """The contents with {old path: new path}; those that are mapped to None are listed in one error."""
    refuse_unmapped(source, [path for path in contents.layers if names.get(path) is None], why)
    layers = {names[path]: layer for path, layer in contents.layers.items()}
    if len(layers) != len(contents.layers):
        raise FileFormatError(f"{source}: two of its layers are the same layer of the base; nothing was read")
    return replace(contents, layers=layers)


def by_pattern(path: str, table: Mapping[str, str]) -> str | None:
    """What a table of paths, in which "{}" stands for a number, makes of a path; None if it is not there."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", path)
    target = table.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", path))
    return None if target is None or target.count("{}") != len(numbers) else target.format(*numbers)


def interleaved(B: Tensor, heads: int) -> Tensor:
    """Rows of a projection with rotary positions, (heads * width, r): halves of a head, as transformers has them, to pairs.

    A head's rows 0, 1, ... of the first half and of the second are put in turn, as Meta's Llama has them.
    """
    return B.view(heads, 2, -1, *B.shape[1:]).transpose(1, 2).reshape(B.shape)


def halved(B: Tensor, heads: int) -> Tensor:
    """The reverse of `interleaved`."""
    return B.view(heads, -1, 2, *B.shape[1:]).transpose(1, 2).reshape(B.shape)


def reordered(contents: Contents, base: Base, change: Callable[[Tensor, int], Tensor], tool: str) -> Contents:
    """The contents with the rows of q and k, whose paths are the base's, in another order."""
    layers = dict(contents.layers)
    for path, layer in contents.layers.items():
        if not path.endswith((".q_proj", ".k_proj")):
            continue
        n, n_kv, width = base.heads(tool)
        heads = n if path.endswith(".q_proj") else n_kv
        if layer.tensors["lora_B"].shape[0] != heads * width or width % 2:
            rows = layer.tensors["lora_B"].shape[0]
            raise FileFormatError(f"{path} has {rows} rows, and the base has {heads} heads of {width}; it is of another base")
        for table in ("lora_B", MAGNITUDE):
            layer = layer.mapped(table, lambda rows, heads=heads: change(rows.contiguous(), heads))
        layers[path] = layer
    return replace(contents, layers=layers)


def one_alpha(contents: Contents) -> tuple[Contents, float]:
    """The contents with one alpha for all layers, the most frequent one: what another has over it goes into its B.

    The product (alpha / r) B A is the same, but for one rounding of B.
    """
    alphas = [layer.alpha for layer in contents.layers.values()]
    common = max(alphas, key=alphas.count)

    def scaled(layer: Layer) -> Layer:
        if layer.alpha == common:
            return layer
        factor = layer.alpha / common
        return replace(layer.mapped("lora_B", lambda B: (B.double() * factor).to(B.dtype)), alpha=common)

    return replace(contents, layers={path: scaled(layer) for path, layer in contents.layers.items()}), common


def in_one_dtype(contents: Contents, dtype: torch.dtype) -> Contents:
    """The contents with every tensor in one dtype."""
    layers = {p: replace(v, tensors={t: x.to(dtype) for t, x in v.tensors.items()}) for p, v in contents.layers.items()}
    return replace(contents, layers=layers)


def config_fields(contents: Contents, base: Base) -> dict[str, Any]:
    """The fields of a `LoraConfig` for these layers, whose paths are the base's."""
    layers = contents.layers
    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: layer.alpha for path, layer in layers.items()}
    r, alpha = (max(values.values(), key=list(values.values()).count) for values in (ranks, alphas))
    fields = {key: value for key, value in contents.fields.items() if value is not None}
    fields |= {"r": r, "lora_alpha": alpha, "target_modules": _targets(set(layers), base)}
    fields |= {"rank_pattern": _pattern(ranks, r), "alpha_pattern": _pattern(alphas, alpha)}
    fields |= {ASKED: any(MAGNITUDE in layer.tensors for layer in layers.values())}
    return fields | {"bias": "lora_only" if contents.biases else "none"}


def _pattern(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """{pattern: value} of the layers that differ; of two paths one of which ends like the other the longer comes first."""
    return {path: values[path] for path in sorted(values, key=lambda p: (-len(p), p)) if values[path] != common}


def _targets(paths: set[str], base: Base) -> tuple[str, ...] | str:
    """Targets that mean these layers of the base and no other: last names, whole paths, or else an expression."""
    known = set(base.shapes)
    short = {re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$|[^.]+$", path)[0] for path in paths}
    if known and {path for path in known if any(path == s or path.endswith(f".{s}") for s in short)} == paths:
        return tuple(sorted(short))
    if not any(path.endswith(tuple(f".{p}" for p in paths)) for path in known | paths):
        return tuple(sorted(paths))
    return "|".join(map(re.escape, sorted(paths)))
