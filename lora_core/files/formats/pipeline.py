"""What the formats of diffusion pipelines share: which component of a pipeline a layer is of, and names with underscores.

One file holds layers of several models: of a UNet or a transformer, and of text encoders. Each of them is a base of its own
here, so one is chosen: the one that is asked for, the only one there is, or the one whose layers the base has.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from ...errors import ConfigError, FileFormatError
from .base import Base, Contents, Layer

#: The models of a pipeline, by their attributes in diffusers.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
#: How paths begin in each of them: with it a file that says no component tells it.
BEGINNINGS = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding."),
    "transformer": (
        *("transformer_blocks.", "single_transformer_blocks.", "x_embedder", "context_embedder", "time_text_embed."),
        *("norm_out.", "proj_out"),
    ),
    "text_encoder": ("text_model.", "text_projection", "encoder.layers."),
}
WRAPPER = "text_model."
#: The names of modules of these models with an underscore in them: elsewhere it stands for a dot.
WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks", "conv_in", "conv_out"),
    *("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj"),
    *("conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2", "ff_context", "proj_mlp"),
    *("norm1_context", "norm_out", "x_embedder", "context_embedder", "time_text_embed", "timestep_embedder", "text_embedder"),
    *("guidance_embedder", "text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
)
#: Those without.
WORDS += ("attn", "attn1", "attn2", "attentions", "conv", "conv1", "conv2", "downsamplers", "encoder", "fc1", "fc2", "ff")
WORDS += ("layers", "linear", "mlp", "net", "norm", "norm1", "norm2", "proj", "resnets", "upsamplers")
#: A name with underscores is one of these words or a number, again and again; the longest word first.
_PART = re.compile(rf"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))}|[0-9]+)(?=_|$)")


def one_component(contents: Contents, base: Base, tool: str) -> Contents:
    """The layers of the component that the base is, without its name before them; `others` says what else there is.

    Raises:
        FileFormatError: none is the base's, or several may be; names them.
    """
    groups: dict[str, dict[str, Layer]] = {}
    for path, layer in contents.layers.items():
        component, _, rest = path.partition(".")
        groups.setdefault(component, {})[rest] = layer
    asked = base.hints.get("component")
    listed = ", ".join(f"{name} ({len(layers)} layers)" for name, layers in groups.items())
    if asked is not None:
        chosen = [asked] if asked in groups else []
    elif base.shapes and len(groups) > 1:
        chosen = [name for name, layers in groups.items() if all(_fits(p, v, base) for p, v in layers.items())]
    else:
        chosen = list(groups)
    if len(chosen) != 1:
        found = "none of them is the base's" if not chosen else f"{' and '.join(chosen)} may be meant"
        how = "say which (hints={'component': ...}, --component)"
        raise FileFormatError(f"{tool}: the file holds {listed}, and {found}; {how}")
    others = tuple(f"{name} ({len(layers)} layers)" for name, layers in groups.items() if name != chosen[0])
    return replace(contents, layers=groups[chosen[0]], others=others)


def component_of(contents: Contents, base: Base) -> str:
    """The component that layers belong to, as was said, or as their paths begin."""
    asked = base.hints.get("component")
    if asked is not None and asked not in COMPONENTS:
        raise ConfigError(f"component must be one of {', '.join(COMPONENTS)}, not {asked!r}")
    told = [name for name, starts in BEGINNINGS.items() if all(path.startswith(starts) for path in contents.layers)]
    if asked is None and len(told) != 1:
        path = next(iter(contents.layers))
        raise ConfigError(f"{path} is of no known model of a pipeline; say of which (--component {'|'.join(COMPONENTS)})")
    return asked or told[0]


def settled(path: str, base: Base) -> str | None:
    """The path of the base that is meant: recent text encoders have no "text_model" around them; None: the base has none."""
    if not base.shapes:
        return path
    return next((p for p in (path, path.removeprefix(WRAPPER), WRAPPER + path) if p in base.shapes), None)


def dotted(name: str, base: Base) -> str | None:
    """The path that a name with underscores stands for: by the base's paths if they are known, else by WORDS; None: no one."""
    if base.shapes:
        known, wrapper = base.by_underscores, WRAPPER.replace(".", "_")
        return next((known[n] for n in (name, name.removeprefix(wrapper), wrapper + name) if n in known), None)
    parts, at = [], 0
    while at < len(name):
        match = _PART.match(name, at)
        if match is None:
            return None
        parts.append(match[0])
        at = match.end() + 1
    return ".".join(parts) if parts and not name.endswith("_") else None


def _fits(path: str, layer: Layer, base: Base) -> bool:
    shape = base.shapes.get(settled(path, base) or dotted(path, base) or "")
    if shape is None:
        return False
    d_in, d_out = layer.tensors["lora_A"].flatten(1).shape[1], len(layer.tensors["lora_B"])
    return (shape[0], math.prod(shape[1:])) in ((d_out, d_in), (d_in, d_out))
