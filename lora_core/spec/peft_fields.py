"""Fields that PEFT's configurations have and ours have not: which say nothing here, and which ask for what is not here.

    LoraConfig(r=8, fan_in_fan_out=True, revision="main")      # both are taken, and dropped
    LoraConfig(r=8, use_qalora=True)                           # refused by name, with the reason

Any of them may stand there with an empty value, which asks for nothing: None, False, "" or an empty collection.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

from ..errors import ConfigError

#: Where an adapter comes from, what a layer knows of itself, how a library goes about it: nothing that an adapter computes.
WITHOUT_MEANING = frozenset(
    {
        "auto_mapping",
        "fan_in_fan_out",  # whether a weight is stored transposed: its layer's class says so
        "megatron_core",
        "merge_weights",  # of PEFT before 0.3: whether eval() folds the adapter in
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)

#: Settings of a start, without which they say nothing.
OF_A_START = {"eva_config": "eva", "corda_config": "corda", "loftq_config": "loftq", "lora_ga_config": "lora_ga"}

#: What PEFT has and this engine has not, and why.
NOT_HERE = {
    "arrow_config": "Arrow, which picks adapters for each token by their singular vectors; name the adapters of each row in "
    "mixed_batch",
    "enable_lora": "the split projections of PEFT before 0.3; PEFT reads no such tensors any more; train anew",
    "kasa_config": "KaSA, which takes small singular values off the base: the adapter alone is not what was trained",
    "megatron_config": "the layers of Megatron-LM, which hold a part of a weight in each process; use FSDP2",
    "monteclora_config": "MonteCLoRA, whose A is drawn anew in each step of training",
    "use_bdlora": "BD-LoRA, whose A or B is block diagonal; use plain LoRA",
    "use_qalora": "QA-LoRA, which averages a layer's input over groups; use plain LoRA on the quantised base",
    "velora_config": "VeLoRA, whose gradients are those of compressed activations; use plain LoRA",
}

#: Fields that may have one value.
ONLY = {"init_weights": True}

#: All that PEFT has besides.
OF_PEFT = WITHOUT_MEANING | OF_A_START.keys() | ONLY.keys() | NOT_HERE.keys()


class TakesFieldsOfPeft(type):
    """The class of a configuration class: makes an object of what is known, and answers for all else."""

    peft_type: str

    def __call__(cls, /, *args: Any, **fields: Any) -> Any:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]  # its classes are dataclasses
        kind = plain(fields.pop("peft_type", None))
        if kind not in (None, cls.peft_type):
            raise ConfigError(f"peft_type is {kind!r}, and {cls.__name__} is for {cls.peft_type!r}; leave it out")
        return super().__call__(*args, **own_fields(cls.__name__, known, fields))


def own_fields(form: str, known: Collection[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `fields` that are `known`.

    Args:
        form: the name of the configuration, for messages.
        known: the names of its own fields.
        fields: {name: value}.

    Raises:
        ConfigError: another one asks for something, or is not known to PEFT either.
    """
    for name, value in fields.items():
        if name in known:
            continue
        if name in NOT_HERE and not is_empty(value):
            raise ConfigError(f"{name}={value!r} asks for {NOT_HERE[name]}")
        if name in OF_A_START and not is_empty(value) and fields.get("init_lora_weights") != OF_A_START[name]:
            warnings.warn(f"{name} is not used: it is for init_lora_weights={OF_A_START[name]!r}", stacklevel=3)
        if name in ONLY and value is not ONLY[name]:
            raise ConfigError(f"{name} must be {ONLY[name]}, not {value!r}; leave it out")
        if name not in OF_PEFT:
            raise ConfigError(f"{form} has no field {name!r} (given {value!r}); {_hint(name, known)}")
    return {name: plain(value) for name, value in fields.items() if name in known}


def plain(value: Any) -> Any:
    """The value of an enum's member (PEFT's TaskType and PeftType); anything else as it is."""
    return value.value if isinstance(value, Enum) else value


def is_empty(value: Any) -> bool:
    """Whether a field with this value asks for nothing."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, set, dict)) and not value)


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
