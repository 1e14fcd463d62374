"""torchtune: `epoch_N/adapter_model.pt` and older `adapter_N.pt`.

    layers.0.attn.q_proj.lora_a.weight (r, d_in), .lora_b.weight (d_out, r); with DoRA .magnitude (d_out,)

torchtune gives layers names of its own (NAMES), and in Llama-like models pairs the two halves of each head of q and k, as
Meta's checkpoints do. The rank and alpha stand in the adapter_config.json that it writes beside, in PEFT's words. What it
writes as adapter_model.safetensors is PEFT's format. Source: torchtune/models/convert_weights.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import FileFormatError
from ...methods.registry import MAGNITUDE
from ..disk import to_safetensors, write_whole
from .base import AdapterFormat, Base, Contents, Layer
from .shared import by_pattern, halved, interleaved, one_alpha, paired, refuse_unmapped, renamed, reordered
from .source import Source

WEIGHTS, SETTINGS = "adapter_model_torchtune.safetensors", "adapter_config.json"
TABLES = {".lora_a.weight": "lora_A", ".lora_b.weight": "lora_B", ".magnitude": MAGNITUDE}
#: {torchtune's path: that of transformers} of Llama and what is built like it.
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attn.output_proj": "model.layers.{}.self_attn.o_proj",
    "layers.{}.mlp.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.mlp.w3": "model.layers.{}.mlp.up_proj",
    "output": "lm_head",
}
#: {model_type: whether the rows of q and k are in pairs}.
ARCHITECTURES = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}


class Torchtune(AdapterFormat):
    """The adapters of torchtune's recipes."""

    name, tool = "torchtune", "torchtune"
    files = (WEIGHTS, "adapter_model.pt")
    holds = ("lora_A", "lora_B", MAGNITUDE)

    def recognises(self, source: Source) -> bool:
        return any(name.endswith(".lora_a.weight") for name in source.names)

    def read(self, source: Source, base: Base) -> Contents:
        found, unknown = {}, []
        for name, tensor in source.tensors().items():
            end = next((end for end in TABLES if name.endswith(end)), None)
            if end is None:
                unknown.append(name)
            else:
                found[name] = name.removesuffix(end), TABLES[end], tensor
        refuse_unmapped(source, unknown, "an adapter's tensors end with " + ", ".join(TABLES))
        settings = source.beside(SETTINGS)
        alpha, name = settings.get("lora_alpha"), settings.get("base_model_name_or_path")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            alpha = base.hints.get("lora_alpha")
        layers = {path: Layer(tensors, alpha) for path, tensors in paired(source, found).items()}
        return Contents(layers, {"base_model_name_or_path": name if isinstance(name, str) else None})

    def to_base(self, contents: Contents, base: Base) -> Contents:
        pairs = self._pairs(base)
        names = {path: by_pattern(path, NAMES) for path in contents.layers}
        contents = renamed(contents, names, self.tool, f"known are {', '.join(NAMES)}")
        return reordered(contents, base, halved, self.tool) if pairs else contents

    def from_base(self, contents: Contents, base: Base) -> Contents:
        if self._pairs(base):
            contents = reordered(contents, base, interleaved, self.tool)
        back = {ours: theirs for theirs, ours in NAMES.items()}
        names = {path: by_pattern(path, back) for path in contents.layers}
        return renamed(contents, names, self.tool, f"known are {', '.join(back)}")

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        contents, alpha = one_alpha(contents)
        ends = {table: end for end, table in TABLES.items()}
        tensors = {p + ends[table]: t for p, layer in contents.layers.items() for table, t in layer.tensors.items()}
        ranks = [layer.rank for layer in contents.layers.values()]
        settings = {"r": max(ranks), "lora_alpha": alpha, "target_modules": sorted({p.split(".")[-1] for p in contents.layers})}
        write_whole(directory / WEIGHTS, to_safetensors(tensors, {"format": "pt"}))
        write_whole(directory / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())

    def _pairs(self, base: Base) -> bool:
        if base.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            found = f"is {base.model_type!r}" if base.model_type else "is not known; name the base (--base)"
            raise FileFormatError(f"{self.tool}'s names are known for {known}; the base's model_type {found}")
        return ARCHITECTURES[base.model_type]
