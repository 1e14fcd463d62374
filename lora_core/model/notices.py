"""What a user should hear as an adapter comes onto a model, besides the report: warnings, each once."""

from __future__ import annotations

import warnings

from torch import nn

from ..layers import lora_class
from ..spec.config import ALL_LINEAR, LoraConfig
from .copies import submodule
from .left_out import HEAD
from .plan import Plan
from .registry import unwrap


def warn_of_left_out(config: LoraConfig, found: Plan) -> None:
    """Says once what `target_modules` does not adapt and might mean, but for the head, which "all-linear" never does."""
    reasons = {path: why for path, why in found.left_out.items() if why != HEAD}
    if reasons:
        path, why = next(iter(reasons.items()))
        more = f", and {len(reasons) - 1} more (see the report's left_out)" if len(reasons) > 1 else ""
        asked = '="all-linear"' if config.target_modules == ALL_LINEAR else ""
        warnings.warn(f"target_modules{asked} leaves out {path} ({why}){more}", stacklevel=7)


def warn_of_dropout(model: nn.Module, config: LoraConfig, found: Plan) -> None:
    """Says that dropout does not apply to attention, where the update is added to a weight."""
    owners = {settings.owner for path, settings in found.targets.layers.items() if settings.owner != path}
    modules = {path: submodule(unwrap(model), path) for path in owners if config.lora_dropout}
    if path := next(iter(modules), None):
        kind = lora_class(modules[path]).__name__
        warnings.warn(
            f"lora_dropout={config.lora_dropout} does not apply to {path} ({kind}): it changes weights, as in PEFT",
            stacklevel=7,
        )


def warn_of_untied(found: Plan) -> None:
    """Says that tied tensors are trained apart."""
    if found.untied:
        path, others = next(iter(found.untied.items()))
        more = f" (and {len(found.untied) - 1} more)" if len(found.untied) > 1 else ""
        warnings.warn(
            f"the base ties {path} to {', '.join(others)}, and this adapter trains it apart{more}: the tie is gone while the "
            "adapter is active, and after merging it; ensure_weight_tying=True trains one tensor for both",
            stacklevel=4,
        )


def warn_of_no_tie(config: LoraConfig, found: Plan) -> None:
    """Says that there is no tie to be kept."""
    tied = len(set(found.copies.values())) < len(found.copies) or any(rows.owner != path for path, rows in found.tokens.items())
    if config.ensure_weight_tying and not tied:
        warnings.warn("ensure_weight_tying: nothing that is trained whole is tied to anything in this model", stacklevel=7)
