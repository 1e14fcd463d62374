"""Starts of an adapter from a few batches that hold a part of the weight, which the adapter subtracts again: CorDA and LoRA-GA.

    inject(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    initialize_corda(model, batches)                  # or
    initialize_lora_ga(model, batches)

The papers take s B0 A0 off the base; here the adapter adds s (B A - B0 A0), as it does with PiSSA (see `methods/start.py`).
So the model computes what it did, the base stays as it is, in 4 bits too, and the files are plain LoRA of rank 2r for every
reader. What the starts are, with their papers, `methods/corda.py` and `methods/lora_ga.py` say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..layers import LoraLayer
from ..maths.lowrank import Factors
from ..methods.corda import check_mode, corda
from ..methods.lora_ga import check_scale, lora_ga
from ..spec.checks import check_alpha
from .calibrate import changeable, check_linear
from .registry import Adapter
from .report import FitReport
from .verbs import changes_adapters
from .watch import Loss, second_moments, weight_gradients


@changes_adapters
@torch.no_grad()
def initialize_corda(
    model: nn.Module, batches: Iterable[Any], adapter_name: str = "default", *, mode: str = "ipm"
) -> FitReport:
    """Starts an adapter of linear layers from their weights as their inputs see them, in place (CorDA, arXiv 2406.05223).

    The model runs as it is, in eval mode, without gradients, and computes the same afterwards. Vectors at places where a
    batch's `attention_mask` is zero do not count. Each layer needs d_in^2 float32 values meanwhile. Make the optimiser
    afterwards.

    Args:
        model: a model with the adapter.
        batches: what the model is called with: mappings of keyword arguments, tuples of arguments, or one argument. For a layer
            to be told well they should hold some times more vectors than its d_in.
        adapter_name: which adapter; it starts anew, whatever it was.
        mode: "ipm": the part of the weight that matters most to these inputs, of the task to be learned; "kpm": the part that
            matters least to them, of what the model is to keep.

    Returns:
        Its ranks, and which share of W C it started with, by layer.

    Raises:
        ConfigError: a layer is not linear, or smaller than its rank; `mode` is another word; there are no inputs, or they are
            all zero or not finite.
        StateError: adapters are folded into the weights now, or a thread is in a mixed batch.
    """
    check_mode(mode)
    adapter, layers = changeable(model, adapter_name)
    check_linear("CorDA", layers)
    _check_ranks("CorDA", layers, adapter_name, least=1)
    moments, vectors = second_moments(model, layers, batches)
    starts = {}
    for path, layer in layers.items():
        if not vectors[path]:
            raise ConfigError(f"{path} saw no input vectors; pass batches that reach it")
        if not 0 < moments[path].trace() < math.inf:
            raise ConfigError(f"{path} saw inputs that are all zero, or not finite; pass other batches")
        r, s = len(layer.lora_A[adapter_name]), layer.lora_scaling[adapter_name]
        starts[path] = corda(layer.as_matrix(layer.dense_weight()), moments[path], r, s, mode)
    return _restart(adapter, layers, adapter_name, starts, "corda", f"CorDA ({mode}) of the weights and inputs")


@changes_adapters
def initialize_lora_ga(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    *,
    loss: Loss | None = None,
    gamma: float = 16,
    scale: str = "stable",
) -> FitReport:
    """Starts an adapter of linear layers along the gradients of their weights, in place (LoRA-GA, arXiv 2407.05000).

    The model runs as it is, in eval mode, forwards and backwards, and computes the same afterwards. Each layer needs as many
    float32 values as its weight has meanwhile; the base may be in 4 bits. Make the optimiser afterwards.

    Args:
        model: a model with the adapter.
        batches: what the model is called with: mappings of keyword arguments, tuples of arguments, or one argument; with
            labels, if the model works out its loss itself. Each batch counts alike.
        adapter_name: which adapter; it starts anew, whatever it was.
        loss: (the model's output, the batch) to one number; None: the output's `loss`, or the output if it has none.
        gamma: a positive number; A and B are the smaller the larger it is.
        scale: "stable": the paper's; "peft": as PEFT 0.21 has it, whose B holds the gradient's singular values too.

    Returns:
        Its ranks, and which share of the gradient its directions hold, by layer.

    Raises:
        ConfigError: a layer is not linear, or smaller than twice its rank; an argument is not allowed; there are no batches,
            their loss is no number, or a gradient has fewer directions than twice the rank, or is not finite.
        StateError: adapters are folded into the weights now, or a thread is in a mixed batch.
    """
    check_alpha("gamma", gamma)
    check_scale(scale)
    adapter, layers = changeable(model, adapter_name)
    check_linear("LoRA-GA", layers)
    _check_ranks("LoRA-GA", layers, adapter_name, least=2)
    gradients = weight_gradients(model, layers, batches, loss)
    starts = {}
    for path, layer in layers.items():
        G = gradients[path]
        if not G.isfinite().all() or not G.any():
            raise ConfigError(f"the gradient of {path} is zero, or not finite; pass other batches")
        try:
            starts[path] = lora_ga(G, len(layer.lora_A[adapter_name]), gamma, scale)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return _restart(adapter, layers, adapter_name, starts, "lora_ga", "LoRA-GA of the gradients")


def _check_ranks(what: str, layers: Mapping[str, LoraLayer], name: str, least: int) -> None:
    """Raises a ConfigError if a layer is smaller than `least` times its rank."""
    for path, layer in layers.items():
        r, shape = len(layer.lora_A[name]), layer.matrix_shape(layer)
        if least * r > min(shape):
            raise ConfigError(f"{what} needs a rank of at most {min(shape) // least} on {path}, not {r}")


@torch.no_grad()
def _restart(
    adapter: Adapter, layers: Mapping[str, LoraLayer], name: str, starts: Mapping[str, Factors], init: str, source: str
) -> FitReport:
    """Gives the adapter these starts, to be subtracted again."""
    for path, layer in layers.items():
        A, B, _ = starts[path]
        layer.lora_method[name].restart(layer, name, A, B, subtracted=True)
    adapter.config = dataclasses.replace(adapter.config, init_lora_weights=init)
    ranks, energy = {path: len(A) for path, (A, _, _) in starts.items()}, {path: e for path, (_, _, e) in starts.items()}
    return FitReport(name, source, ranks, energy)
