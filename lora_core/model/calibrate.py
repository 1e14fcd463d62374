"""Starts of an adapter that need more than the model: a few batches (EVA), or the weights from before 4 bits (LoftQ).

    inject(model, LoraConfig(r=16, target_modules=["query", "value"]))
    initialize_eva(model, batches)                    # or
    initialize_loftq(model, dense_model)              # after quantising the model

What they are, with their papers, `methods/eva.py` and `methods/loftq.py` say; see `subtracted.py` for CorDA and LoRA-GA.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import is_packed
from ..errors import ConfigError, LoraError, StateError
from ..layers import LoraLayer
from ..methods.base import refuse_foreign_factors
from ..methods.eva import directions, share_out
from ..methods.loftq import loftq
from ..methods.registry import method_of
from ..progress import watched
from ..spec.checks import check_finite
from ..spec.targets import LayerPlan
from .registry import Adapter, adapter_layers, find_adapter
from .report import FitReport
from .verbs import changes_adapters
from .watch import second_moments

# --- EVA ------------------------------------------------------------------------------------------------------------


@changes_adapters
@torch.no_grad()
def initialize_eva(model: nn.Module, batches: Iterable[Any], adapter_name: str = "default", *, rho: float = 1.0) -> FitReport:
    """Starts an adapter of linear layers from what their inputs are, in place; make the optimiser afterwards.

    The model runs as it is, in eval mode, without gradients. Vectors at places where a batch's `attention_mask` is zero do
    not count. Each layer needs d_in^2 float32 values meanwhile.

    Args:
        model: a model with the adapter.
        batches: what the model is called with: mappings of keyword arguments, tuples of arguments, or one argument.
        adapter_name: which adapter; it starts anew, whatever it was.
        rho: 1: every layer keeps its rank. Above: a layer's rank may grow to rho times that, taken from layers where
            further directions explain less (none falls below 1); the sum and each layer's scaling stay.

    Returns:
        Its ranks, and which share of its inputs A's directions explain, by layer.

    Raises:
        ConfigError: a layer is not linear, rho is below 1, or the inputs are too few or too short for a rank, all zero or
            not finite.
        StateError: adapters are folded into the weights now, or a thread is in a mixed batch.
    """
    check_finite("rho", rho)
    if rho < 1:
        raise ConfigError(f"rho must be at least 1, not {rho!r}")
    adapter, layers = changeable(model, adapter_name)
    check_linear("EVA", layers)
    ranks = {path: len(layer.lora_A[adapter_name]) for path, layer in layers.items()}
    for path, layer in layers.items():
        d_in, _ = layer.matrix_shape(layer)
        if ranks[path] > d_in:
            raise ConfigError(f"{path} reads vectors of {d_in} values, too few for a rank of {ranks[path]}; lower it")
    moments, vectors = second_moments(model, layers, batches)
    spectra, found = {}, {}
    for path, moment in watched(moments.items(), "directions of the inputs"):
        if (short := vectors[path]) < ranks[path]:
            raise ConfigError(f"{path} saw {short} input vectors, too few for a rank of {ranks[path]}; pass more batches")
        if not 0 < moment.trace() < math.inf:
            raise ConfigError(f"{path} saw inputs that are all zero, or not finite; pass other batches")
        most = math.floor(min(rho * ranks[path], len(moment)))
        found[path], spectra[path] = directions(moment, most)
    if rho > 1:
        ranks = share_out(sum(ranks.values()), spectra)
    for path, layer in layers.items():
        A = found[path][: ranks[path]]
        B = A.new_zeros(layer.matrix_shape(layer)[1], len(A))
        layer.lora_method[adapter_name].restart(layer, adapter_name, A, B)
    _settle(adapter, layers, ranks, adapter_name)
    return FitReport(adapter_name, "EVA of the inputs", ranks, {p: spectra[p][:r].sum().item() for p, r in ranks.items()})


def _settle(adapter: Adapter, layers: Mapping[str, LoraLayer], ranks: Mapping[str, int], name: str) -> None:
    """Makes the adapter's configuration say what its layers are now."""
    config, scaling = adapter.config, {path: layer.lora_scaling[name] for path, layer in layers.items()}
    alpha = {path: scaling[path] * (math.sqrt(r) if config.use_rslora else r) for path, r in ranks.items()}
    changed = {path for path, r in ranks.items() if r != adapter.layers[path].r}
    rank_pattern = {re.escape(path): ranks[path] for path in ranks if path in changed}
    alpha_pattern = {re.escape(path): alpha[path] for path in ranks if path in changed}
    adapter.config = dataclasses.replace(
        config,
        init_lora_weights=True,
        rank_pattern=rank_pattern | dict(config.rank_pattern),  # the first hit wins, so whole paths come first
        alpha_pattern=alpha_pattern | dict(config.alpha_pattern),
    )
    adapter.layers = {path: LayerPlan.of(adapter.config, path) for path in adapter.layers}
    for path, layer in layers.items():
        layer.lora_scaling[name] = adapter.layers[path].scaling


# --- LoftQ ----------------------------------------------------------------------------------------------------------


@changes_adapters
@torch.no_grad()
def initialize_loftq(model: nn.Module, dense: nn.Module | Mapping[str, Tensor], adapter_name: str = "default") -> FitReport:
    """Starts an adapter on 4-bit layers from what quantisation took from them, in place.

    Args:
        model: a model with the adapter; it is changed.
        dense: the model from before quantisation, or its tensors by name (a state dict, a safetensors file's). Only the
            weights of adapted 4-bit layers are read, one at a time.
        adapter_name: which adapter. On its layers that are not 4-bit it stays as it is.

    Returns:
        Which share of what quantisation took it holds, by layer.

    Raises:
        StateError: no layer of the adapter is 4-bit, or a dense weight is missing or of another shape.
        LoraError: the adapter subtracts its start from the weight (PiSSA, OLoRA), so it can't start anew.
        StateError: adapters are folded into the weights now, or a thread is in a mixed batch.
    """
    layers = {path: layer for path, layer in changeable(model, adapter_name)[1].items() if is_packed(layer)}
    if not layers:
        raise StateError(f"adapter {adapter_name!r} is on no quantised layer; quantise the model before inject")
    tensors = dense.state_dict(keep_vars=True) if isinstance(dense, nn.Module) else dense
    for path, layer in layers.items():
        _dense_weight(tensors, path, layer)
        if adapter_name in layer.lora_A0:
            raise LoraError(f"adapter {adapter_name!r} starts from the weight of {path}; inject it with init_lora_weights=True")
    ranks, energy = {}, {}
    for path, layer in watched(layers.items(), "what packing lost"):
        W = _dense_weight(tensors, path, layer).detach().to(layer.weight.device, torch.float32)
        Q, ranks[path] = layer.dense_weight(), len(layer.lora_A[adapter_name])
        A, B, energy[path] = loftq(W, Q, ranks[path], layer.lora_scaling[adapter_name])
        zeros = ranks[path] - len(A)  # of a rank that the weight does not have
        A, B = nn.functional.pad(A, (0, 0, 0, zeros)), nn.functional.pad(B, (0, zeros))
        layer.lora_method[adapter_name].restart(layer, adapter_name, A, B)
    return FitReport(adapter_name, "LoftQ of what quantisation took", ranks, energy)


def changeable(model: nn.Module, name: str) -> tuple[Adapter, dict[str, LoraLayer]]:
    """The adapter `name` and its layers, {path: layer}, if its tensors can be replaced now."""
    adapter = find_adapter(model, name)
    refuse_foreign_factors(method_of(adapter.config), "starting anew")
    layers = dict(adapter_layers(model, adapter))
    if adapter.scale != 1:
        raise StateError(f"adapter {name!r} is scaled by {adapter.scale:g}; scale_adapter(model, {name!r}, 1) before that")
    if any(layer.lora_folded for layer in layers.values()):
        raise StateError("adapters are folded into the weights; call unmerge_adapter(model) before starting one anew")
    return adapter, layers


def check_linear(what: str, layers: Mapping[str, LoraLayer]) -> None:
    """Raises a ConfigError if a layer is not linear."""
    for path, layer in layers.items():
        if not layer.is_linear:
            raise ConfigError(f"{what} is for linear layers, and {path} is a {layer.lora_base_class.__name__}; exclude it")


def _dense_weight(tensors: Mapping[str, Tensor], path: str, layer: LoraLayer) -> Tensor:
    name = f"{path}.weight"
    if name not in tensors:
        raise StateError(f"the dense model has no {name!r}; pass the model from before it was quantised, or its tensors")
    W, (d_in, d_out) = tensors[name], layer.matrix_shape(layer)
    if W.shape != (d_out, d_in):
        raise StateError(f"the dense {name!r} is {tuple(W.shape)}, not {(d_out, d_in)}")
    return W
