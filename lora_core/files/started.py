"""Adapters of PEFT's whose start changed the base too: what they load onto.

    "pissa", "olora"       took from the base what follows from it: worked out again, wherever the base is (`methods/start.py`)
    "corda", "lora_ga"     took from it what follows from data: the file does not say what that was
    "loftq"                quantised it: the base is the quantised one

PEFT works out the first again as it loads; of CorDA it needs the data's statistics; it loads LoRA-GA as if nothing had been
taken, which is right on the base that training left alone; and it quantises the base again for LoftQ, on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..bases import OF_LOFTQ, base_for, base_of, is_on_grid
from ..bases.base import Format
from ..bases.forwards import stored_weight
from ..errors import WrongBaseError
from ..model.copies import submodule
from ..spec.config import LoraConfig
from ..spec.starts import starts_from_weight, starts_later
from .adapter import CONFIG_FILE
from .config import MAX_BYTES
from .fingerprint import unfolded
from .reading import read_object


def other_base(init: object) -> str:
    """Why an adapter with this start is no adapter of the base that it was made on, and what to do without a model."""
    if starts_from_weight(init):
        remedy = "make it plain LoRA, by convert --plain --base BASE"
    elif init == "loftq":
        remedy = "if the base is the quantised one, set it to true in adapter_config.json"
    else:
        remedy = "make it plain LoRA, by convert --plain --initial START, the adapter as it was when it started"
    return f"init_lora_weights={init!r} changed the base too, so the adapter alone is not the model that was trained; {remedy}"


def settle_start(
    directory: str | os.PathLike, config: LoraConfig, root: nn.Module, paths: Iterable[str], strict: bool
) -> LoraConfig:
    """The configuration as the adapter goes onto these layers: where they are the changed ones, A and B are loaded as they are.

    Args:
        directory: the adapter's; of LoftQ its file says how the base was quantised.
        config: what the file says.
        root: the model.
        paths: of the layers that it is for, adapted or not.
        strict: raise if this base is not known to be the changed one; else warn.

    Raises:
        WrongBaseError: it is not.
    """
    init = config.init_lora_weights
    if not starts_later(init):
        return config
    reason: str | None = other_base(init)
    if init == "loftq":
        settings = read_object(Path(directory) / CONFIG_FILE, MAX_BYTES).get("loftq_config")
        reason = _why_not_quantised(settings, {path: submodule(root, path) for path in paths})
    if reason and strict:
        raise WrongBaseError(f"{directory}: {reason}; strict=False takes this base for the changed one")
    if reason:
        warnings.warn(f"{directory}: init_lora_weights={init!r} changed the base; this one is taken for that", stacklevel=7)
    return dataclasses.replace(config, init_lora_weights=True)


def _why_not_quantised(settings: Any, layers: Mapping[str, nn.Module]) -> str | None:
    """Why these layers are not what LoftQ has quantised; None: they are."""
    said = settings if isinstance(settings, dict) else {}
    bits, rounds = said.get("loftq_bits", 4), said.get("loftq_iter", 1)
    if not isinstance(bits, int) or bits not in OF_LOFTQ:
        return f"loftq_bits is {bits!r}; LoftQ quantises to {' or '.join(map(str, OF_LOFTQ))} bits"
    form, call = OF_LOFTQ[bits]
    once = rounds == 1  # else it quantised the weight without the adapter of the round before
    other = next((path for path, layer in layers.items() if not _holds(unfolded(layer), form, once)), None)
    if other is None:
        return None
    here = f"call {call} on the base first, or load it onto" if once else "load it onto"
    return (
        f"init_lora_weights='loftq' quantised the base too, to {form} in {rounds} rounds, and {other} does not hold such a "
        f"weight; {here} the base that PEFT has left (get_base_model().save_pretrained)"
    )


def _holds(layer: Any, form: Format, packed: bool) -> bool:
    """Whether a layer's weight is packed in this format, if that is allowed, or is dense and holds values of it."""
    base = base_of(layer)
    if base.packed:
        return packed and base is base_for(form) and base.format_of(layer) == form
    if getattr(layer, "weight", None) is None:  # of attention, or of a parameter: LoftQ has none of these
        return False
    weight = stored_weight(layer)
    return weight.dim() == 2 and is_on_grid(weight, form)
