"""PEFT's two files as vLLM reads them: it scales every layer by the one lora_alpha / r of the configuration, patterns or not.

What a layer's scaling has over the common one goes into its B, so that both programs compute the same. Source: vllm/lora/
peft_helper.py and lora_model.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .base import AdapterFormat, Base, Contents
from .peft import write_peft
from .shared import one_alpha
from .source import Source


class Vllm(AdapterFormat):
    """PEFT's files with one scaling."""

    name, tool = "vllm", "vLLM"

    def recognises(self, source: Source) -> bool:
        return False  # as files they are PEFT's

    def write(self, directory: Path, contents: Contents, base: Base) -> None:
        by_rank = {path: layer.rank for path, layer in contents.layers.items()}
        scaled = replace(contents, layers={p: replace(v, alpha=v.alpha / v.rank) for p, v in contents.layers.items()})
        scaled, scaling = one_alpha(scaled)  # of scalings, here
        layers = {path: replace(layer, alpha=scaling * by_rank[path]) for path, layer in scaled.layers.items()}
        write_peft(directory, replace(contents, layers=layers), base)
