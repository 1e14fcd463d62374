"""VeRA: all layers share one random A and one random B, which stay as they are; each trains two vectors.

    W x + b * (B (d * (A dropout(x))))        A: (r, max d_in), B: (max d_out, r), frozen;  d: (r,), b: (d_out,), trained

(Kopiczko et al., arXiv 2310.11454, equation 2.) A layer reads the first d_in columns of A and the first d_out rows of B. b
starts at zero, d at `d_initial`. A and B are Kaiming-uniform, from the seed `projection_prng_key`, as in PEFT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases.forwards import stored_entry
from ..errors import ConfigError
from ..spec.checks import check_finite
from ..spec.config import LoraConfig
from .base import Method, Table, refuse_other_than_linear

#: Settings of LoRA that VeRA has no use for; its dropout is `vera_dropout`, its scaling 1.
_NOT_HERE = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "rank_pattern")
_NOT_HERE += ("alpha_pattern", "exclude_modules", "ensure_weight_tying", "trainable_token_indices", "alora_invocation_tokens")
_NOT_HERE += ("layer_replication",)


@dataclass(frozen=True)
class VeraConfig(LoraConfig):
    """Settings of a VeRA adapter, with PEFT's field names; what is not here means the same as in `LoraConfig`.

    Attributes:
        r: rank of A and B: larger than in LoRA, since a layer trains r + d_out values alone.
        projection_prng_key: the seed of A and B.
        save_projection: whether files have A and B; else whoever reads one makes them again from the seed.
        vera_dropout: probability, in [0, 1), with which an element of the adapter's input is zeroed in training.
        d_initial: what each value of d starts with.

    Raises:
        ConfigError: a field is unknown, one of LoRA's alone, or its value is not allowed.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1

    peft_type: ClassVar[str] = "VERA"

    def __post_init__(self) -> None:
        defaults = LoraConfig()
        for name in _NOT_HERE:
            if getattr(self, name) != getattr(defaults, name):
                raise ConfigError(f"VeraConfig has no {name} (given {getattr(self, name)!r}); leave it out")
        if self.bias == "lora_only":
            raise ConfigError("bias must be 'none' or 'all' for VeRA, not 'lora_only'")
        if type(self.projection_prng_key) is not int or not 0 <= self.projection_prng_key < 2**63:
            raise ConfigError(f"projection_prng_key must be an integer from 0 to 2^63 - 1, not {self.projection_prng_key!r}")
        if not isinstance(self.save_projection, bool):
            raise ConfigError(f"save_projection must be True or False, not {self.save_projection!r}")
        check_finite("d_initial", self.d_initial)
        object.__setattr__(self, "lora_dropout", self.vera_dropout)
        super().__post_init__()

    def scaling_for(self, path: str) -> float:
        return 1.0

    def scaled_by(self, factor: float) -> VeraConfig:
        raise ConfigError(f"an adapter scaled by {factor:g} can't be stored: VeRA's files have no scaling; scale it by 1 first")


class Vera(Method):
    """VeRA, on linear layers."""

    name, label, asked = "vera", "VeRA", "VeraConfig(...)"
    needs_base = "whose layers share A and B, so that only the base says how wide each is"
    peft_type = VeraConfig.peft_type
    config = VeraConfig
    mark = ("vera",)
    tables = (
        Table("vera_lambda_d", "rank", "vera_lambda_d"),
        Table("vera_lambda_b", "bias", "vera_lambda_b"),
        Table("vera_A", "", "vera_A", trained=False, shared=True),
        Table("vera_B", "", "vera_B", trained=False, shared=True),
    )

    def check(self, config: VeraConfig, path: str, module: nn.Module, shape: tuple[int, int], r: int) -> None:
        refuse_other_than_linear(self.label, path, module)

    def start_of(self, config: VeraConfig) -> float:
        return config.d_initial

    def shared(self, config: VeraConfig, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        made = {}
        for name, shape in self.shared_shapes(config, shapes).items():  # A first: both come from one generator
            bound = math.sqrt(6 / shape[1])
            made[name] = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
        return made

    def shared_shapes(self, config: VeraConfig, shapes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        d_in, d_out = (max(sizes) for sizes in zip(*shapes, strict=True))
        return {"vera_A": (config.r, d_in), "vera_B": (d_out, config.r)}

    def start(self, layer: Any, like: Tensor, r: int, scaling: float, init: float) -> dict[str, Tensor]:
        d_out = layer.matrix_shape(layer)[1]
        return {"vera_lambda_d": like.new_full((r,), init), "vera_lambda_b": like.new_zeros(d_out)}

    def product(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        d_in, d_out = layer.matrix_shape(layer)
        A, B, d, b = (stored_entry(getattr(layer, f"vera_{table}"), name) for table in ("A", "B", "lambda_d", "lambda_b"))
        B = b[:, None] * B[:d_out] * d  # all that is trained is in it: no gradient of A is computed
        return A[:, :d_in].to(B.dtype), B  # r d_in, d_out r

    def settings(self, config: VeraConfig) -> tuple[Any, ...]:
        return (*self.mark, config.projection_prng_key)

    def fields(self, config: VeraConfig) -> dict[str, Any]:
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _NOT_HERE}

    def as_plain(self, fields: dict[str, Any]) -> dict[str, Any]:
        own = {f.name for f in dataclasses.fields(VeraConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
        plain = {name: value for name, value in fields.items() if name not in own and name != "init_weights"}
        return plain | {"peft_type": "LORA", "lora_dropout": fields.get("vera_dropout", 0.0)}

    def files(self, config: VeraConfig) -> tuple[Table, ...]:
        return tuple(table for table in self.tables if config.save_projection or not table.shared)

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int]:
        return None, len(tensors["vera_lambda_b"])
