"""What a method is, and the schedule that methods train on. Frozen, and free of torch. Those of the study: `recipes.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ExperimentError

ATTENTION = ("query", "key", "value", "output")
NOTHING, HEAD, ADAPTER, EVERYTHING = "nothing", "head", "adapter", "everything"


#: {what the command line calls it: what `Method.quantize` and the records of runs have}.
QUANTIZE = {"none": False, "nf4": True, "int8": "int8"}

#: What the products of a run are computed in: float32, or bfloat16.
PRECISIONS = FP32, BF16 = "fp32", "bf16"


@dataclass(frozen=True)
class Method:
    """One way to adapt a base model.

    Attributes:
        name, summary: what it is called, and what it is in half a line.
        trains: NOTHING, the HEAD alone, an ADAPTER and the head, or EVERYTHING.
        learning_rate: the peak of the schedule, unless another is asked for. What starts from pretrained weights takes
            smaller steps than what starts from zero.
        quantize: how the base's linear layers are held: False: as they are; True: in NF4 (Dettmers et al., "QLoRA", arXiv
            2305.14314); "int8": in 8 bits (Dettmers et al., "LLM.int8()", arXiv 2208.07339).
        r, lora_alpha, lora_dropout: of the adapters (Hu et al., "LoRA", arXiv 2106.09685).
        bias: which of the base's biases are trained too: "none", "lora_only" (those of adapted layers) or "all".
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
        use_dora: train the magnitude of each output apart from its direction (Liu et al., "DoRA", arXiv 2402.09353).
        lora_plus_ratio: how many times A's learning rate B has (Hayou et al., "LoRA+", arXiv 2402.12354); 1 for plain LoRA.
        roles: the attention projections that carry adapters; `models.projections` turns them into names.
        target_modules: names to use instead of roles, or "all-linear" alone.
    """

    name: str
    summary: str
    trains: str = ADAPTER
    learning_rate: float = 5e-4
    quantize: bool | str = False
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_plus_ratio: float = 1.0
    roles: tuple[str, ...] = ATTENTION
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZE.values():
            raise ExperimentError(f"quantize must be one of {', '.join(map(repr, QUANTIZE.values()))}, not {self.quantize!r}")
        if not 0 < self.lora_plus_ratio < math.inf:
            raise ExperimentError(f"lora_plus_ratio must be a number above 0, not {self.lora_plus_ratio}")

    @property
    def adapts(self) -> bool:
        """Whether there is an adapter."""
        return self.trains == ADAPTER


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, a linear warm-up over the first `warmup` of the steps, then linear decay.

    `train_samples` and `max_steps` cut the work short; None means all of it. Checked when made.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup: float = 0.06
    max_grad_norm: float = 1.0
    max_length: int = 128
    train_samples: int | None = None
    max_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length", "train_samples", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExperimentError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.warmup < 1:
            raise ExperimentError(f"warmup must be a share of the steps in [0, 1), not {self.warmup}")
        if not 0 < self.learning_rate < math.inf:
            raise ExperimentError(f"learning_rate must be a number above 0, not {self.learning_rate}")
        if not (0 <= self.weight_decay < math.inf and self.max_grad_norm >= 0):
            raise ExperimentError("weight_decay and max_grad_norm must be numbers that are not negative")
        if not 0 <= self.seed < 2**32:
            raise ExperimentError(f"seed must lie in [0, 2^32), not {self.seed}")
