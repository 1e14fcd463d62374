"""The layers that a configuration means when it does not name them: by the model's architecture."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import nn

from ..errors import TargetError
from ..spec.architectures import DEFAULT_TARGETS
from ..spec.config import ALL_LINEAR, LoraConfig
from ..spec.targets import match_patterns
from .plan import base_modules
from .registry import unwrap


class Settled(NamedTuple):
    """A configuration that says which layers are meant.

    Attributes:
        config: the settings.
        architecture: the `model_type` whose layers were taken; None: the configuration names them.
    """

    config: LoraConfig
    architecture: str | None = None


def settle_targets(model: nn.Module, config: LoraConfig) -> Settled:
    """`config` with the `target_modules` of the model's architecture, if it has none of its own.

    Of the architecture's names those that the model has are taken: BLIP-2 is on top of an OPT, or of a T5. Where
    `target_parameters` are named, these are all that is meant, as in PEFT.

    Raises:
        TargetError: there are none, or none are known.
    """
    if config.target_modules is not None:
        return Settled(config)
    if config.target_parameters:
        return Settled(dataclasses.replace(config, target_modules=()))
    kind = getattr(getattr(unwrap(model), "config", None), "model_type", None)
    remedy = f"name the layers to adapt, or pass {ALL_LINEAR!r}"
    if kind not in DEFAULT_TARGETS:
        of = f"the architecture {kind!r} has no" if kind else "this model says no architecture (config.model_type) that has a"
        raise TargetError(f"target_modules is not set, and {of} default for it; {remedy}")
    names = DEFAULT_TARGETS[kind]
    hits = match_patterns("target_modules", names, list(base_modules(unwrap(model))), strict=False)
    found = tuple(name for name, paths in hits.items() if paths)
    if not found:
        raise TargetError(
            f"target_modules is not set, and this model has none of the layers that are usual for {kind!r} "
            f"({', '.join(hits)}); {remedy}"
        )
    return Settled(dataclasses.replace(config, target_modules=names if isinstance(names, str) else found), kind)
