"""Starts of an adapter that need more than the model: a few batches (EVA), or the weights from before 4 bits (LoftQ).

    inject(model, LoraConfig(r=16, target_modules=["query", "value"]))
    initialize_eva(model, batches)                    # or
    initialize_loftq(model, dense_model)              # after quantising the model

EVA (Paischl et al., arXiv 2410.07170): the rows of A are the r directions in which a layer's inputs vary most, the first
eigenvectors of their second moment x^T x; B is zero, so the model does not change. With `rho` above 1 ranks move from layers
whose inputs a few directions explain to those whose inputs take more.

LoftQ (Li et al., arXiv 2310.08659): s B A is the best approximation of rank r of what quantisation took from the weight,
W - Q, so the adapted model starts nearer to the dense one than Q alone. This is the first of the paper's alternations; the
others would change Q too, and then no file of the adapter would be right on the 4-bit base that others have.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import is_packed
from ..errors import ConfigError, LoraError, StateError
from ..layers import LoraLayer
from ..maths.lowrank import best_of_matrix
from ..methods.base import refuse_foreign_factors
from ..methods.registry import method_of
from ..progress import watched
from ..spec.checks import check_finite
from ..spec.targets import LayerPlan
from .registry import Adapter, adapter_layers, find_adapter
from .report import FitReport
from .verbs import changes_adapters

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
    adapter, layers = _changeable(model, adapter_name)
    for path, layer in layers.items():
        if not layer.is_linear:
            raise ConfigError(f"EVA is for linear layers, and {path} is a {layer.lora_base_class.__name__}; exclude it")
    ranks = {path: len(layer.lora_A[adapter_name]) for path, layer in layers.items()}
    for path, layer in layers.items():
        d_in, _ = layer.matrix_shape(layer)
        if ranks[path] > d_in:
            raise ConfigError(f"{path} reads vectors of {d_in} values, too few for a rank of {ranks[path]}; lower it")
    moments, vectors = _second_moments(model, layers, batches)
    spectra, directions = {}, {}
    for path, moment in watched(moments.items(), "directions of the inputs"):
        if (short := vectors[path]) < ranks[path]:
            raise ConfigError(f"{path} saw {short} input vectors, too few for a rank of {ranks[path]}; pass more batches")
        if not 0 < moment.trace() < math.inf:
            raise ConfigError(f"{path} saw inputs that are all zero, or not finite; pass other batches")
        most = math.floor(min(rho * ranks[path], len(moment)))
        values, bases = torch.linalg.eigh(moment.double())  # ascending
        spectra[path] = values.flip(0).clamp(min=0)[:most] / moment.trace().double()
        directions[path] = bases.flip(1)[:, :most].t()
    if rho > 1:
        ranks = _share_out(sum(ranks.values()), spectra)
    for path, layer in layers.items():
        A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        A.data = directions[path][: ranks[path]].to(A)
        B.data = B.new_zeros(len(B), ranks[path])
        for start in (layer.lora_A0, layer.lora_B0):
            if adapter_name in start:
                del start[adapter_name]
        layer.lora_method[adapter_name].settle(layer, adapter_name)
    _settle(adapter, layers, ranks, adapter_name)
    return FitReport(adapter_name, "EVA of the inputs", ranks, {p: spectra[p][:r].sum().item() for p, r in ranks.items()})


def _second_moments(
    model: nn.Module, layers: Mapping[str, LoraLayer], batches: Iterable[Any]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """{path: sum of x^T x over the layer's input vectors, (d_in, d_in)}, {path: how many those were}."""
    sizes = {path: layer.matrix_shape(layer)[0] for path, layer in layers.items()}
    moments = {path: torch.zeros(d_in, d_in, device=layers[path].weight.device) for path, d_in in sizes.items()}
    vectors = dict.fromkeys(layers, 0)
    mask: Tensor | None = None

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            fits = mask is not None and x.shape[:-1] == mask.shape
            x = x[mask.bool().to(x.device)] if fits else x.reshape(-1, x.shape[-1])
            moments[path].addmm_(x.t(), x)
            vectors[path] += len(x)

        return hook

    training = {m: m.training for m in model.modules()}
    with ExitStack() as undo:
        for path, layer in layers.items():
            undo.callback(layer.register_forward_pre_hook(watch(path)).remove)
        undo.callback(lambda: [setattr(m, "training", mode) for m, mode in training.items()])
        model.eval()
        for batch in watched(batches, "reading batches"):
            keywords = batch if isinstance(batch, Mapping) else {}
            mask = keywords.get("attention_mask")
            model(**keywords) if keywords else model(*batch if isinstance(batch, (tuple, list)) else (batch,))
    return moments, vectors


def _share_out(budget: int, spectra: Mapping[str, Tensor]) -> dict[str, int]:
    """The ranks, at least 1 each and `budget` in all, that take the directions which explain most of their inputs."""
    further = [(share, path) for path, shares in spectra.items() for share in shares[1:].tolist()]
    ranks = dict.fromkeys(spectra, 1)
    for _, path in sorted(further, key=lambda pair: -pair[0])[: budget - len(spectra)]:
        ranks[path] += 1
    return ranks


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
    layers = {path: layer for path, layer in _changeable(model, adapter_name)[1].items() if is_packed(layer)}
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
        lost = W - layer.dense_weight()
        ranks[path] = len(layer.lora_A[adapter_name])
        A, B, energy[path] = best_of_matrix(lost, ranks[path], layer.lora_scaling[adapter_name])
        own = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        own[0].data, own[1].data = (torch.zeros_like(parameter) for parameter in own)
        own[0].data[: len(A)], own[1].data[:, : len(A)] = A, B
        layer.lora_method[adapter_name].settle(layer, adapter_name)
    return FitReport(adapter_name, "LoftQ of what quantisation took", ranks, energy)


def _changeable(model: nn.Module, name: str) -> tuple[Adapter, dict[str, LoraLayer]]:
    """The adapter `name` and its layers, {path: layer}, if its tensors can be replaced now."""
    adapter = find_adapter(model, name)
    refuse_foreign_factors(method_of(adapter.config), "starting anew")
    layers = dict(adapter_layers(model, adapter))
    if adapter.scale != 1:
        raise StateError(f"adapter {name!r} is scaled by {adapter.scale:g}; scale_adapter(model, {name!r}, 1) before that")
    if any(layer.lora_folded for layer in layers.values()):
        raise StateError("adapters are folded into the weights; call unmerge_adapter(model) before starting one anew")
    return adapter, layers


def _dense_weight(tensors: Mapping[str, Tensor], path: str, layer: LoraLayer) -> Tensor:
    name = f"{path}.weight"
    if name not in tensors:
        raise StateError(f"the dense model has no {name!r}; pass the model from before it was quantised, or its tensors")
    W, (d_in, d_out) = tensors[name], layer.matrix_shape(layer)
    if W.shape != (d_out, d_in):
        raise StateError(f"the dense {name!r} is {tuple(W.shape)}, not {(d_out, d_in)}")
    return W
