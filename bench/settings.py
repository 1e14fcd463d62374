"""What a run of the bench was asked for, and what it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from experiments.provenance import processor

LIBRARIES = ("torch", "peft", "loralib", "bitsandbytes", "transformers", "numpy")


@dataclass(frozen=True)
class Settings:
    """The options that the questions share.

    Attributes:
        device: "cpu" or "cuda".
        quick: few repetitions of small shapes: shows that the bench works, measures nothing.
        full: the whole grid of layer shapes instead of the lines through its middle.
    """

    device: str = "cpu"
    quick: bool = False
    full: bool = False

    def timing(self, rounds: int, warmup: int = 3) -> dict[str, Any]:
        """The arguments of `timing.interleave`, where that many rounds make a good median."""
        # Without waiting for it, a clock would see of a GPU's work only the launches.
        wait = {"synchronize": torch.cuda.synchronize} if self.device == "cuda" else {}
        return {"rounds": 2, "warmup": 1} | wait if self.quick else {"rounds": rounds, "warmup": warmup} | wait


def machine(settings: Settings) -> dict[str, Any]:
    """The machine and the libraries, to stand beside every number."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "quick": settings.quick,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
