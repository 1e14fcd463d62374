"""Several adapters into one, by their updates: D_i = s_i B_i A_i, each times a weight w_i.

    combine_adapters(model, ["film", "food"], [0.7, 0.3], "both")              # 0.7 D_film + 0.3 D_food
    combine_adapters(model, ["film", "food"], [1, 1], "both", "ties", density=0.2)

    cat, linear      sum of w_i D_i, exactly
    svd              the best approximation of it of rank r
    PRUNING          TIES, DARE and others of `maths/pruning.py`: value by value on the dense w_i D_i; the best approximation
                     of that

All are defined on the updates themselves. PEFT's methods of these names, but for "cat" and "svd", work on A and on B apart:
the product of two sums has terms B_i A_j that belong to no adapter.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..layers import LoraLayer
from ..maths.lowrank import best_of_matrix, best_of_product
from ..maths.pruning import PRUNING, Rule
from ..progress import watched
from ..spec.config import LoraConfig
from ..spec.targets import LayerPlan, Targets, match_patterns
from .combinable import check_records, check_settings, weights_of
from .copies import original_of
from .inject import attach
from .plan import base_modules, plan_copies
from .registry import Adapter, adapter_layers, check_new_name, copies_of, find_adapter, unwrap
from .report import FitReport
from .verbs import changes_adapters


@dataclass(frozen=True)
class _Part:
    """What the new adapter gets on one layer: A, (r, d_in); B, (d_out, r); a bias, (d_out,), or None; the energy kept."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    energy: float


@changes_adapters
def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    method: str = "linear",
    *,
    r: int | None = None,
    density: float | None = None,
    majority: str = "total",
    seed: int = 0,
) -> FitReport:
    """Adds an adapter whose update combines those of others. It is not active yet; the others stay as they are.

    The adapters may differ in rank, alpha, scaling and layers: one counts as zero where it has no layer. Their modules
    trained whole and biases (lora_bias) are combined by the same method, as differences from the base's, and kept dense;
    counters in them keep the base's value. The new adapter has scaling 1. It is trainable if one of the others is.

    Args:
        model: the model that holds the adapters. It may be folded or not.
        names: the adapters, each once.
        weights: a number for each, of either sign.
        adapter_name: the name of the new one.
        method: "linear": the sum, at the smallest rank that holds it exactly. "cat": the sum, by joining the factors: its
            rank on a layer is the sum of theirs. "svd": the sum, at rank r, without building a matrix of the weight's size.
            Those of PRUNING ("ties", "dare_linear" and others): value by value on the dense updates, one layer at a time
            (about 8 bytes a weight of it for each adapter, and 40 more), then cut to rank r.
        r: for "svd" and the value-wise methods, the rank; None: on each layer the largest of the adapters' there. A layer's
            rank is less where its shape, or for "svd" the sum of the ranks, allows no more.
        density: for the value-wise methods, the share of values to keep, in (0, 1].
        majority: how TIES chooses a value's sign: "total", that of the sum, or "frequency", the one that occurs more often.
        seed: of DARE's choice, the same on any device. Its numbers are drawn layer by layer in the model's order, on each
            for the adapters' updates in the order of `names`, then for their biases; after all layers for the modules
            trained whole, tensor by tensor. `pruning.Rule` has the details of these three.

    Returns:
        The ranks, and the energy kept.

    Raises:
        AdapterNameError: one of `names` is not on the model; `adapter_name` is taken.
        ConfigError: an argument is not allowed, or an adapter can't be combined: DoRA's updates do not add up, and only one
            adapter of a model can train the base's biases. The model is as it was.
        StateError: an adapter, or the combination in its dtype, has NaN or infinite values. Likewise.
    """
    check_settings(method, r, density, majority, seed)
    sources = weights_of(names, weights)
    records = {name: find_adapter(model, name) for name in sources}
    check_records(model, records)
    check_new_name(model, adapter_name)

    root = unwrap(model)
    rule = Rule(method, density, majority, torch.Generator("cpu").manual_seed(seed))
    carried = {path: layer for record in records.values() for path, layer in adapter_layers(root, record)}
    paths = watched([path for path in base_modules(root) if path in carried], "combining")
    parts = {path: _combine_layer(path, carried[path], sources, r, rule) for path in paths}
    whole = {path for record in records.values() for path in record.saved_modules}
    saved = tuple(p for p in base_modules(root) if p in whole and not any(p.startswith(f"{outer}.") for outer in whole))
    config = _config(root, records, {path: len(part.A) for path, part in parts.items()}, saved)
    found = plan_copies(
        root, Targets({path: LayerPlan.of(config, path) for path in parts}, {}), saved, keep_ties=config.ensure_weight_tying
    )
    copies = _combine_copies(root, found.copies, sources, rule)
    attach(root, config, adapter_name, found, trainable=any(record.trainable for record in records.values()))
    for path, layer in adapter_layers(root, find_adapter(root, adapter_name)):
        part = parts[path]
        layer.lora_A[adapter_name].data, layer.lora_B[adapter_name].data = part.A, part.B
        if part.bias is not None:
            layer.lora_bias[adapter_name].data = part.bias
    for path, copy in copies_of(root, adapter_name).items():
        copy.data = copies[path].to(copy)
    energy = {path: part.energy for path, part in parts.items()}
    made_of = f"{method} of {' + '.join(f'{weight:g} {name!r}' for name, weight in sources.items())}"
    return FitReport(adapter_name, made_of, {path: len(part.A) for path, part in parts.items()}, energy, saved)


# --- one layer, one module --------------------------------------------------------------------------------------------


def _combine_layer(path: str, layer: LoraLayer, sources: Mapping[str, float], r: int | None, rule: Rule) -> _Part:
    """The combination of those of `sources` that are on the layer."""
    weights = {name: weight * layer.lora_scaling[name] for name, weight in sources.items() if name in layer.lora_scaling}
    factors = {name: layer.factors(name) for name in weights}
    dtype = functools.reduce(torch.promote_types, (A.dtype for A, _ in factors.values()), torch.float32)
    biases = {name: b for name in weights if (b := layer.own_bias(name)) is not None}
    for name, (A, B) in factors.items():
        for tensor in (A, B, biases.get(name)):
            if tensor is not None and not tensor.isfinite().all():
                raise StateError(f"adapter {name!r} has NaN or infinite values on {path}; nothing was combined")

    pairs = [(A.detach().double(), B.detach().double() * weights[name]) for name, (A, B) in factors.items()]
    r = r or max(len(A) for A, _ in pairs)
    if rule.method in PRUNING:
        A, B, energy = best_of_matrix(rule(B @ A for A, B in pairs), r)
    else:
        A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)  # R d_in, d_out R
        energy = 1.0
        if rule.method != "cat":
            A, B, energy = best_of_product(A, B, None if rule.method == "linear" else r, torch.finfo(dtype).eps)
    bias = rule(b.detach().double() * sources[name] for name, b in biases.items()) if biases else None

    part = _Part(A.to(dtype).contiguous(), B.to(dtype).contiguous(), None if bias is None else bias.to(dtype), energy)
    if not all(t.isfinite().all() for t in (part.A, part.B, part.bias) if t is not None):
        raise StateError(f"the combination has infinite values on {path}; use smaller weights; nothing was combined")
    return part


def _combine_copies(
    root: nn.Module, groups: Mapping[str, object], sources: Mapping[str, float], rule: Rule
) -> dict[str, Tensor]:
    """{path: tensor} for the paths of `groups`, of the modules that one of the adapters trains whole; one for each group."""
    copies = {name: copies_of(root, name) for name in sources}
    combined: dict[object, Tensor] = {}
    for path, group in groups.items():
        base = original_of(root, path)
        if not base.is_floating_point():  # a counter
            combined[group] = base
        elif group not in combined:
            own = {name: tensors[path].detach() for name, tensors in copies.items() if path in tensors}
            W = base.detach().to(next(iter(own.values())).device, torch.float64)
            value = W + rule((copy.double() - W) * sources[name] for name, copy in own.items())
            if not value.to(base.dtype).isfinite().all():
                raise StateError(f"the combination has NaN or infinite values in {path}; nothing was combined")
            combined[group] = value
    return {path: combined[group] for path, group in groups.items()}


# --- the configuration ------------------------------------------------------------------------------------------------


def _config(root: nn.Module, records: Mapping[str, Adapter], ranks: Mapping[str, int], saved: Sequence[str]) -> LoraConfig:
    """The settings of an adapter of these ranks, {path: r}, and scaling 1; what all of the others share, it has too."""
    paths, configs = list(base_modules(root)), [record.config for record in records.values()]
    ((r, _),) = Counter(ranks.values()).most_common(1)
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    matched = set().union(*match_patterns("target_modules", tuple(ranks), paths).values())
    # A path may be the end of another, which a list would mean too.
    targets = tuple(ranks) if matched == set(ranks) else "|".join(map(re.escape, ranks))
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=targets,
        modules_to_save=saved or None,
        lora_bias=any(config.lora_bias for config in configs),
        ensure_weight_tying=all(config.ensure_weight_tying for config in configs),
        lora_dropout=_shared([config.lora_dropout for config in configs], 0.0),
        task_type=_shared([config.task_type for config in configs], None),
        base_model_name_or_path=_shared([config.base_model_name_or_path for config in configs], None),
    )


def _shared(values: Sequence, default: object) -> object:
    return values[0] if all(value == values[0] for value in values) else default
