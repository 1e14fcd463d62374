"""Adapters that were trained on the layers of single experts, on a model that holds these fused in parameters.

    model.layers.0.block_sparse_moe.experts.3.w1        in a file from transformers 4, with A and B of its own
    model.layers.0.mlp.experts.gate_up_proj             what transformers 5 has that layer in, (E, 2 d_expert, d_model)

The updates of an expert's layers that stand one above the other in a parameter are one update, of their summed rank:

    A_e = [A_gate; A_up]          B_e = [B_gate 0; 0 B_up]

A layer that the file has nothing for has zeros there. Factors before B A that differ are in B. So what the adapter computes is
exactly what it was; as it is trained on, the zeros of B are trained too. A router, which was a layer, is a parameter by now.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..bases import base_of, weight_shape
from ..errors import FileFormatError
from ..layers import lora_class
from ..layers.slots import slot_of
from ..methods.registry import method_of
from ..model.conventions import output_layer, renaming
from ..model.plan import base_modules
from ..spec.config import LoraConfig
from ..spec.patterns import limited
from ..spec.starts import starts_from_weight
from ..spec.targets import FUSED, LayerPlan, match_saved_modules, select_targets
from .fit import listed
from .keys import layer_keys, parse_key, with_path

#: {parameter: the ways to call the layers of an expert that are in it, one above the other}.
PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_EXPERT = re.compile(rf"(?P<outer>.+)\.(?P<expert>\d+)\.(?P<part>{'|'.join(FUSED)})")


@dataclass(frozen=True)
class Fused:
    """What an adapter's files say, with the layers of single experts stacked.

    Attributes:
        config: the settings; if there were such layers, they name whole paths.
        tensors: {key: tensor}.
        names: {path of a parameter: what the file calls its layers}.
        parts: {path of a layer in the file: (the parameter, the expert, which rows of its matrix, its settings)}.
        dropout: that of the settings in the file, which goes with layers.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    names: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, int, slice, LayerPlan]] = field(default_factory=dict)
    dropout: float = 0.0

    @property
    def stacked(self) -> set[str]:
        """The parameters."""
        return {path for path, *_ in self.parts.values()}

    def layers(self, model: nn.Module) -> dict[str, tuple[SimpleNamespace, LayerPlan]]:
        """{path in the file: (what has its weight, as the model holds it; its settings)} of the layers that were stacked."""
        weights: dict[str, Tensor] = {}
        for path in self.stacked:
            host, _, name = path.rpartition(".")
            slot = slot_of(model.get_submodule(host), name)
            weights[path] = base_of(slot).dense(slot, base_of(slot).dense_dtype(slot))
        return {
            old: (SimpleNamespace(weight=weights[path][expert, rows]), plan)
            for old, (path, expert, rows, plan) in self.parts.items()
        }


def fuse_experts(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], source: object) -> Fused:
    """What the files say, for a model that holds experts fused; as it is where they have no layers of single experts.

    Raises:
        FileFormatError: such layers are of another shape or too few, or have what does not go on a parameter.
    """
    modules, renamed = base_modules(model), renaming(model)
    parsed = {key: found for key in tensors if (found := parse_key(key)) is not None and found.table is not None}
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)  # {path in the file: {table: tensor}}
    for key, found in parsed.items():
        if found.path not in modules and _EXPERT.fullmatch(found.path):
            factors[found.path][found.table] = tensors[key]
    factors = dict(factors)
    hosts = _hosts(modules, renamed, [_EXPERT.fullmatch(path)["outer"] for path in factors])
    if not hosts:
        return Fused(config, tensors)
    _check(config, source)
    parts = _meant(modules, hosts, config)
    tables = ((old, table) for old in parts for table in ("lora_A", "lora_B"))
    if missing := sorted(f"{old}.{table}" for old, table in tables if table not in factors.get(old, ())):
        raise FileFormatError(f"{source} does not fit this base: {len(missing)} missing tensors ({listed(missing)})")
    if extra := sorted(factors.keys() - parts.keys()):
        raise FileFormatError(f"{source} does not fit this base: {len(extra)} layers without a home on it ({listed(extra)})")
    routers = _routers(modules, renamed, {found.path for found in parsed.values()})
    targets = _other_layers(model, modules, config)
    grouped: dict[str, list[str]] = defaultdict(list)
    for old, (path, *_) in parts.items():
        grouped[path].append(old)
    parameters = (*grouped, *(f"{new}.weight" for new in routers.values()))
    plans = {path: LayerPlan.of(config, path) for path in targets}
    plans |= {f"{new}.weight": LayerPlan.of(config, old) for old, new in routers.items()}
    stacked, names = {}, {}
    for path, olds in grouped.items():
        stacked[path], plans[path] = _stack(model, path, {old: parts[old] for old in olds}, factors, source)
        ends = dict.fromkeys(old.rpartition(".")[2] for old in olds)
        names[path] = f"{_EXPERT.fullmatch(olds[0])['outer']}.*.{{{','.join(ends)}}}"
    moved = _settled(config, targets, parameters, plans)
    kept = {key: t for key, t in tensors.items() if key not in parsed or parsed[key].path not in factors}
    for old, new in routers.items():
        kept = {with_path(k, old, new) if k in parsed and parsed[k].path == old else k: t for k, t in kept.items()}
    for path, pair in stacked.items():
        host, _, name = path.rpartition(".")
        keys = layer_keys(path, slot_of(modules[host], name), parameters, moved)
        kept |= {keys[table]: tensor for table, tensor in pair.items()}
    names |= {f"{new}.weight": old for old, new in routers.items() if old != new}
    return Fused(moved, kept, names, parts, config.lora_dropout)


def warn_of_fused(source: object, fused: Fused) -> None:
    """Says by an example that layers were stacked."""
    for path, old in list(fused.names.items())[:1]:
        count, dropout = len(fused.parts), fused.dropout
        without = f"; lora_dropout={dropout:g} goes, for a parameter has no input that it could act on" if dropout else ""
        warnings.warn(f"{source} has {count} layers of single experts, stacked here: {old} in {path!r}{without}", stacklevel=7)


def _hosts(modules: Mapping[str, nn.Module], renamed: Callable[[str], str], outers: list[str]) -> dict[str, str]:
    """{path of a module with fused experts: what the file calls it}, of all that are alike."""
    found = {}
    for old in dict.fromkeys(outers):
        new = old if _holds_experts(modules.get(old)) else renamed(f"{old}.gate_up_proj").rpartition(".")[0]
        if _holds_experts(modules.get(new)):
            found[new] = old
    for new in [path for path, module in modules.items() if _holds_experts(module) and path not in found]:
        for known, old in list(found.items()):
            if re.sub(r"\d+", "#", known) == re.sub(r"\d+", "#", new) and known.count(".") == old.count("."):
                numbers = iter(re.findall(r"\d+", new))
                found[new] = re.sub(r"\d+", lambda _, numbers=numbers: next(numbers), old)
                break
    return found


def _holds_experts(module: nn.Module | None) -> bool:
    """Whether a module has experts fused, one layer's rows after the other's: gpt-oss has columns, by turns."""
    held = () if module is None else module._parameters
    if not getattr(module, "is_concatenated", True) or getattr(module, "is_transposed", False):
        return False
    return any(name in held and len(weight_shape(held[name])) == 3 for name in PARTS)


def _meant(
    modules: Mapping[str, nn.Module], hosts: Mapping[str, str], config: LoraConfig
) -> dict[str, tuple[str, int, slice, LayerPlan]]:
    """What the configuration means among the layers of single experts; see `Fused.parts`."""
    places = {}
    for new, old in hosts.items():
        host = modules[new]
        for name, ways in PARTS.items():
            if name not in host._parameters:
                continue
            E, rows, _ = weight_shape(host._parameters[name])
            for way in ways:
                size = rows // len(way)
                for e in range(E):
                    for i, part in enumerate(way):
                        places[f"{old}.{e}.{part}"] = f"{new}.{name}", e, slice(i * size, (i + 1) * size)
    with limited():
        found = select_targets(config, list(places), set(places), (), strict=False)
    return {old: (*places[old], plan) for old, plan in found.layers.items()}


def _routers(modules: Mapping[str, nn.Module], renamed: Callable[[str], str], paths: set[str]) -> dict[str, str]:
    """{what the file calls a layer: the module that has its weight in a parameter now}."""
    found = {old: old if old in modules else renamed(old) for old in paths}
    held = {old: modules[new]._parameters.get("weight") for old, new in found.items() if new in modules}
    matrices = {old for old, weight in held.items() if weight is not None and weight.dim() == 2}
    return {old: found[old] for old in sorted(matrices) if lora_class(modules[found[old]]) is None}


def _other_layers(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> tuple[str, ...]:
    """The paths of the layers that the configuration means besides."""
    kinds = {path: kind for path, module in modules.items() if (kind := lora_class(module)) is not None}
    linear = {path for path, kind in kinds.items() if kind.is_linear and modules[path] is not output_layer(model)}
    with limited():
        saved = match_saved_modules(config.saved_module_patterns, config.saved_module_patterns, list(modules))
        found = select_targets(config, list(modules), linear, saved, strict=False)
    return tuple(path for path in found.paths if path in kinds)


def _stack(
    model: nn.Module,
    path: str,
    parts: Mapping[str, tuple[str, int, slice, LayerPlan]],
    factors: Mapping[str, Mapping[str, Tensor]],
    source: object,
) -> tuple[dict[str, Tensor], LayerPlan]:
    """A, (E R, d_in), and B, (d_out, R E), of a parameter, as `layers/experts.py` has them; and its rank and scaling."""
    host, _, name = path.rpartition(".")
    slot = slot_of(model.get_submodule(host), name)
    kind = lora_class(slot)
    d_in, d_out = kind.matrix_shape(slot)
    ranks: dict[int, int] = defaultdict(int)  # {first row of a layer in the matrix: the largest rank there}
    for _, _, rows, plan in parts.values():
        ranks[rows.start] = max(ranks[rows.start], plan.r)
    starts = {start: sum(r for other, r in ranks.items() if other < start) for start in ranks}
    E, R, s = kind.matrices(slot), sum(ranks.values()), next(iter(parts.values()))[3].scaling
    alike = all(plan.scaling == s for *_, plan in parts.values())
    dtypes = {tensor.dtype for old in parts for tensor in factors[old].values()} | (set() if alike else {torch.float32})
    dtype = functools.reduce(torch.promote_types, dtypes)
    A, B = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in ((E, R, d_in), (E, d_out, R)))
    for old, (_, expert, rows, plan) in parts.items():
        own = factors[old]
        shapes = {"lora_A": (plan.r, d_in), "lora_B": (rows.stop - rows.start, plan.r)}
        if any(tuple(own[table].shape) != shape for table, shape in shapes.items()):
            raise FileFormatError(
                f"{source} does not fit this base: {old} has A {tuple(own['lora_A'].shape)} and B "
                f"{tuple(own['lora_B'].shape)}, not {shapes['lora_A']} and {shapes['lora_B']}"
            )
        ranks_of = slice(starts[rows.start], starts[rows.start] + plan.r)
        A[expert, ranks_of] = own["lora_A"].to(dtype)
        B[expert, rows, ranks_of] = own["lora_B"].to(dtype) * (plan.scaling / s)
    tensors = {"lora_A": A.view(E * R, d_in), "lora_B": B.permute(1, 2, 0).reshape(d_out, R * E)}
    return tensors, LayerPlan(path, R, s)


def _settled(
    config: LoraConfig, targets: tuple[str, ...], parameters: tuple[str, ...], plans: Mapping[str, LayerPlan]
) -> LoraConfig:
    """The configuration by whole paths."""
    alphas = {path: plan.scaling * (math.sqrt(plan.r) if config.use_rslora else plan.r) for path, plan in plans.items()}
    return dataclasses.replace(
        config,
        target_modules=list(targets),
        target_parameters=list(parameters),
        lora_dropout=0.0,  # it acts on an input, and a parameter has none
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={path.replace(".", r"\."): plan.r for path, plan in plans.items() if plan.r != config.r},
        alpha_pattern={p.replace(".", r"\."): a for p, a in alphas.items() if not math.isclose(a, config.lora_alpha)},
    )


def _check(config: LoraConfig, source: object) -> None:
    """Raises a FileFormatError if layers of single experts have what a parameter can't."""
    method = method_of(config)
    why = None
    if method.asked or not method.is_plain:
        why = f"{method.label} does not go on parameters"
    elif starts_from_weight(config.init_lora_weights):
        why = f"they started from their weights ({config.init_lora_weights}); make it plain LoRA first (convert --plain --base)"
    elif config.bias != "none":
        why = f"a parameter has no bias to train (bias={config.bias!r})"
    elif config.target_parameters:
        why = "it has target_parameters besides, and which is which can't be told"
    if why:
        raise FileFormatError(f"{source} has layers of single experts, which this model holds fused in parameters, and {why}")
