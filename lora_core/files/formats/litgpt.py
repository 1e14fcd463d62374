"""litgpt: the `lit_model.pth.lora` that `litgpt finetune lora` trains.

    transformer.h.0.attn.qkv.lora_A (n r, d_in), .lora_B (d_q + d_k + d_v, r)      transformer.h.0.mlp.fc_1.lora_A, ...

q, k and v are one layer there. Of the n of them that are adapted the A stand one above the other, and so do the B. Which these
are, r and alpha stand in the hyperparameters.yaml beside it; how many rows each has is in the base's configuration. litgpt also
wants the base's own model_config.yaml beside it. Source: litgpt/lora.py, scripts/convert_lit_checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, FileFormatError
from ..disk import write_whole
from ..pickled import to_pickled
from .base import AdapterFormat, Base, Contents, Layer
from .shared import by_pattern, one_alpha, paired, refuse_unmapped, renamed
from .source import GGUF, Source

WEIGHTS, SETTINGS = "lit_model.pth.lora", "hyperparameters.yaml"
#: {litgpt's path: that of transformers} of Llama and what is built like it, but for q, k and v.
NAMES = {
    "transformer.h.{}.attn.proj": "model.layers.{}.self_attn.o_proj",
    "transformer.h.{}.mlp.fc_1": "model.layers.{}.mlp.gate_proj",
    "transformer.h.{}.mlp.fc_2": "model.layers.{}.mlp.up_proj",
    "transformer.h.{}.mlp.proj": "model.layers.{}.mlp.down_proj",
    "lm_head": "lm_head",
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
QKV = "attn.qkv"
#: What the base's configuration says of its heads: query heads, key heads, the width of one.
HEADS = ("n_head", "n_query_groups", "head_size")
#: The settings that say what of each block is adapted, and the layers that they mean.
SWITCHES = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}
OTHERS = {"lora_projection": (".attn.proj",), "lora_mlp": (".mlp.fc_1", ".mlp.fc_2", ".mlp.proj"), "lora_head": ("lm_head",)}


class Litgpt(AdapterFormat):
    """The adapters of litgpt."""

    name, tool = "litgpt", "litgpt"
    files = (WEIGHTS,)

    def recognises(self, source: Source) -> bool:
        paths = [name.removesuffix(".lora_A") for name in source.names if name.endswith(".lora_A")]
        return source.kind != GGUF and any(p.endswith(QKV) or by_pattern(p, NAMES) not in (None, "lm_head") for p in paths)

    def read(self, source: Source, base: Base) -> Contents:
        found, unknown = {}, []
        for name, tensor in source.tensors().items():
            path, _, end = name.rpartition(".")
            if end in ("lora_A", "lora_B"):
                found[name] = path, end, tensor
            else:
                unknown.append(name)
        refuse_unmapped(source, unknown, "a file of litgpt's adapters has lora_A and lora_B alone")
        settings = _settings(source.text_beside(SETTINGS))
        alpha = _number(settings.get("lora_alpha")) or base.hints.get("lora_alpha")
        on = [part for switch, part in SWITCHES.items() if settings.get(switch) == "true"]
        layers: dict[str, Layer] = {}
        for path, pair in paired(source, found).items():
            A, B = pair["lora_A"], pair["lora_B"]
            if not path.endswith(QKV):
                layers[path] = Layer(pair, alpha)
                continue
            if A.dim() != 2 or B.dim() != 2 or not on or A.shape[0] != len(on) * B.shape[1]:
                raise FileFormatError(
                    f"{source}: {path} has {tuple(A.shape)} and {tuple(B.shape)}; {SETTINGS} beside it says which of "
                    f"{', '.join(SWITCHES)} are adapted, and is needed"
                )
            rows = _rows(source, on, len(B), base)
            for part, a, b in zip(on, A.chunk(len(on)), B.split(rows), strict=True):
                layers[f"{path}.{part}"] = Layer({"lora_A": a, "lora_B": b}, alpha)
        return Contents(layers)

    def to_base(self, contents: Contents, base: Base) -> Contents:
        self._check(base)
        names = {path: by_pattern(path, NAMES | _parts()) for path in contents.layers}
        return renamed(contents, names, self.tool, f"known are {', '.join(NAMES | _parts())}")

    def from_base(self, contents: Contents, base: Base) -> Contents:
        self._check(base)
        back = {ours: theirs for theirs, ours in (NAMES | _parts()).items()}
        names = {path: by_pattern(path, back) for path in contents.layers}
        return renamed(contents, names, self.tool, f"known are {', '.join(back)}")

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        contents, alpha = one_alpha(contents)
        ranks = {layer.rank for layer in contents.layers.values()}
        if len(ranks) > 1:
            raise ConfigError(f"{self.tool} has one rank for all layers, and this adapter has {sorted(ranks)}")
        joined: dict[str, dict[str, Layer]] = {}
        tensors: dict[str, Tensor] = {}
        for path, layer in contents.layers.items():
            owner, _, part = path.rpartition(".")
            if owner.endswith(QKV):
                joined.setdefault(owner, {})[part] = layer
            else:
                tensors |= {f"{path}.{table}": tensor for table, tensor in layer.tensors.items()}
        kinds = {tuple(part for part in SWITCHES.values() if part in parts) for parts in joined.values()}
        if len(kinds) > 1:
            raise ConfigError(f"{self.tool} adapts the same of q, k, v in every block, and here are {sorted(kinds)}")
        on = next(iter(kinds), ())
        for path, parts in joined.items():
            for table in ("lora_A", "lora_B"):
                tensors[f"{path}.{table}"] = torch.cat([parts[part].tensors[table] for part in on])
        settings = {"checkpoint_dir": contents.fields.get("base_model_name_or_path") or "BASE", "precision": "null"}
        settings |= {"lora_r": ranks.pop(), "lora_alpha": alpha, "lora_dropout": 0.0}
        settings |= {switch: str(part in on).lower() for switch, part in SWITCHES.items()}
        settings |= dict(zip(HEADS, base.heads(self.tool), strict=True))  # so that the file can be read without its base
        for switch, ends in OTHERS.items():
            settings[switch] = str(any(path.endswith(ends) for path in contents.layers)).lower()
        write_whole(directory / WEIGHTS, to_pickled(tensors, "model"))
        write_whole(directory / SETTINGS, "".join(f"{key}: {value}\n" for key, value in settings.items()).encode())

    def _check(self, base: Base) -> None:
        if base.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            found = f"is {base.model_type!r}" if base.model_type else "is not known; name the base (--base)"
            raise FileFormatError(f"{self.tool}'s names are known for {known}; the base's model_type {found}")


def _parts() -> dict[str, str]:
    return {f"transformer.h.{{}}.{QKV}.{part}": f"model.layers.{{}}.self_attn.{part}" for part in SWITCHES.values()}


def _rows(source: Source, on: list[str], total: int, base: Base) -> list[int]:
    """How many rows of B each adapted part has: equal ones where that is all that can be, else by the base's heads."""
    if on == ["q_proj"] or set(on) == {"k_proj", "v_proj"}:
        return [total // len(on)] * len(on)
    config = _settings(source.text_beside("model_config.yaml")) or _settings(source.text_beside(SETTINGS))
    sizes = {name: _number(config.get(name)) for name in HEADS}
    if all(sizes.values()):
        n, n_kv, width = (int(size) for size in sizes.values())
    else:
        n, n_kv, width = base.heads("litgpt")
    rows = [(n if part == "q_proj" else n_kv) * width for part in on]
    if sum(rows) != total:
        raise FileFormatError(f"{source}: lora_B of {QKV} has {total} rows, and the base's {', '.join(on)} have {rows}")
    return rows


def _settings(text: str) -> Mapping[str, str]:
    """{key: value, as text} of the plain lines of a YAML file, which is all that is needed of it."""
    return dict(re.findall(r"^(\w+): *([^\s#]+) *$", text, re.MULTILINE))


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
