"""MLX: what `mlx_lm.lora` trains and `mlx_lm.generate --adapter-path` reads.

    adapters.safetensors     model.layers.0.self_attn.q_proj.lora_a (d_in, r), .lora_b (r, d_out); with DoRA .m (d_out,)
    adapter_config.json      fine_tune_type, num_layers, lora_parameters: {rank, scale, dropout, keys}

Both factors stand transposed, and y gains scale (x a) b, so alpha = scale r. The layers have the paths of the checkpoint on the
Hub, but where mlx-lm's model is built otherwise (PATHS). Source: mlx_lm/tuner/ (`load_adapters`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...errors import ConfigError, FileFormatError
from ...methods.registry import MAGNITUDE, Dora, Lora
from ..disk import to_safetensors, write_whole
from .base import AdapterFormat, Base, Contents, Layer
from .shared import one_alpha, paired, refuse_unmapped, renamed
from .source import SAFETENSORS, Source

WEIGHTS, SETTINGS = "adapters.safetensors", "adapter_config.json"
TABLES = {"lora_a": "lora_A", "lora_b": "lora_B", "m": MAGNITUDE}
ENDS = {table: end for end, table in TABLES.items()}
#: {model_type: (how paths begin in transformers, how in mlx-lm)}; elsewhere they are the same.
PATHS = {"gpt2": ("transformer.", "model."), "gpt_bigcode": ("transformer.", "model.")}


class Mlx(AdapterFormat):
    """The adapters of mlx-lm."""

    name, tool = "mlx", "MLX (mlx-lm)"
    files = (WEIGHTS,)
    holds = ("lora_A", "lora_B", MAGNITUDE)

    def recognises(self, source: Source) -> bool:
        return (
            source.kind == SAFETENSORS
            and any(name.endswith(".lora_a") for name in source.names)
            and ("lora_parameters" in source.beside(SETTINGS) or source.path.name.endswith(WEIGHTS))
        )

    def read(self, source: Source, base: Base) -> Contents:
        settings = source.beside(SETTINGS)
        parameters = settings.get("lora_parameters")
        scale = parameters.get("scale") if isinstance(parameters, dict) else None
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise FileFormatError(f"{source}: {SETTINGS} beside it has no lora_parameters with a scale; put mlx-lm's own there")
        found, unknown = {}, []
        for name, tensor in source.tensors().items():
            path, _, end = name.rpartition(".")
            if end not in TABLES or tensor.dim() > 2:  # three dimensions: the experts of a mixture in one tensor
                unknown.append(name)
                continue
            found[name] = path, TABLES[end], tensor.t().contiguous() if tensor.dim() == 2 else tensor
        refuse_unmapped(source, unknown, "an adapter of mlx-lm on linear layers or embeddings is read")
        base = settings.get("model")
        layers = {path: Layer(tensors, scale * len(tensors["lora_A"])) for path, tensors in paired(source, found).items()}
        return Contents(layers, {"base_model_name_or_path": base if isinstance(base, str) else None})

    def to_base(self, contents: Contents, base: Base) -> Contents:
        theirs, ours = reversed(PATHS.get(base.model_type, ("", "")))
        names = {path: _moved(path, theirs, ours) for path in contents.layers}
        contents = renamed(contents, names, self.tool, f"they don't begin with {theirs!r}")
        layers = {path: replace(layer, embedding=path in base.embeddings) for path, layer in contents.layers.items()}
        return replace(contents, layers=layers)

    def from_base(self, contents: Contents, base: Base) -> Contents:
        ours, theirs = PATHS.get(base.model_type, ("", ""))
        names = {path: _moved(path, ours, theirs) for path in contents.layers}
        return renamed(contents, names, self.tool, f"they don't begin with {ours!r}")

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        layers, tensors = contents.layers, {}
        ranks = {layer.rank for layer in layers.values()}
        if len(ranks) > 1:
            raise ConfigError(f"{self.tool} has one rank for all layers, and this adapter has {sorted(ranks)}")
        (rank,), (contents, alpha) = ranks, one_alpha(contents)
        kinds = {MAGNITUDE in layer.tensors for layer in contents.layers.values()}
        if len(kinds) > 1:
            raise ConfigError(f"{self.tool} has either DoRA on all layers or on none")
        for path, layer in contents.layers.items():
            for table, tensor in layer.tensors.items():
                tensors[f"{path}.{ENDS[table]}"] = _transposed(tensor, table)
        settings = {
            "fine_tune_type": Dora.name if True in kinds else Lora.name,
            "model": contents.fields.get("base_model_name_or_path"),
            "num_layers": 0,  # the keys below are whole paths, which are looked up in the model and not in its last blocks
            "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": list(contents.layers)},
        }
        write_whole(directory / WEIGHTS, to_safetensors(tensors, {"format": "mlx"}))
        write_whole(directory / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())


def _moved(path: str, old: str, new: str) -> str | None:
    return new + path.removeprefix(old) if path.startswith(old) else None


def _transposed(tensor: Tensor, table: str) -> Tensor:
    if tensor.dim() > 2:
        raise ConfigError("MLX (mlx-lm) adapts linear layers and embeddings, not convolutions")
    return tensor if table == MAGNITUDE else tensor.t().contiguous()
