"""GGUF: the LoRA files of llama.cpp (`llama-cli --lora adapter.gguf`).

    general.type "adapter", adapter.type "lora", adapter.lora.alpha; general.architecture of the base
    blk.0.attn_q.weight.lora_a (r, d_in), .lora_b (d_out, r)

llama.cpp scales by alpha / r, with one alpha for the file. Layers have llama.cpp's names, which the library `gguf` maps; in
Llama-like models its files have the rows of q and k in pairs, as Meta's had them. The A of token
embeddings stands transposed. Source: convert_lora_to_gguf.py, conversion/llama.py and src/llama-adapter.cpp of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, FileFormatError, MissingDependencyError
from .base import AdapterFormat, Base, Contents, Layer
from .shared import halved, in_one_dtype, interleaved, one_alpha, paired, refuse_unmapped, renamed, reordered
from .source import GGUF, Source

WEIGHTS = "adapter.gguf"
TABLES = {".weight.lora_a": "lora_A", ".weight.lora_b": "lora_B"}
EMBEDDING = "token_embd"
#: The layers of one block, by how models of transformers call them.
LLAMA = tuple(f"self_attn.{x}_proj" for x in "qkvo") + ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PHI = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
#: {model_type: (llama.cpp's name of the architecture, whether the rows of q and k are in pairs, blocks, embeddings, layers)}
ARCHITECTURES = {
    "llama": ("llama", True, "model.layers", "model.embed_tokens", LLAMA),
    "mistral": ("llama", True, "model.layers", "model.embed_tokens", LLAMA),
    "qwen2": ("qwen2", False, "model.layers", "model.embed_tokens", LLAMA),
    "qwen3": ("qwen3", False, "model.layers", "model.embed_tokens", LLAMA),
    "gemma": ("gemma", False, "model.layers", "model.embed_tokens", LLAMA),
    "gemma2": ("gemma2", False, "model.layers", "model.embed_tokens", LLAMA),
    "gemma3_text": ("gemma3", False, "model.layers", "model.embed_tokens", LLAMA),
    "phi3": ("phi3", False, "model.layers", "model.embed_tokens", PHI),
    "gpt2": ("gpt2", False, "transformer.h", "transformer.wte", GPT2),
}
MAX_BLOCKS = 10_000


class Gguf(AdapterFormat):
    """llama.cpp's adapters."""

    name, tool = "gguf", "GGUF (llama.cpp)"
    files = (WEIGHTS,)

    def recognises(self, source: Source) -> bool:
        return source.kind == GGUF and source.metadata.get("general.type") == "adapter"

    def read(self, source: Source, base: Base) -> Contents:
        if source.metadata.get("adapter.type") != "lora":
            raise FileFormatError(f"{source} is an adapter of the type {source.metadata.get('adapter.type')!r}; 'lora' is read")
        alpha = source.metadata.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, float):
            raise FileFormatError(f"{source}: adapter.lora.alpha is {alpha!r}; a number is expected")
        found, unknown = {}, []
        for name, tensor in source.tensors().items():
            end = next((end for end in TABLES if name.endswith(end)), None)
            if end is None:
                unknown.append(name)
                continue
            path = name.removesuffix(end)
            found[name] = path, TABLES[end], tensor.t().contiguous() if (path, TABLES[end]) == (EMBEDDING, "lora_A") else tensor
        refuse_unmapped(source, unknown, "an adapter's tensors end with .lora_a and .lora_b")
        layers = {
            path: Layer(pair, alpha or float(len(pair["lora_A"])), path == EMBEDDING)  # without an alpha the scaling is 1
            for path, pair in paired(source, found).items()
        }
        name = source.metadata.get("general.base_model.0.name")
        return Contents(layers, {"base_model_name_or_path": name if isinstance(name, str) else None})

    def to_base(self, contents: Contents, base: Base) -> Contents:
        pairs = _architecture(base)[1]
        back = {theirs: path for path, theirs in _names(base).items()}
        names = {path: back.get(path) for path in contents.layers}
        contents = renamed(contents, names, self.tool, f"a {base.model_type} has no such layers")
        return reordered(contents, base, halved, self.tool) if pairs else contents

    def from_base(self, contents: Contents, base: Base) -> Contents:
        pairs = _architecture(base)[1]
        if pairs:
            contents = reordered(contents, base, interleaved, self.tool)
        known = _names(base)
        return renamed(contents, {p: known.get(p) for p in contents.layers}, self.tool, "llama.cpp has no such layers")

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        gguf = _library()
        contents, alpha = one_alpha(in_one_dtype(contents, torch.float32))
        writer = gguf.GGUFWriter(directory / WEIGHTS, _architecture(base)[0])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for path, layer in contents.layers.items():
            for end, table in TABLES.items():
                writer.add_tensor(path + end, _written(path, table, layer).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _written(path: str, table: str, layer: Layer) -> Tensor:
    tensor = layer.tensors[table]
    if tensor.dim() > 2:
        raise ConfigError(f"llama.cpp adapts linear layers and token embeddings, and {path} is a convolution")
    if layer.embedding != (path == EMBEDDING):
        raise ConfigError(f"llama.cpp adapts no embedding but {EMBEDDING}, and {path} is one")
    return (tensor.t() if layer.embedding and table == "lora_A" else tensor).contiguous()


def _architecture(base: Base) -> tuple[str, bool, str, str, tuple[str, ...]]:
    if base.model_type not in ARCHITECTURES:
        found = f"is {base.model_type!r}" if base.model_type else "is not known; name the base (--base)"
        raise FileFormatError(f"llama.cpp's names are known for {', '.join(ARCHITECTURES)}; the base's model_type {found}")
    return ARCHITECTURES[base.model_type]


def _names(base: Base) -> dict[str, str]:
    """{path of a layer in transformers: its name in llama.cpp}, by the library's map of tensor names."""
    gguf, (name, _, blocks, embedding, layers) = _library(), _architecture(base)
    count = base.config.get("num_hidden_layers", base.config.get("n_layer"))
    if type(count) is not int or not 0 < count <= MAX_BLOCKS:
        raise FileFormatError(f"the base's configuration says num_hidden_layers {count!r}; a number of blocks is expected")
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = gguf.get_tensor_name_map(arch, count)
    paths = [embedding, *(f"{blocks}.{i}.{layer}" for i in range(count) for layer in layers)]
    if not base.config.get("tie_word_embeddings"):  # a tied head is no weight of its own in llama.cpp's file
        paths.append("lm_head")
    return {path: found for path in paths if (found := known.get_name(path))}


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingDependencyError("GGUF files of llama.cpp need the library gguf: pip install gguf") from None
    return gguf
