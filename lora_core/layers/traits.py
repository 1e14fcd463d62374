"""`Traits`: what others ask of a kind of layer besides its maths, so that nobody asks which kind it is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..spec.config import LoraConfig


class Traits:
    """The answers of most kinds. A kind that differs overrides them."""

    #: Whether it multiplies the vectors that it reads, so that "all-linear" means it, and siblings may share a dropout mask.
    is_linear = False
    #: Whether an adapter may have a bias of B there.
    takes_bias = True
    #: Whether it carries a product of any A and B: another rank, and factors that come from outside.
    any_factors = True
    #: What the scaling of a configuration is multiplied by there.
    scale = 1
    #: Whether rows of a batch may have different adapters there.
    mixes = True
    #: Whether there is an input that an adapter's dropout acts on.
    drops = True
    #: The parameter that is its weight.
    weight_name = "weight"
    #: The children that carry an adapter whenever it does, of the same rank and scaling.
    parts: tuple[str, ...] = ()
    #: Which dimension of its weight, as a matrix (d_out, d_in), may be the tokens of a vocabulary; None: neither.
    token_dim: int | None = None
    #: Whether PEFT's configuration says `fan_in_fan_out` for it: a linear layer whose weight is (d_in, d_out).
    fan_in_fan_out = False
    #: Whether PEFT calls its tensors as those of an embedding.
    embedding_keys = False

    @classmethod
    def file_path(cls, path: str, layer: nn.Module, layers: Iterable[str]) -> str:
        """How PEFT calls in its files the layer at `path`, beside all `layers` of the adapter."""
        return path

    @classmethod
    def weight_path(cls, path: str) -> str:
        """The path of the parameter that is the weight of the layer at `path`."""
        return f"{path}.{cls.weight_name}"

    @classmethod
    def caller(cls, layer: nn.Module) -> nn.Module:
        """The module whose forward computes with the weight."""
        return layer

    @classmethod
    def matrices(cls, layer: nn.Module) -> int:
        """How many matrices of `matrix_shape` the weight is; A and B stand in the files for all of them."""
        return 1

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Why this layer can't carry adapters, although others of its class can; None: it can."""
        return None

    @classmethod
    def unsupported(cls, layer: nn.Module, config: LoraConfig, r: int) -> str | None:
        """Which part of a configuration it can't do, with rank r, and what to do instead; None: it can do all."""
        return None
