"""What a run is: everything that its result depends on."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch

from . import record
from .errors import ExperimentError
from .methods import BF16, FP32, Method, Schedule
from .models import BaseModel, projections
from .parallel import Processes


class Data(Protocol):
    """What a run learns from, and is judged on; `why` says how the choice fell on it."""

    name: str
    source: str
    why: str
    sha256: str
    train: Any
    validation: Any


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run depends on."""

    method: Method
    schedule: Schedule
    base: BaseModel
    data: Data
    device: str = "cpu"
    precision: str = FP32
    report_to: tuple[str, ...] = ()
    processes: Processes = dataclasses.field(default_factory=Processes)

    def __post_init__(self) -> None:
        """Refuses what is certain to fail, before a model is loaded."""
        config = self.base.config
        limit, width = (config.get(name) for name in ("max_position_embeddings", "hidden_size"))
        if isinstance(limit, int) and self.schedule.max_length > limit:
            raise ExperimentError(
                f"max_length is {self.schedule.max_length}, and this model reads at most {limit} tokens; lower it"
            )
        if self.method.adapts and isinstance(width, int) and self.method.r > width:
            raise ExperimentError(
                f"--rank {self.method.r} is more than the model's width, {width}, so that it saves nothing; lower it"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the layers to adapt."""
        if not self.method.adapts:
            return ()
        return self.method.target_modules or projections(self.base, self.method.roles)

    @property
    def bf16(self) -> bool:
        return self.precision == BF16

    def plan(self) -> dict[str, Any]:
        """The part of metrics.json that is known before the run."""
        config = self.base.config
        shape = {key: config[key] for key in ("model_type", "num_hidden_layers", "hidden_size") if key in config}
        schedule = dataclasses.asdict(self.schedule)
        seed = schedule.pop("seed")
        adapter = {key: getattr(self.method, key) for key in ("r", "lora_alpha", "lora_dropout")}
        adapter |= variants(self.method)
        if self.method.lora_plus_ratio != 1:
            adapter["lora_plus_ratio"] = self.method.lora_plus_ratio
        named = ("name", "source", "why", "sha256")
        return {
            "method": self.method.name,
            "base_model": {**{key: getattr(self.base, key) for key in named}, **shape},
            "data": {
                **{key: getattr(self.data, key) for key in named},
                "train": self.schedule.train_samples or len(self.data.train),
                "validation": len(self.data.validation),
            },
            "hyperparameters": {
                **schedule,
                "trains": self.method.trains,
                "quantize": self.method.quantize,
                **(adapter if self.method.adapts else {}),
                "target_modules": self.targets,
                "precision": self.precision,
            },
            "seed": seed,
        }

    def settings(self) -> dict[str, Any]:
        """What makes two runs end with the same weights, bit for bit: what a checkpoint must share with what goes on."""
        plan = self.plan()
        found = {key: {k: v for k, v in plan[key].items() if k not in ("why", "source")} for key in ("base_model", "data")}
        del found["data"]["name"]  # a directory's, that may have moved; the hash knows its content
        plan = {key: plan[key] for key in record.IDENTITY} | found
        return {**plan, "processes": self.processes.count, "device": self.device}


def choose_device(wanted: str = "auto") -> str:
    """The device that is asked for; for "auto", "cuda" if there is one, else "cpu".

    Raises:
        ExperimentError: CUDA is asked for and not there.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ExperimentError("device: 'cuda' was asked for, and torch sees no CUDA device; pass cpu or auto")
    return wanted if wanted != "auto" else "cuda" if available else "cpu"


def variants(method: Method) -> dict[str, Any]:
    """The settings in which `method` is not plain LoRA, by their names in `LoraConfig`."""
    settings = {"bias": method.bias, "use_rslora": method.use_rslora, "use_dora": method.use_dora}
    return {name: value for name, value in settings.items() if value not in (False, "none")}
