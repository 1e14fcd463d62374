"""loralib, the code of the LoRA paper: `torch.save(lora.lora_state_dict(model), "lora.pt")`, or the same as safetensors.

    PATH.lora_A (r, d_in), PATH.lora_B (d_out, r); with bias="lora_only" PATH.bias as well

`MergedLinear` adapts some of the equal parts of one weight (q, k and v of GPT-2's c_attn): of n adapted ones the A stand one
above the other, (n r, d_in), and so do the B, (n d_part, r). Here that is one product of rank n r, with the B along a diagonal.
Which parts are adapted is in the code alone, and so are alpha and the kinds of layers: `hints` says the first two, the base the
third. Source: https://github.com/microsoft/LoRA, loralib/layers.py (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, FileFormatError
from ..disk import to_safetensors, write_whole
from .base import AdapterFormat, Base, Contents, Layer
from .shared import one_alpha, paired, refuse_unmapped
from .source import GGUF, Source

TABLES = {"lora_A": "lora_A", "lora_B": "lora_B"}
WEIGHTS = "lora.safetensors"
#: In the header of files that are written here, since loralib's have no place for it.
ALPHA = "lora_alpha"


@dataclass(frozen=True)
class Parts(Layer):
    """A layer whose B has the rows of some of the base's equal parts: `parts` of them."""

    parts: int = 1


class Loralib(AdapterFormat):
    """Checkpoints of loralib."""

    name, tool = "loralib", "loralib"
    files = ("lora.pt", "ckpt_lora.pt")
    holds = ("lora_A", "lora_B", "biases")

    def recognises(self, source: Source) -> bool:
        return source.kind != GGUF and any(name.endswith(".lora_A") for name in source.names)

    def read(self, source: Source, base: Base) -> Contents:
        found, biases, unknown = {}, {}, []
        for name, tensor in source.tensors().items():
            path, _, end = name.rpartition(".")
            if end in TABLES:
                found[name] = path, TABLES[end], tensor
            elif end == "bias":
                biases[name] = tensor
            else:
                unknown.append(name)
        paths = {path for path, _, _ in found.values()}
        unknown += [name for name in biases if name.rpartition(".")[0] not in paths]
        refuse_unmapped(source, unknown, "save lora.lora_state_dict(model) alone, with bias='none' or 'lora_only'")
        alpha = base.hints.get("lora_alpha") or _number(source.metadata.get(ALPHA))
        layers = {path: _layer(source, path, pair, alpha) for path, pair in paired(source, found).items()}
        return Contents(layers, biases=biases)

    def to_base(self, contents: Contents, base: Base) -> Contents:
        layers = {}
        for path, layer in contents.layers.items():
            shape = base.shapes.get(path, ())
            if len(shape) > 2:
                raise FileFormatError(f"{self.tool}: {path} is a convolution, whose update is no product; merge it there")
            if isinstance(layer, Parts):
                layer = _in_its_place(path, layer, shape, base.hints.get("enable_lora"))
            layers[path] = replace(layer, embedding=path in base.embeddings)
        return replace(contents, layers=layers)

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        contents, alpha = one_alpha(contents)
        tensors = dict(contents.biases)
        for path, layer in contents.layers.items():
            if layer.tensors["lora_A"].dim() > 2:
                raise ConfigError(f"{self.tool} holds no product of two for a convolution ({path})")
            tensors |= {f"{path}.{table}": tensor for table, tensor in layer.tensors.items()}
        write_whole(directory / WEIGHTS, to_safetensors(tensors, {"format": "pt", ALPHA: repr(alpha)}))


def _layer(source: Source, path: str, pair: dict[str, Tensor], alpha: float | None) -> Layer:
    A, B = pair["lora_A"], pair["lora_B"]
    if A.dim() != 2 or B.dim() != 2 or not B.shape[1] or A.shape[0] % B.shape[1]:
        raise FileFormatError(f"{source}: {path} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, of no one rank")
    n = A.shape[0] // B.shape[1]
    if n == 1:
        return Layer(pair, alpha)
    if B.shape[0] % n:
        raise FileFormatError(f"{source}: {path} has {n} parts, and lora_B {tuple(B.shape)}, whose rows are no {n} equal ones")
    pair = {"lora_A": A, "lora_B": torch.block_diag(*B.chunk(n))}  # (n d_part, n r)
    return Parts(pair, alpha and n * alpha, parts=n)  # loralib scales by alpha / r


def _in_its_place(path: str, layer: Parts, shape: tuple[int, ...], enabled: Sequence[bool] | None) -> Layer:
    """The layer with zero rows for the parts that are not adapted."""
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    d_out = next((n for n, m in (shape, shape[::-1]) if m == A.shape[1]), None) if len(shape) == 2 else None
    if enabled is None and d_out == len(B):
        enabled = [True] * layer.parts
    if enabled is None or sum(map(bool, enabled)) != layer.parts:
        raise FileFormatError(
            f"loralib: {path} is a MergedLinear with {layer.parts} adapted parts, and the file does not say which; give "
            "hints={'enable_lora': [True, False, True]} (--enable-lora 1,0,1), as it was made"
        )
    rows = iter(B.chunk(layer.parts))
    nothing = B.new_zeros(len(B) // layer.parts, B.shape[1])
    placed = torch.cat([next(rows) if on else nothing for on in enabled])
    if d_out is not None and len(placed) != d_out:
        raise FileFormatError(f"loralib: {path} would have {len(placed)} rows, and the base has {d_out}; check enable_lora")
    return Layer({"lora_A": A, "lora_B": placed}, layer.alpha)


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
