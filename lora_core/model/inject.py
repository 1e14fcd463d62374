"""`inject`: gives an adapter to each layer that a configuration means, and freezes the rest.

Example:

    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import LoraLayer, lora_class
from ..layers.holder import share
from ..methods.registry import TOKENS, configuration, method_of
from ..spec.config import LoraConfig
from ..spec.starts import AFTERWARDS, starts_later
from .copies import copy_tensor, original_of, submodule
from .defaults import settle_targets
from .lifecycle import register
from .notices import warn_of_dropout, warn_of_left_out, warn_of_no_tie, warn_of_untied
from .optimizers import watch_optimizers
from .plan import Plan, plan
from .registry import Adapter, check_new_name, has_adapters, registry_of, unwrap
from .replicate import replicate_layers
from .report import InjectionReport, describe
from .sharding import refuse_sharded
from .verbs import changes_adapters
from .wide import SIXTEEN_BITS


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
        ConfigError: the name is not valid, no such start fits a rank, or biases are to be trained, or layers replicated, beside
            another adapter.
        StateError: a thread is in a mixed batch, or in `disable_adapters`; the model is spread over processes, or a
            module to be trained whole is offloaded.
    """
    config = configuration(config)
    replicate_layers(model, config, registry_of(model).adapters if has_adapters(model) else ())
    config, architecture = settle_targets(model, config)
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
    if starts_later(init := config.init_lora_weights):
        raise ConfigError(f"init_lora_weights={init!r} needs more than the model: leave it True, then {AFTERWARDS[init]}")
    if config.bias != "none" and has_adapters(model):
        others = ", ".join(map(repr, registry_of(model).adapters))
        raise ConfigError(f"bias={config.bias!r} needs the model for itself, but it holds {others}; use bias='none'")
    method, modules = method_of(config), {path: submodule(model, path) for path in found.targets.paths}
    layers = {path: m if isinstance(m, LoraLayer) else lora_class(m).adopt(m) for path, m in modules.items()}
    shared = share(method.shared(config, [layer.matrix_shape(layer) for layer in layers.values()]), layers.values())
    for path, layer in layers.items():
        settings = found.targets.layers[path]
        layer.add_adapter(
            name,
            r=settings.r,
            scaling=layer.scale * settings.scaling,
            dropout=config.lora_dropout,
            init=method.start_of(config),
            method=method,
            shared=shared[layer],
        )
    _add_tokens(model, name, found)
    adapter = Adapter(
        config,
        found.targets.layers,
        found.saved_modules,
        tuple(found.copies),
        tuple(found.untied),
        found.kept,
        tuple(found.tokens),
        trainable,
    )
    register(model, name, adapter, _copies(model, found))
    if trainable:
        watch_optimizers(model)
    return describe(model, name, found)


def _add_tokens(model: nn.Module, name: str, found: Plan) -> None:
    """Puts the trained rows of the adapter `name` on their layers; what is tied holds one parameter."""
    for path, rows in found.tokens.items():
        module = submodule(model, path)
        layer = module if isinstance(module, LoraLayer) else lora_class(module).adopt(module)
        layer.add_adapter(name, r=len(rows.ids), scaling=1.0, dropout=0.0, init=rows.ids, method=TOKENS)
        layer.lora_tokens[name] = submodule(model, rows.owner).lora_tokens[name]


def _copies(model: nn.Module, found: Plan) -> dict[str, Tensor]:
    """Copies of the base's tensors that an adapter trains itself: parameters in float32 beside 16-bit ones."""
    copies: dict[object, Tensor] = {}
    for path, group in found.copies.items():
        if group not in copies:
            own = original_of(model, path)
            wide = isinstance(own, nn.Parameter) and own.dtype in SIXTEEN_BITS and path not in found.kept
            copies[group] = copy_tensor(own, torch.float32 if wide else None)
    return {path: copies[group] for path, group in found.copies.items()}
