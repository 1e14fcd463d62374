"""diffusers: `pipeline.save_lora_weights(...)`, today's files and those of its earlier versions.

    unet.down_blocks.0.attentions.0...attn1.to_q.lora_A ...         today: the ends of PEFT, after the component
    text_encoder.text_model...q_proj.lora_linear_layer.down.weight  before: up and down
    unet....attn1.processor.to_q_lora.down.weight                   first: beside an attention processor

Today's files have the settings in their header, as JSON with the component before each field. The others say an alpha a layer,
or none, and then the scaling is 1. Source: diffusers' utils/state_dict_utils.py and loaders/lora_base.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FileFormatError
from ...methods.registry import MAGNITUDE, all_tables
from ...spec.config import LoraConfig
from ...spec.patterns import END, limited, refusal
from ..disk import to_safetensors, write_whole
from .base import AdapterFormat, Base, Contents, Layer
from .pipeline import BEGINNINGS, COMPONENTS, component_of, one_component, settled
from .shared import config_fields, paired, refuse_unmapped, renamed
from .source import GGUF, Source

WEIGHTS, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
SIDES = {"down": "lora_A", "up": "lora_B"}
#: The first versions' names of the four projections: in a UNet, and in a text encoder.
OLD = {"q": ("to_q", "q_proj"), "k": ("to_k", "k_proj"), "v": ("to_v", "v_proj"), "out": ("to_out.0", "out_proj")}
_DOWN_UP = re.compile(r"(?P<path>.+?)\.(?:to_(?P<old>q|k|v|out)_lora|lora|lora_linear_layer)\.(?P<side>down|up)\.weight")
#: The settings that the scaling follows from.
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


class Diffusers(AdapterFormat):
    """The files of diffusers' pipelines."""

    name, tool = "diffusers", "diffusers"
    files = (WEIGHTS,)
    holds = ("lora_A", "lora_B", MAGNITUDE)

    def recognises(self, source: Source) -> bool:
        return source.kind != GGUF and any(_parsed(name) is not None for name in source.names)

    def read(self, source: Source, base: Base) -> Contents:
        found, alphas, unknown = {}, {}, []
        for name, tensor in source.tensors().items():
            if name.endswith(".alpha") and tensor.numel() == 1:
                alphas[_plain(name.removesuffix(".alpha"))] = float(tensor.item())
            elif (parsed := _parsed(name)) is not None:
                found[name] = *parsed, tensor
            else:
                unknown.append(name)
        refuse_unmapped(source, unknown, "lora_A and lora_B, down and up, and alpha are read")
        settings, layers = _settings(source), {}
        with limited():
            for path, pair in paired(source, found).items():
                component, _, rest = path.partition(".")
                rank = len(pair["lora_A"])
                said = settings[component].scaling_for(rest) * rank if component in settings else float(rank)
                layers[path] = Layer(pair, alphas.pop(path, said))
        refuse_unmapped(source, list(alphas), "they have an alpha alone")
        return Contents(layers)

    def to_base(self, contents: Contents, base: Base) -> Contents:
        contents = one_component(contents, base, self.tool)
        names = {path: settled(path, base) for path in contents.layers}
        return renamed(contents, names, self.tool, "the base has no such layers")

    def from_base(self, contents: Contents, base: Base) -> Contents:
        component = component_of(contents, base)
        return renamed(contents, {path: f"{component}.{path}" for path in contents.layers}, self.tool, "")

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        tables, tensors, own = all_tables(), {}, {}
        for path, layer in contents.layers.items():
            if layer.embedding:
                raise ConfigError(f"{self.tool} adapts no embeddings, and {path} is one")
            component, _, rest = path.partition(".")
            own[rest] = layer
            tensors |= {f"{path}.{tables[table].key}": tensor for table, tensor in layer.tensors.items()}
        fields = config_fields(Contents(own), base)
        settings = {f"{component}.{name}": list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
        header = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
        write_whole(directory / WEIGHTS, to_safetensors(tensors, header))


def _parsed(name: str) -> tuple[str, str] | None:
    """(path with the component before it, table) of the name of a tensor; None if it is none of this format's."""
    for table in all_tables().values():
        for key in (table.key, f"{table.key}.weight"):
            if table.key.startswith("lora_") and table.form and name.endswith(f".{key}"):
                path = name.removesuffix(f".{key}")
                return (path, table.name) if path.partition(".")[0] in COMPONENTS else None
    match = _DOWN_UP.fullmatch(name)
    if match is None:
        return None
    path = _plain(match["path"])
    if match["old"]:
        path = f"{path}.{OLD[match['old']][path.startswith('text_encoder')]}"
    return path, SIDES[match["side"]]


def _plain(path: str) -> str:
    """A path with its component before it and without the attention processor in it."""
    path = path.replace(".processor", "")
    if path.partition(".")[0] not in COMPONENTS:
        path = f"{next((name for name, starts in BEGINNINGS.items() if path.startswith(starts)), 'unet')}.{path}"
    return path


def _settings(source: Source) -> Mapping[str, LoraConfig]:
    """{component: what the header says of its scaling}."""
    if METADATA not in source.metadata:
        return {}
    try:
        fields = json.loads(source.metadata[METADATA])
        grouped: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            component, _, field = name.partition(".")
            if field in SCALING and value is not None:
                for pattern in value if isinstance(value, dict) else ():
                    if reason := refusal(pattern, END):
                        raise ValueError(f"the pattern {pattern!r} {reason}")
                grouped.setdefault(component, {})[field] = value
        return {name: dataclasses.replace(LoraConfig(), **given) for name, given in grouped.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{source}: {METADATA} in its header is not an adapter's settings: {error}") from None
