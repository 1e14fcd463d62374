"""Where an adapter may start, by name: what `LoraConfig.init_lora_weights` may be; `methods/start.py` says what they mean.

Example:

    starts_from_weight("pissa")     # worked out from the weight alone, when the adapter is made
    starts_later("corda")           # from data, or from a dense base, by a verb that is called afterwards
    subtracts_start("corda")        # A and B hold a part of the weight, which the adapter subtracts again
"""

from __future__ import annotations

import re
from typing import Any

INITIALIZERS = ("gaussian", "orthogonal", "pissa", "olora")
#: Those that start from the weight (PiSSA with a randomised SVD of N iterations is "pissa_niter_N").
FROM_WEIGHT = re.compile(r"pissa(_niter_[1-9]\d*)?|olora")
#: {what starts from more than the weight: the verb that starts it so}.
AFTERWARDS = {
    "eva": "initialize_eva(model, batches)",
    "loftq": "initialize_loftq(model, dense_weights)",
    "corda": "initialize_corda(model, batches)",
    "lora_ga": "initialize_lora_ga(model, batches)",
}
#: Those for which PEFT takes from the base what A and B start with, or quantises it.
CHANGE_BASE = ("loftq", "corda", "lora_ga")
#: Those after which an adapter here subtracts what it started from; its configuration then has that name.
SUBTRACTED = ("corda", "lora_ga")


def starts_from_weight(init: Any) -> bool:
    """Whether A and B start from the weight that they are for, and from nothing else."""
    return isinstance(init, str) and FROM_WEIGHT.fullmatch(init) is not None


def starts_later(init: Any) -> bool:
    """Whether A and B start from more than the weight."""
    return isinstance(init, str) and init in AFTERWARDS


def subtracts_start(init: Any) -> bool:
    """Whether an adapter that started so subtracts its start, and so is plain LoRA of twice the rank in a file."""
    return starts_from_weight(init) or (isinstance(init, str) and init in SUBTRACTED)


def changes_base(init: Any) -> bool:
    """Whether an adapter of PEFT's that started so belongs to another base than it was made on."""
    return starts_from_weight(init) or (isinstance(init, str) and init in CHANGE_BASE)
