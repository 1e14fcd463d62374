"""How adapters are merged over files: what into, in what dtype, with what weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..bases import PACKED
from ..bases.base import Base
from ..errors import ConfigError
from ..methods.base import refuse_unmergeable
from ..methods.registry import method_of
from ..spec.checks import check_finite
from ..spec.config import LoraConfig

ORIGINAL = "original"
DEQUANTIZED = "-dequantized"  # after the name of a base that packs weights
REMEDY = "merge in float32 (--dtype float32), not packed (--base-as), or allow it (--allow-loss; allow_loss=True)"


def choices(packings: Iterable[str] = PACKED) -> tuple[str, ...]:
    """What a merge can be folded into, with these ways to pack a weight."""
    return (ORIGINAL, *(choice for name in packings for choice in (f"{name}{DEQUANTIZED}", name)))


def packing_of(base_as: str) -> tuple[Base | None, bool]:
    """What the base's weights are packed by first, and whether the result stays packed."""
    if base_as == ORIGINAL:
        return None, False
    return PACKED[base_as.removesuffix(DEQUANTIZED)], not base_as.endswith(DEQUANTIZED)


@dataclass(frozen=True)
class Recipe:
    """How to merge.

    Attributes:
        dtype: what floating-point tensors are cast to; None: each keeps the base's.
        base_as: "original", or the name of a base that packs weights ("nf4"), to pack the result so, or the same with
            "-dequantized" after it; None: the latter if an adapter's fingerprint says that it was trained on such a base, else
            "original".
        weights: a factor for the update of each adapter; None: 1 each.
        quantized: paths of the layers that are packed then; None: what the adapter's probe says of its model, or else every
            matrix but embeddings and heads, which is what quantising takes in the models of transformers.
        allow_loss: merge although the cast, or packing, loses more than half of the update in some layer.

    Raises:
        ConfigError: a value is not allowed.
    """

    dtype: torch.dtype | None = None
    base_as: str | None = None
    weights: tuple[float, ...] | None = None
    quantized: tuple[str, ...] | None = None
    allow_loss: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None:
            if isinstance(self.weights, str) or not isinstance(self.weights, Iterable):
                raise ConfigError(f"weights must be a list with one number for each adapter, not {self.weights!r:.99}")
            object.__setattr__(self, "weights", tuple(self.weights))
            for weight in self.weights:
                check_finite("weights", weight)
        if self.base_as not in (None, *choices()):
            raise ConfigError(f"base_as must be one of {', '.join(map(repr, choices()))}, not {self.base_as!r}")
        if self.dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ConfigError(f"dtype must be float32, float16, bfloat16 or float64, not {self.dtype}")

    def weights_for(self, adapters: Sequence[tuple[Path, LoraConfig]]) -> tuple[float, ...]:
        """The factor of each of these adapters, (directory, settings).

        Raises:
            ConfigError: there are fewer or more; or one of the adapters can't be merged, or not weighted.
        """
        weights = (1.0,) * len(adapters) if self.weights is None else self.weights
        if not adapters or len(weights) != len(adapters):
            raise ConfigError(f"{len(weights)} weights are given for {len(adapters)} adapters; give one for each")
        for weight, (directory, config) in zip(weights, adapters, strict=True):
            refuse_unmergeable(method := method_of(config), directory)
            if weight != 1 and not method.is_product:
                raise ConfigError(f"a {method.label} adapter can't be weighted: its update is no product; leave its weight 1")
        return weights


#: Nothing cast, each update once, into what its fingerprint says.
AS_IT_IS = Recipe()
