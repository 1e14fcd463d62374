"""LoRA and QLoRA for any PyTorch model: a few verbs that work in place.

    quantize_nf4(model, skip=["classifier"])                  # QLoRA: 4-bit base weights
    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_lin", "v_lin"]))
    ...                                                       # train trainable_parameters(model)
    save_adapter(model, "out/")                               # PEFT's files
    merge_and_unload(model)                                   # plain modules again

To read the source, start at `maths/lora.py`, then `methods/lora.py`, `layers/base.py`, `layers/linear.py`, `model/inject.py`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: {module: the public names that it has}. Each is imported when it is first asked for: torch takes a second, and a command's
#: --help none. `__init__.pyi` says the same to type checkers and editors.
_PUBLIC = {
    "bases": "register_base",
    "deploy.convert": "convert_adapter",
    "deploy.inspection": "inspect_adapter",
    "deploy.probe": "save_probe",
    "deploy.recipe": "Recipe",
    "deploy.serving": "verify_server",
    "deploy.stream": "merge_checkpoint",
    "deploy.verification": "verify",
    "errors": "LoraError",
    "files.formats.base": "AdapterFormat register_format",
    "files.storage": "load_adapter save_adapter",
    "layers.kinds": "register_kind",
    "methods.base": "Method",
    "methods.registry": "register_method",
    "methods.vera": "VeraConfig",
    "model.adapters": (
        "ParameterCount base_weight_bytes count_parameters delete_adapter disable_adapters lora_plus_groups "
        "print_trainable_parameters rename_adapter set_adapter share_dropout_masks trainable_parameters unload"
    ),
    "model.calibrate": "initialize_eva initialize_loftq",
    "model.combine": "combine_adapters",
    "model.extract": "extract_adapter",
    "model.fast": "use_fast_dropout use_fast_linear",
    "model.inject": "inject",
    "model.merge": "MergeReport is_merged merge_adapter merge_and_unload unmerge_adapter",
    "model.mixed": "mixed_batch",
    "model.quantize": "QuantizationReport quantize quantize_int8 quantize_nf4",
    "model.report": "FitReport InjectionReport",
    "model.scale": "scale_adapter",
    "model.sharding": "packed_parameters",
    "model.subtracted": "initialize_corda initialize_lora_ga",
    "spec.config": "LoraConfig",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys())
