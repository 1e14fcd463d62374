"""`inject`: finds the layers that a configuration targets, gives each an adapter, and freezes the rest.

    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import TASK_HEADS, LoraConfig
from .errors import ConfigError, TargetError
from .initializers import check_rank_fits
from .layers import LoraConv1D, LoraEmbedding, LoraLayer, LoraLinear, lora_class
from .layers.holder import TABLES
from .nf4 import is_quantized
from .patterns import limited
from .registry import (
    Adapter,
    adapter_parameters,
    check_new_name,
    check_not_mixing,
    copy_tensor,
    find_adapter,
    get_tensor,
    has_adapters,
    register,
    registry_of,
    unwrap,
)
from .sharding import refuse_sharded
from .targets import Targets, match_saved_modules, output_layer, select_targets

LINEAR_LAYERS = (LoraLinear, LoraConv1D)  # what target_modules="all-linear" takes


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did.

    Attributes:
        adapter_name: the adapter.
        targets: paths of the layers that carry it.
        hits: {pattern of target_modules: number of modules it matched, before exclusions}.
        modules_to_save: paths of the modules that are trained whole.
        trainable_parameters: number of values that the adapter trains.
    """

    adapter_name: str
    targets: tuple[str, ...]
    hits: Mapping[str, int]
    modules_to_save: tuple[str, ...]
    trainable_parameters: int

    def __str__(self) -> str:
        whole = f" and {', '.join(self.modules_to_save)} whole" if self.modules_to_save else ""
        return (
            f"adapter {self.adapter_name!r} on {len(self.targets)} layers{whole}: "
            f"{self.trainable_parameters:,} trainable parameters"
        )


@dataclass(frozen=True)
class Plan:
    """The modules of one model that one configuration means.

    Attributes:
        layers: the layers to adapt, and how often each pattern hit.
        saved_modules: paths of the modules to train whole.
        biases: paths of the base's biases to train.
    """

    layers: Targets
    saved_modules: tuple[str, ...]
    biases: tuple[str, ...]


def inject(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> InjectionReport:
    """Adds an adapter to `model`, in place.

    The first adapter freezes the base and becomes active; the model's outputs do not change, since B is zero. Later ones
    wait for `set_adapter`. Layers may be `nn.Linear`, 4-bit layers (`quantize_nf4`'s or transformers'), GPT-2's `Conv1D`,
    convolutions without groups, and `nn.Embedding`.

    Args:
        model: any module. It is changed, not wrapped.
        config: the adapter's settings.
        adapter_name: letters, digits, "_" and "-".

    Returns:
        A report of what was matched.

    Raises:
        TargetError: a pattern matches nothing, or a layer that can't carry an adapter.
        AdapterExistsError: the model has an adapter of that name.
        ConfigError: the name is not valid, no such start fits a rank, or biases are to be trained beside another adapter.
        MixedBatchError, ShardedError: a thread is in a mixed batch, or the model is spread over processes.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"config must be a LoraConfig, not {type(config).__name__}")
    check_new_name(model, adapter_name)
    found = plan(model, config)
    return attach(model, config, adapter_name, found)


def plan(model: nn.Module, config: LoraConfig, strict: bool = True) -> Plan:
    """What `inject` would adapt, train whole and unfreeze. Changes nothing.

    With `strict=False` patterns that match nothing are left with zero hits instead of raising.
    """
    model = unwrap(model)
    modules = base_modules(model)
    paths = list(modules)
    heads = TASK_HEADS.get(config.task_type or "", ())
    patterns = config.saved_module_patterns
    saved = match_saved_modules(patterns, optional=heads if strict else patterns, paths=paths)
    if heads and not saved and strict:
        raise TargetError(
            f"task_type {config.task_type!r}: found no head called {' or '.join(map(repr, heads))}; "
            "name the model's in modules_to_save, or leave task_type out"
        )
    head = output_layer(model)
    linear = {p for p, m in modules.items() if m is not head and issubclass(lora_class(m) or object, LINEAR_LAYERS)}
    with limited():
        targets = select_targets(config, paths, linear, saved, strict)
        _check_targets(model, modules, config, targets.paths)
    for path in saved:
        if any(is_quantized(m) for m in modules[path].modules()):
            raise TargetError(f"modules_to_save: {path!r} is 4-bit and can't be trained; name it in quantize_nf4's skip")
        if any(isinstance(m, LoraLayer) for m in modules[path].modules()):
            raise TargetError(f"modules_to_save: {path!r} carries an adapter and can't be trained whole as well")
    return Plan(targets, saved, _trained_biases(model, config, targets.paths, saved))


def _check_targets(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, targets: Sequence[str]
) -> None:
    """Raises a TargetError for a module on which an adapter could not take effect."""
    adapters = registry_of(model).adapters.values() if has_adapters(model) else ()
    whole = {path for adapter in adapters for path in adapter.saved_modules}
    for path in targets:
        if lora_class(modules[path]) is None:
            raise TargetError(
                f"target_modules: {path!r} is a {type(modules[path]).__name__}, which can't carry an adapter; "
                "target nn.Linear, 4-bit linear, Conv1D, nn.Conv1d / 2d / 3d (without groups) or nn.Embedding layers"
            )
        kind = lora_class(modules[path])
        check_rank_fits(config.init_lora_weights, path, kind.matrix_shape(modules[path]), config.rank_for(path))
        if not 0 < config.scaling_for(path) < math.inf:
            raise TargetError(f"target_modules: {path!r} would have a scaling of {config.scaling_for(path)}; check lora_alpha")
        if config.lora_bias and issubclass(kind, LoraEmbedding):
            raise TargetError(f"target_modules: {path!r} is an embedding, which has no bias; leave lora_bias out")
        if any(path == w or path.startswith(f"{w}.") for w in whole):
            raise TargetError(f"target_modules: {path!r} is trained whole by another adapter, in its modules_to_save")
        parent = modules.get(path.rpartition(".")[0], model)
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise TargetError(
                f"target_modules: {path!r} is in an nn.TransformerEncoderLayer, which in eval mode reads the weights of "
                "its layers without calling them; call torch.backends.mha.set_fastpath_enabled(False) first"
            )


def _trained_biases(model: nn.Module, config: LoraConfig, layers: Sequence[str], saved: Sequence[str]) -> tuple[str, ...]:
    """Paths of the base's biases that `config.bias` trains; "all" means every parameter of that name."""
    if config.bias == "all":
        paths = [path for path, _ in model.named_parameters(remove_duplicate=False) if path.rpartition(".")[2] == "bias"]
        return tuple(path for path in paths if not any(path.startswith(f"{s}.") for s in saved))
    if config.bias == "lora_only":
        return tuple(f"{path}.bias" for path in layers if getattr(model.get_submodule(path), "bias", None) is not None)
    return ()


def attach(model: nn.Module, config: LoraConfig, name: str, found: Plan, trainable: bool = True) -> InjectionReport:
    """Puts the adapter `name` on the modules of a plan."""
    model = unwrap(model)
    check_not_mixing(model)
    refuse_sharded(model, "a new adapter")
    if config.bias != "none" and has_adapters(model):
        others = ", ".join(map(repr, registry_of(model).adapters))
        raise ConfigError(f"bias={config.bias!r} needs the model for itself, but it holds {others}; use bias='none'")
    copies = _copies(model, found)
    for path in found.layers.paths:
        module = model.get_submodule(path)
        layer = module if isinstance(module, LoraLayer) else lora_class(module).adopt(module)
        layer.add_adapter(
            name,
            r=config.rank_for(path),
            scaling=config.scaling_for(path),
            dropout=config.lora_dropout,
            init=config.init_lora_weights,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
        )
    adapter = Adapter(config, found.layers.paths, found.saved_modules, copies, trainable)
    register(model, name, adapter)
    return describe(model, name, found.layers.hits)


def describe(model: nn.Module, name: str, hits: Mapping[str, int]) -> InjectionReport:
    """The report on an adapter that is on the model."""
    adapter = find_adapter(model, name)
    size = sum(p.numel() for p in adapter_parameters(model, name))
    return InjectionReport(name, adapter.layers, hits, adapter.saved_modules, size)


def copied_paths(model: nn.Module, found: Plan) -> list[str]:
    """Paths of the base's tensors that an adapter of this plan trains a copy of."""
    whole = [f"{m}.{key}" for m in found.saved_modules for key in model.get_submodule(m).state_dict()]
    return [*found.biases, *whole]


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the model's own modules: without the root and without what adapters added."""
    added = {
        f"{path}.{child}" for path, m in model.named_modules() if isinstance(m, LoraLayer) for child in TABLES
    }
    return {path: m for path, m in model.named_modules() if path and path not in added}


def _copies(model: nn.Module, found: Plan) -> dict[str, Tensor]:
    """Copies of the base's tensors that an adapter trains itself. Tensors that are one in the base stay one.

    Raises:
        TargetError: a tensor is shared with a module that the adapter does not train.
    """
    originals = registry_of(model).originals if has_adapters(model) else {}
    base = {path: originals.get(path, get_tensor(model, path)) for path in copied_paths(model, found)}

    copies = {id(tensor): copy_tensor(tensor) for tensor in base.values()}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in copies and path not in base:
            shared = next(p for p in base if base[p] is parameter)
            raise TargetError(
                f"{shared!r} is tied to {path!r}, which would not be trained with it; name both in modules_to_save"
            )
    return {path: copies[id(tensor)] for path, tensor in base.items()}
