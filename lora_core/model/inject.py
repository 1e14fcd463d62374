"""`inject`: gives an adapter to each layer that a configuration means, and freezes the rest.

    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import LoraLayer, lora_class
from ..layers.holder import share
from ..methods.registry import configuration, method_of
from ..spec.config import LoraConfig
from .copies import copy_tensor, original_of, submodule
from .defaults import settle_targets
from .notices import warn_of_dropout, warn_of_left_out, warn_of_no_tie, warn_of_untied
from .optimizers import watch_optimizers
from .plan import Plan, plan
from .registry import Adapter, adapter_parameters, check_new_name, find_adapter, has_adapters, register, registry_of, unwrap
from .sharding import refuse_sharded
from .verbs import changes_adapters
from .wide import SIXTEEN_BITS


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` did.

    Attributes:
        adapter_name: the adapter.
        targets: paths of the layers, and of the parameters, that carry it.
        hits: {pattern of target_modules or target_parameters: how many it matched, before exclusions}.
        modules_to_save: paths of the modules that are trained whole.
        trainable_parameters: number of values that the adapter trains.
        trained: whether it does; else they wait (`load_adapter` without `trainable=True`, `inference_mode`).
        untied: {path of a tensor that it trains: paths that the base ties it to, which keep their own}.
        left_out: {path of what `target_modules` might mean and passed over, or of what a file has no tensors for: why}.
        architecture: the `model_type` whose usual layers were taken; None: the configuration names its layers.
        moved: {path of a module: what the file that was loaded calls it}, where that is another name.
        tool, other_parts: whose format a file that was loaded has, if not PEFT's, and what it holds for other models.
    """

    adapter_name: str
    targets: tuple[str, ...]
    hits: Mapping[str, int]
    modules_to_save: tuple[str, ...]
    trainable_parameters: int
    untied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None
    moved: Mapping[str, str] = field(default_factory=dict)
    trained: bool = True
    tool: str | None = None
    other_parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        whole = f" and {', '.join(self.modules_to_save)} whole" if self.modules_to_save else ""
        untied = f"; trained apart from what it is tied to: {', '.join(self.untied)}" if self.untied else ""
        usual = f"; target_modules: {', '.join(self.hits)}, as usual for {self.architecture}" if self.architecture else ""
        moved = f"; {len(self.moved)} modules have other names in the file" if self.moved else ""
        what = "trainable parameters" if self.trained else "parameters, which are not trained (trainable=True trains them)"
        left = f"; left out: {len(self.left_out)} ({', '.join(self.left_out)})" if self.left_out else ""
        others = f" (it also holds {', '.join(self.other_parts)})" if self.other_parts else ""
        tool = f"; read from a file of {self.tool}{others}" if self.tool else ""
        return (
            f"adapter {self.adapter_name!r} on {len(self.targets)} layers{whole}: "
            f"{self.trainable_parameters:,} {what}{usual}{moved}{untied}{left}{tool}"
        )


@changes_adapters
def inject(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> InjectionReport:
    """Adds an adapter to `model`, in place.

    The first adapter freezes the base and becomes active; the model's outputs do not change, since B is zero. Later ones
    wait for `set_adapter`. Layers may be `nn.Linear`, quantised ones (made here or by transformers), GPT-2's `Conv1D`,
    convolutions, `nn.Embedding`, and `nn.MultiheadAttention`, both of whose weights are then adapted.

    Args:
        model: any module. It is changed, not wrapped.
        config: the adapter's settings; an object of PEFT's is taken for what it says.
        adapter_name: letters, digits, "_" and "-".

    Returns:
        A report of what was matched.

    Raises:
        TargetError: a pattern matches nothing, or a layer that can't carry an adapter.
        AdapterNameError: the model has an adapter of that name.
        ConfigError: the name is not valid, no such start fits a rank, or biases are to be trained beside another adapter.
        StateError: a thread is in a mixed batch, or in `disable_adapters`; the model is spread over processes, or a
            module to be trained whole is offloaded.
    """
    config, architecture = settle_targets(model, configuration(config))
    check_new_name(model, adapter_name)
    found = plan(model, config)
    warn_of_untied(found)
    warn_of_left_out(config, found)
    warn_of_dropout(model, config, found)
    warn_of_no_tie(config, found)
    report = attach(model, config, adapter_name, found, trainable=not config.inference_mode)
    return dataclasses.replace(report, architecture=architecture)


def attach(model: nn.Module, config: LoraConfig, name: str, found: Plan, trainable: bool = True) -> InjectionReport:
    """Puts the adapter `name` on the modules of a plan."""
    model = unwrap(model)
    refuse_sharded(model, "a new adapter")
    if config.bias != "none" and has_adapters(model):
        others = ", ".join(map(repr, registry_of(model).adapters))
        raise ConfigError(f"bias={config.bias!r} needs the model for itself, but it holds {others}; use bias='none'")
    method, modules = method_of(config), {path: submodule(model, path) for path in found.layers.paths}
    layers = {path: m if isinstance(m, LoraLayer) else lora_class(m).adopt(m) for path, m in modules.items()}
    shared = share(method.shared(config, [layer.matrix_shape(layer) for layer in layers.values()]), layers.values())
    for path, layer in layers.items():
        layer.add_adapter(
            name,
            r=config.rank_for(found.layers.owner(path)),
            scaling=layer.scale * config.scaling_for(found.layers.owner(path)),
            dropout=config.lora_dropout,
            init=method.start_of(config),
            method=method,
            shared=shared[layer],
        )
    adapter = Adapter(config, found.layers.paths, found.saved_modules, tuple(found.copies), tuple(found.untied), trainable)
    register(model, name, adapter, _copies(model, found))
    if trainable:
        watch_optimizers(model)
    return describe(model, name, found)


def describe(model: nn.Module, name: str, found: Plan) -> InjectionReport:
    """The report on an adapter that is on the model, by the plan that it has."""
    size = sum(p.numel() for p in adapter_parameters(model, name))
    layers = found.layers
    report = InjectionReport(name, layers.paths, layers.hits, found.saved_modules, size, found.untied, found.left_out)
    return dataclasses.replace(report, trained=find_adapter(model, name).trainable)


def _copies(model: nn.Module, found: Plan) -> dict[str, Tensor]:
    """Copies of the base's tensors that an adapter trains itself: parameters in float32 beside 16-bit ones."""
    copies: dict[object, Tensor] = {}
    for path, group in found.copies.items():
        if group not in copies:
            own = original_of(model, path)
            wide = isinstance(own, nn.Parameter) and own.dtype in SIXTEEN_BITS
            copies[group] = copy_tensor(own, torch.float32 if wide else None)
    return {path: copies[group] for path, group in found.copies.items()}
