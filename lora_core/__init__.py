"""LoRA and QLoRA for any PyTorch model: a few verbs that work in place.

    quantize_nf4(model, skip=["classifier"])                  # QLoRA: 4-bit base weights
    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_lin", "v_lin"]))
    ...                                                       # train trainable_parameters(model)
    save_adapter(model, "out/")                               # PEFT's files
    merge_and_unload(model)                                   # plain modules again

To read the source, start at `maths/lora.py`, then `methods/lora.py`, `layers/base.py`, `layers/linear.py`, `model/inject.py`.
"""

from .bases import register_base
from .deploy.convert import convert_adapter
from .deploy.inspection import inspect_adapter
from .deploy.probe import save_probe
from .deploy.recipe import Recipe
from .deploy.stream import merge_checkpoint
from .deploy.verification import verify
from .errors import LoraError
from .files.formats.base import AdapterFormat, register_format
from .files.storage import load_adapter, save_adapter
from .layers.kinds import register_kind
from .methods.base import Method
from .methods.registry import register_method
from .methods.vera import VeraConfig
from .model.adapters import (
    ParameterCount,
    base_weight_bytes,
    count_parameters,
    delete_adapter,
    disable_adapters,
    lora_plus_groups,
    print_trainable_parameters,
    rename_adapter,
    set_adapter,
    share_dropout_masks,
    trainable_parameters,
    unload,
)
from .model.calibrate import EvaReport, LoftqReport, initialize_eva, initialize_loftq
from .model.combine import CombineReport, combine_adapters
from .model.extract import ExtractReport, extract_adapter
from .model.fast import use_fast_dropout, use_fast_linear
from .model.inject import inject
from .model.merge import MergeReport, is_merged, merge_adapter, merge_and_unload, unmerge_adapter
from .model.mixed import mixed_batch
from .model.quantize import QuantizationReport, quantize, quantize_int8, quantize_nf4
from .model.report import InjectionReport
from .model.scale import scale_adapter
from .model.sharding import packed_parameters
from .spec.config import LoraConfig

__version__ = "0.1.0"

__all__ = [
    "AdapterFormat",
    "CombineReport",
    "EvaReport",
    "ExtractReport",
    "InjectionReport",
    "LoftqReport",
    "LoraConfig",
    "LoraError",
    "MergeReport",
    "Method",
    "ParameterCount",
    "QuantizationReport",
    "Recipe",
    "VeraConfig",
    "base_weight_bytes",
    "combine_adapters",
    "convert_adapter",
    "count_parameters",
    "delete_adapter",
    "disable_adapters",
    "extract_adapter",
    "initialize_eva",
    "initialize_loftq",
    "inject",
    "inspect_adapter",
    "is_merged",
    "load_adapter",
    "lora_plus_groups",
    "merge_adapter",
    "merge_and_unload",
    "merge_checkpoint",
    "mixed_batch",
    "packed_parameters",
    "print_trainable_parameters",
    "quantize",
    "quantize_int8",
    "quantize_nf4",
    "register_base",
    "register_format",
    "register_kind",
    "register_method",
    "rename_adapter",
    "save_adapter",
    "save_probe",
    "scale_adapter",
    "set_adapter",
    "share_dropout_masks",
    "trainable_parameters",
    "unload",
    "unmerge_adapter",
    "use_fast_dropout",
    "use_fast_linear",
    "verify",
]
