"""`adapter_config.json`: a `LoraConfig` as PEFT writes it, both ways.

PEFT has more fields than we do (`spec/peft_fields.py`). Those that say nothing about the maths are skipped; one that would
change what the adapter computes, or that is unknown, is an error that names it. What a file leaves out has PEFT's default.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, FileFormatError
from ..methods.registry import config_classes, method_of
from ..model.registry import adapter_layers, find_adapter
from ..model.replicate import replicated
from ..spec.config import ALL_LINEAR, LoraConfig
from ..spec.patterns import END, LAYERS, WHOLE, is_name, refusal
from ..spec.peft_fields import OF_A_START, OF_PEFT, is_empty
from ..spec.starts import changes_base
from ..spec.targets import excluded_paths, shortest_names
from .reading import parse_json, read_bytes

#: Fields that say something in a call, and nothing of what an adapter computes once it is trained: whether it is trained
#: further, where it started from, and what PEFT before 0.3 did with projections that are one weight (PEFT reads no such
#: tensors any more; if it did, they would be of another shape here).
OF_THE_PAST = frozenset({"inference_mode", "init_weights", "enable_lora", "init_lora_weights", "peft_type", *OF_A_START})

#: Fields that may be missing, and not be empty.
NUMBERS = ("r", "lora_alpha")

#: Fields that came late to PEFT, left out where they say nothing: an older one then reads the file without a warning.
LATE_FIELDS = ("trainable_token_indices", "alora_invocation_tokens", "layer_replication")

#: What a file may ask for at most; the configuration of an adapter on thousands of layers takes a tenth.
MAX_BYTES = 2**20
MAX_ENTRIES = 10_000
MAX_EXPRESSIONS = 1_000

#: Values of `init_lora_weights` that leave the base alone. Of the others `started.py` says what they take.
HARMLESS_INITIALISERS = (True, "gaussian", "orthogonal", "eva", "mica")


def config_to_json(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The fields of the file for an adapter of `model`."""
    adapter = find_adapter(model, adapter_name)
    config = adapter.stored
    fields = method_of(config).fields(config)
    if (layers := replicated(model)) is not None:  # whichever of its adapters said so
        fields["layer_replication"] = layers.ranges
    fields = {name: value for name, value in fields.items() if value is not None or name not in LATE_FIELDS}
    if config.target_modules == ALL_LINEAR:  # what it stands for depends on the model, so it is written out
        parameters = {path for path, layer in adapter_layers(model, adapter) if layer.weight_path(path) == path}
        chosen = [path for path in adapter.layers if path not in parameters]
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        fields["target_modules"] = shortest_names(chosen, set(paths) - {*chosen, *excluded_paths(config, paths, strict=False)})
    if config.target_parameters is None:
        del fields["target_parameters"]  # PEFT before 0.17 does not know it
    elif config.target_modules is None:  # an empty list: PEFT would take None for the architecture's default
        fields["target_modules"] = []
    fields |= {
        "peft_type": method_of(config).peft_type,
        "inference_mode": True,
        "fan_in_fan_out": any(layer.fan_in_fan_out for _, layer in adapter_layers(model, adapter)),
        "modules_to_save": config.saved_module_patterns or None,
        "base_model_name_or_path": config.base_model_name_or_path or getattr(model, "name_or_path", None) or None,
    }
    if config.task_type is None and hasattr(getattr(model, "config", None), "model_type"):
        # So PEFT's AutoPeftModel finds the class, which a task type would say.
        fields["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return dict(sorted(fields.items()))  # and no deeper: the order of patterns has a meaning


def label_names(model: nn.Module, task_type: str | None) -> list[str] | None:
    """What a classifier's labels are called, in their order, by its configuration; None where nobody has named them."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    if task_type not in ("SEQ_CLS", "TOKEN_CLS") or not isinstance(named, dict):
        return None
    labels = [named.get(i) for i in range(len(named))]
    default = labels == [f"LABEL_{i}" for i in range(len(labels))]  # transformers' own
    return labels if all(isinstance(label, str) for label in labels) and not default else None


def config_from_json(path: Path) -> LoraConfig:
    """The configuration in the file at `path`.

    Its `init_lora_weights` is True, but where the start changed the base too.

    Raises:
        FileFormatError: it is not JSON, not a LoRA adapter's, or asks for something that is not supported.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        fields = parse_json(data)
    except ValueError as error:
        raise FileFormatError(f"{path} is not JSON: {error}") from None
    classes, kind = config_classes(), fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
    if not isinstance(fields, dict) or not isinstance(kind, str) or kind not in classes:
        readable = " and ".join(map(repr, classes))
        raise FileFormatError(f"{path}: peft_type is {kind!r}; only {readable} adapters can be read")
    form = classes[kind]
    init = fields.get("init_lora_weights") or True
    if not changes_base(init) and init not in HARMLESS_INITIALISERS:
        raise FileFormatError(f"{path}: init_lora_weights={init!r} is unknown here and in peft 0.21")
    # An empty value, of a field known or not, means that the field is not used; but for what is on if nothing is said.
    on = {f.name for f in dataclasses.fields(form) if f.default is True}
    said = {key: v for key, v in fields.items() if not is_empty(v) or key in NUMBERS or (v is False and key in on)}
    fields = {key: v for key, v in said.items() if key not in OF_THE_PAST}
    fields |= {"init_lora_weights": init} if changes_base(init) else {}
    if unknown := fields.keys() - {f.name for f in dataclasses.fields(form)} - OF_PEFT:
        listed = ", ".join(f"{name}={fields[name]!r}" for name in sorted(unknown))
        raise FileFormatError(
            f"{path} has {listed}, unknown here and in peft 0.21; if it says nothing of what the adapter computes, take it out"
        )
    if "target_parameters" in fields:
        fields.setdefault("target_modules", [])  # none, and not the architecture's default
    _check_patterns(path, fields)
    try:
        return form(**fields)
    except ConfigError as error:
        raise FileFormatError(f"{path}: {error}") from None


def _check_patterns(path: Path, fields: dict[str, Any]) -> None:
    """Raises for patterns that would take too long; `LoraConfig` sees to all else about them."""
    forms = {"target_modules": WHOLE, "exclude_modules": WHOLE, "layers_pattern": LAYERS}
    forms |= {"rank_pattern": END, "alpha_pattern": END, "modules_to_save": WHOLE, "target_parameters": WHOLE}
    for name, form in forms.items():
        value = fields.get(name)
        entries = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, dict)) else []
        if len(entries) > MAX_ENTRIES:
            raise FileFormatError(f"{path}: {name} has {len(entries):,} entries, and {MAX_ENTRIES:,} are allowed")
        if isinstance(value, list) and form == WHOLE:
            continue  # names, not patterns
        if sum(isinstance(entry, str) and not is_name(entry) for entry in entries) > MAX_EXPRESSIONS:
            raise FileFormatError(f"{path}: {name} has more than {MAX_EXPRESSIONS:,} regular expressions; use names")
        for entry in entries:
            if isinstance(entry, str) and (reason := refusal(entry, form)):
                raise FileFormatError(f"{path}: {name}: the pattern {entry!r} {reason}")
