from .bases import register_base as register_base
from .deploy.convert import convert_adapter as convert_adapter
from .deploy.inspection import inspect_adapter as inspect_adapter
from .deploy.probe import save_probe as save_probe
from .deploy.recipe import Recipe as Recipe
from .deploy.serving import verify_server as verify_server
from .deploy.stream import merge_checkpoint as merge_checkpoint
from .deploy.verification import verify as verify
from .errors import LoraError as LoraError
from .files.formats.base import AdapterFormat as AdapterFormat, register_format as register_format
from .files.storage import load_adapter as load_adapter, save_adapter as save_adapter
from .layers.kinds import register_kind as register_kind
from .methods.base import Method as Method
from .methods.registry import register_method as register_method
from .methods.vera import VeraConfig as VeraConfig
from .model.adapters import (
    ParameterCount as ParameterCount,
    base_weight_bytes as base_weight_bytes,
    count_parameters as count_parameters,
    delete_adapter as delete_adapter,
    disable_adapters as disable_adapters,
    lora_plus_groups as lora_plus_groups,
    print_trainable_parameters as print_trainable_parameters,
    rename_adapter as rename_adapter,
    set_adapter as set_adapter,
    share_dropout_masks as share_dropout_masks,
    trainable_parameters as trainable_parameters,
    unload as unload,
)
from .model.calibrate import (
    initialize_eva as initialize_eva,
    initialize_loftq as initialize_loftq,
)
from .model.combine import combine_adapters as combine_adapters
from .model.extract import extract_adapter as extract_adapter
from .model.fast import use_fast_dropout as use_fast_dropout, use_fast_linear as use_fast_linear
from .model.inject import inject as inject
from .model.merge import (
    MergeReport as MergeReport,
    is_merged as is_merged,
    merge_adapter as merge_adapter,
    merge_and_unload as merge_and_unload,
    unmerge_adapter as unmerge_adapter,
)
from .model.mixed import mixed_batch as mixed_batch
from .model.quantize import (
    QuantizationReport as QuantizationReport,
    quantize as quantize,
    quantize_int8 as quantize_int8,
    quantize_nf4 as quantize_nf4,
)
from .model.report import FitReport as FitReport, InjectionReport as InjectionReport
from .model.scale import scale_adapter as scale_adapter
from .model.sharding import packed_parameters as packed_parameters
from .model.subtracted import (
    initialize_corda as initialize_corda,
    initialize_lora_ga as initialize_lora_ga,
)
from .spec.config import LoraConfig as LoraConfig

__version__: str
