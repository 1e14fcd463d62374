"""The methods under comparison, and the schedule that they all train on. Frozen, and free of torch.

A method is a few settings of one recipe: which projections of the attention carry adapters of which rank, and whether
the base lies in 4 bits. A new one is a line in `METHODS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ExperimentError

ATTENTION = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Method:
    """One way to adapt a base model.

    Attributes:
        name, summary: what it is called, and what it is in half a line.
        adapt: whether anything is trained at all.
        quantize: whether the base's linear layers are held in NF4.
        r, lora_alpha, lora_dropout: of the adapters (Hu et al., "LoRA", arXiv 2106.09685).
        roles: the attention projections that carry adapters; `models.projections` turns them into names.
        target_modules: names to use instead of roles.
    """

    name: str
    summary: str
    adapt: bool = True
    quantize: bool = False
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    roles: tuple[str, ...] = ATTENTION
    target_modules: tuple[str, ...] | None = None


METHODS = {
    method.name: method
    for method in (
        Method("base", "no training: the pretrained model with an untrained head", adapt=False),
        Method("lora", "LoRA of rank 16 on the four attention projections"),
        Method("qlora", "the same on a base in 4-bit NF4", quantize=True),
    )
}


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
        if not self.learning_rate > 0:
            raise ExperimentError(f"learning_rate must be above 0, not {self.learning_rate}")
        if not (self.weight_decay >= 0 and self.max_grad_norm >= 0):
            raise ExperimentError("weight_decay and max_grad_norm must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ExperimentError(f"seed must lie in [0, 2^32), not {self.seed}")
