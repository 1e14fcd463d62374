"""Flux in kohya's files: the layers of the original model, some of which diffusers has as several.

    double_blocks_0_img_attn_qkv    transformer_blocks.0.attn.to_q, .to_k, .to_v             rows one after the other
    single_blocks_0_linear1         single_transformer_blocks.0.attn.to_q, .to_k, .to_v, .proj_mlp
    final_layer_adaLN_modulation_1  norm_out.linear                                          its halves the other way round

Of a fused layer each part gets its rows of B, and all share A. Where each column of B is one part's alone, that part gets it
with its row of A: so parts that were fused here, or by ai-toolkit, come apart again. Sources: sd-scripts
networks/convert_flux_lora.py and diffusers' loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import ConfigError, FileFormatError
from .base import Base, Layer

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
MLP = "proj_mlp"
#: How wide its layer is in every Flux, in widths of the model, where a file has no rows of it and the base is not known.
MLP_RATIO = 4
#: {name inside of a double block: the parts in diffusers}.
DOUBLE = {
    "img_attn_qkv": QKV,
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
#: The same of a single block.
SINGLE = {"linear1": (*QKV, MLP), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)}
SWAPPED = "final_layer_adaLN_modulation_1"
#: {name outside of blocks: the layer}.
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    SWAPPED: "norm_out.linear",
    "final_layer_linear": "proj_out",
}
#: {kohya's blocks: (diffusers' blocks, what is in them)}.
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}
_NAME = re.compile(rf"({'|'.join(BLOCKS)})_(\d+)_(\w+)")


def is_flux(names: Iterable[str]) -> bool:
    """Whether layers have the names of the original Flux, after kohya's prefix."""
    return any(_NAME.fullmatch(name) for name in names)


def parts_of(name: str) -> tuple[str, ...] | None:
    """The paths in diffusers of the layer that kohya calls `name`; None if it has none."""
    match = _NAME.fullmatch(name)
    if match is None:
        return (OUTER[name],) if name in OUTER else None
    blocks, inside = BLOCKS[match[1]]
    return tuple(f"{blocks}.{match[2]}.{part}" for part in inside.get(match[3], ())) or None


def fused_names(paths: Sequence[str], base: Base) -> dict[str, tuple[str, ...]] | None:
    """{kohya's name: the paths of its parts} for layers of diffusers' Flux, adapted or not; None if they are not that."""
    numbers = {path.split(".")[1] for path in paths if path.count(".") > 1 and path.split(".")[1].isdigit()}
    names = [f"{block}_{n}_{name}" for n in numbers for block, (_, inside) in BLOCKS.items() for name in inside]
    table = {name: parts_of(name) for name in (*names, *OUTER)}
    of_part = {part: name for name, parts in table.items() for part in parts}
    single = BLOCKS["single_blocks"][0]
    known = any(path.startswith(f"{single}.") for path in (*paths, *base.shapes))  # SD3 has blocks of the other kind too
    if not known or not all(path in of_part for path in paths):
        return None
    return {name: table[name] for name in dict.fromkeys(of_part[path] for path in paths)}


def split(name: str, layer: Layer) -> dict[str, Layer]:
    """{path: what it has} of the parts of one of kohya's layers.

    Raises:
        FileFormatError: its rows are not those of its parts.
    """
    parts = parts_of(name)
    if len(parts) == 1:
        return {parts[0]: _swapped(layer) if name == SWAPPED else layer}
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    d = A.flatten(1).shape[1]  # of the model: what the fused layers read
    rows = _rows(parts, d, len(B) - len(QKV) * d)
    if A.dim() != 2 or sum(rows) != len(B) or min(rows) < 1:
        shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
        raise FileFormatError(f"{name} has {shapes}; it is read as {len(parts)} layers, whose rows these are not")
    pieces = {table: t.split(rows) for table, t in layer.tensors.items() if table != "lora_A"}
    owns = torch.stack([piece.ne(0).any(dim=0) for piece in pieces["lora_B"]])  # part, column
    apart = bool(owns.sum(dim=0).eq(1).all())
    found = {}
    for i, path in enumerate(parts):
        columns = owns[i] if apart else torch.ones_like(owns[i])
        if columns.any():
            tensors = {table: piece[i] for table, piece in pieces.items()}
            tensors |= {"lora_A": A[columns], "lora_B": tensors["lora_B"][:, columns]}
            found[path] = Layer(tensors, layer.alpha * int(columns.sum()) / layer.rank)
    return found


def fuse(name: str, parts: Mapping[str, Layer], base: Base) -> Layer:
    """One of kohya's layers from those of its parts that are adapted: a block of B for each, of summed rank.

    Raises:
        ConfigError: they are not of Flux's shapes, or a part is missing of which more than A and B are known.
    """
    paths = parts_of(name)
    if len(paths) == 1:
        (layer,) = parts.values()
        return _swapped(layer) if name == SWAPPED else layer
    layers = list(parts.values())
    by_row = sorted(layers[0].tensors.keys() - {"lora_A", "lora_B"})  # which the rows of the others have too, from the base
    if len(layers) < len(paths) and by_row:
        missing = ", ".join(path for path in paths if path not in parts)
        raise ConfigError(f"Flux has {', '.join(paths)} as one layer, and with {by_row[0]} all are adapted: {missing} is not")
    scaling, d = layers[0].alpha / layers[0].rank, layers[0].tensors["lora_A"].shape[1]
    mlp = paths[-1]
    rest = len(parts[mlp].tensors["lora_B"]) if mlp in parts else base.shapes.get(mlp, (MLP_RATIO * d,))[0]
    blocks = []
    for path, rows in zip(paths, _rows(paths, d, rest), strict=True):
        B = parts[path].tensors["lora_B"] if path in parts else layers[0].tensors["lora_B"].new_zeros(rows, 0)
        if len(B) != rows:
            raise ConfigError(f"{path} has {len(B)} rows, and in a Flux of width {d} it has {rows}")
        own = parts[path].alpha / parts[path].rank if path in parts else scaling
        blocks.append(B if own == scaling else (B.double() * (own / scaling)).to(B.dtype))
    tensors: dict[str, Tensor] = {"lora_A": torch.cat([layer.tensors["lora_A"] for layer in layers])}
    tensors["lora_B"] = torch.block_diag(*blocks)
    tensors |= {table: torch.cat([layer.tensors[table] for layer in layers]) for table in by_row}
    return replace(layers[0], tensors=tensors, alpha=scaling * len(tensors["lora_A"]))


def _rows(parts: Sequence[str], d: int, rest: int) -> list[int]:
    """How many rows each part has: q, k and v one width of the model, the multilayer perceptron the rest."""
    return [rest if part.endswith(MLP) else d for part in parts]


def _swapped(layer: Layer) -> Layer:
    """The halves of the rows the other way round: Flux computes shift and scale, diffusers scale and shift."""
    for table in layer.tensors.keys() - {"lora_A"}:
        layer = layer.mapped(table, lambda rows: torch.cat(rows.chunk(2)[::-1]))
    return layer
