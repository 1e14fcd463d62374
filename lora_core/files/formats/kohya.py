"""kohya's sd-scripts, LyCORIS and what reads their files (A1111, ComfyUI): Stable Diffusion and its text encoders.

    lora_unet_down_blocks_0_..._to_q.lora_down.weight (r, d_in), .lora_up.weight (d_out, r), .alpha; with DoRA .dora_scale
    lora_te_..., lora_te1_..., lora_te2_...: the text encoders

Names have underscores where paths have dots, and for SDXL those of the original UNet (`input_blocks_4_1_...`); for Flux those
of the original transformer, with "lora_unet_" before them too (see `flux.py`). LoCon's layers are convolutions, whose tensors
are kernels. Without an alpha the scaling is 1. Source: sd-scripts networks/lora.py and diffusers'
loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError, FileFormatError
from ...methods.registry import MAGNITUDE
from ..disk import to_safetensors, write_whole
from .base import AdapterFormat, Base, Contents, Layer
from .flux import fuse, fused_names, is_flux, parts_of, split
from .pipeline import WRAPPER, component_of, dotted, one_component, settled
from .shared import paired, refuse_unmapped, renamed
from .source import GGUF, Source

WEIGHTS = "lora.safetensors"
TABLES = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "dora_scale": MAGNITUDE}
ALPHA = "alpha"
#: {how a name begins: the component}; of several for one component the first is written.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
#: The same in files for Flux, whose sd-scripts has other numbers.
OF_FLUX = {"lora_unet_": "transformer", "lora_te3_": "text_encoder_2"}
#: {what a name has in it: the method}, of LyCORIS' files: no A and B, and so nothing that can be read.
OTHER_METHODS = {
    ".hada_w": "LoHa, a Hadamard product of two low-rank ones",
    ".lokr_w": "LoKr, a Kronecker product",
    ".oft_blocks": "OFT, a rotation of the weight",
}
#: The original UNet's names inside of a block, and diffusers'.
INNER = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
#: Those outside of blocks.
OUTER = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
#: The layers of one block of the UNets of Stable Diffusion 1, 2 and XL; a block of the way down ends with one that halves.
PER_BLOCK = 2
_NAME = re.compile(r"(?P<prefix>lora_[a-z0-9]+_)(?P<name>\w+)")
_BLOCK = re.compile(r"(?P<way>input_blocks|middle_block|output_blocks)_(?P<n>\d+)_(?P<rest>.+)")


class Kohya(AdapterFormat):
    """The files of kohya's sd-scripts and LyCORIS."""

    name, tool = "kohya", "kohya (sd-scripts, LyCORIS)"
    holds = ("lora_A", "lora_B", MAGNITUDE)

    def recognises(self, source: Source) -> bool:
        return source.kind != GGUF and any(
            name.endswith("lora_down.weight") and name.startswith(tuple(PREFIXES)) for name in source.names
        )

    def read(self, source: Source, base: Base) -> Contents:
        found, alphas, unknown = {}, {}, []
        flux = is_flux(match["name"] for name in source.names if (match := _NAME.match(name)))
        of_flux = PREFIXES | OF_FLUX
        for name, tensor in source.tensors().items():
            layer, _, end = name.partition(".")
            match = _NAME.fullmatch(layer)
            component = (of_flux if flux else PREFIXES).get(match["prefix"]) if match else None
            if component is None or (end not in TABLES and end != ALPHA):
                unknown.append(name)
            elif end == ALPHA:
                alphas[f"{component}.{match['name']}"] = _number(source, name, tensor)
            else:
                found[name] = f"{component}.{match['name']}", TABLES[end], tensor
        also = f"; some are {method}" if (method := other_method(unknown)) else ""
        refuse_unmapped(source, unknown, f"lora_down, lora_up, alpha and dora_scale are read, and lora_mid is not{also}")
        layers = {}
        for path, pair in paired(source, found).items():
            if MAGNITUDE in pair:
                pair[MAGNITUDE] = _magnitude(source, path, pair)
            layers[path] = Layer(pair, alphas.pop(path, float(len(pair["lora_A"]))))
        refuse_unmapped(source, list(alphas), "they have an alpha alone")
        return Contents(layers)

    def to_base(self, contents: Contents, base: Base) -> Contents:
        layers: dict[str, Layer] = {}
        flux = is_flux(path.partition(".")[2] for path in contents.layers)
        for path, layer in contents.layers.items():
            component, _, name = path.partition(".")
            parts = split(name, layer) if flux and parts_of(name) else {modern(name): layer}
            layers |= {f"{component}.{part}": own for part, own in parts.items()}
        contents = one_component(replace(contents, layers=layers), base, self.tool)
        names = {name: settled(name, base) if "." in name else dotted(name, base) for name in contents.layers}
        why = "the base has no such layers" if base.shapes else "name the base (--base), or load it onto its model"
        return renamed(contents, names, self.tool, why)

    def from_base(self, contents: Contents, base: Base) -> Contents:
        component = component_of(contents, base)
        fused = fused_names(list(contents.layers), base) if component == "transformer" else None
        if fused is not None:
            held = {name: {p: contents.layers[p] for p in parts if p in contents.layers} for name, parts in fused.items()}
            return replace(contents, layers={f"lora_unet_{name}": fuse(name, parts, base) for name, parts in held.items()})
        prefix = next(p for p, name in PREFIXES.items() if name == component)
        # Names of CLIP have the wrapper that recent models lack; T5, whose blocks are called so, has none.
        clip = component.startswith("text_encoder") and not any("encoder.block." in path for path in contents.layers)
        prefix += WRAPPER.replace(".", "_") if clip else ""
        names = {path: prefix + path.removeprefix(WRAPPER).replace(".", "_") for path in contents.layers}
        return renamed(contents, names, self.tool, "")

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        ends, tensors = {table: end for end, table in TABLES.items()}, {}
        for name, layer in contents.layers.items():
            if layer.embedding:
                raise ConfigError(f"{self.tool} adapts no embeddings, and {name} is one")
            for table, tensor in layer.tensors.items():
                if table == MAGNITUDE:
                    tensor = tensor.reshape(-1, *(1,) * (layer.tensors["lora_A"].dim() - 1))
                tensors[f"{name}.{ends[table]}"] = tensor
            tensors[f"{name}.{ALPHA}"] = torch.tensor(float(layer.alpha), device="cpu")
        write_whole(directory / WEIGHTS, to_safetensors(tensors, {"format": "pt", "ss_network_module": "networks.lora"}))


def other_method(names: Iterable[str]) -> str | None:
    """Which method of LyCORIS that is no LoRA a file with these names is of; None if it is of none."""
    return next((method for name in names for mark, method in OTHER_METHODS.items() if mark in name), None)


def modern(name: str) -> str:
    """A name of the original UNet as diffusers has it; any other name as it is."""
    if name in OUTER:
        return OUTER[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    n, rest = int(match["n"]), match["rest"]
    if match["way"] == "middle_block":
        start = ("mid_block_resnets_0", "mid_block_attentions_0", "mid_block_resnets_1")[min(n, 2)]
        return f"{start}_{INNER.get(rest, rest)}"
    kind, _, inner = rest.partition("_")
    down = match["way"] == "input_blocks"
    block, layer = divmod(n - 1, PER_BLOCK + 1) if down else divmod(n, PER_BLOCK + 1)
    start = f"{'down' if down else 'up'}_blocks_{block}"
    if down and inner == "op":
        return f"{start}_downsamplers_0_conv"
    if not down and inner == "conv":
        return f"{start}_upsamplers_0_conv"
    return f"{start}_{'resnets' if kind == '0' else 'attentions'}_{layer}_{INNER.get(inner, inner)}"


def _number(source: Source, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise FileFormatError(f"{source}: {name} is {tuple(tensor.shape)}; one number is expected")
    return float(tensor.item())


def _magnitude(source: Source, path: str, pair: Mapping[str, Tensor]) -> Tensor:
    """One magnitude for each output, as PEFT's files have them: (d_out,), or (1, d_out, 1, 1) of a convolution."""
    tensor, dims = pair[MAGNITUDE], pair["lora_A"].dim()
    if tuple(tensor.shape) != (len(pair["lora_B"]), *(1,) * (dims - 1)):
        raise FileFormatError(
            f"{source}: dora_scale of {path} is {tuple(tensor.shape)}; one for each output, (d_out, 1), is read, and LyCORIS' "
            "norms of inputs are not"
        )
    return tensor.flatten() if dims == 2 else tensor.transpose(0, 1)
