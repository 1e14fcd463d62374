"""Folding adapters into the base: reversibly in place, or for good.

    merge_adapter(model);  unmerge_adapter(model)              # in place; unmerging restores every byte
    report = merge_and_unload(model, dtype=torch.float16)      # plain modules, ready to ship

The sum W + scaling * B A is computed in float32 (float64 for float64 weights) and cast once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .adapters import unload
from .errors import MergeError
from .layers import LoraLayer
from .nf4 import is_quantized, to_dense
from .registry import activate, adapter_layers, as_names, check_not_mixing, find_adapter, registry_of, submodule, unwrap
from .sharding import refuse_sharded


@dataclass(frozen=True)
class MergeReport:
    """What `merge_and_unload` did.

    Attributes:
        adapters: names of the adapters that were folded in.
        layers: {path: what casting the sum to the weight's dtype, or packing it in 4 bits, lost of the update D, as
            |cast(W + D) - (W + D)| / |D| in Frobenius norms}. Zero in float32; in 16 bits a small update can be lost
            altogether (1.0), and 4 bits usually add more error than the update is large.
        dequantized: paths of 4-bit layers that are dense now.
        requantized: paths of layers that are in 4 bits.
    """

    adapters: tuple[str, ...]
    layers: dict[str, float]
    dequantized: tuple[str, ...]
    requantized: tuple[str, ...] = ()

    @property
    def largest_error(self) -> float:
        return max(self.layers.values(), default=0.0)

    def __str__(self) -> str:
        kinds = f"; {len(self.dequantized)} 4-bit layers made dense" if self.dequantized else ""
        kinds += f"; {len(self.requantized)} layers in 4 bits" if self.requantized else ""
        return (
            f"merged {', '.join(self.adapters)} into {len(self.layers)} layers, "
            f"losing at most {self.largest_error:.2g} of an update to rounding{kinds}"
        )


def merge_adapter(model: nn.Module, names: str | Iterable[str] | None = None) -> None:
    """Folds adapters into the weights, in place: the forward then costs what the base's does.

    The weights before are kept, so that `unmerge_adapter` restores every byte; 4-bit layers are dense meanwhile.

    Args:
        model: a model with adapters.
        names: the adapters to fold, which are made active; None: the active ones.

    Raises:
        MergeError: adapters are folded in already, none is active, or a folded weight is not finite.
    """
    _fold_all(model, _chosen(model, names))


def unmerge_adapter(model: nn.Module) -> None:
    """Takes folded adapters out of the weights again: each weight is what it was before, byte for byte.

    Raises:
        MergeError: no adapter is folded in.
    """
    if not is_merged(model):
        raise MergeError("no adapter is folded into the weights; call merge_adapter(model) first")
    for layer in _layers(model, registry_of(model).adapters).values():
        layer.unfold()


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are folded into the weights now."""
    return any(layer.lora_folded for layer in _layers(model, registry_of(model).adapters).values())


def merge_and_unload(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    *,
    requantize: bool = False,
) -> MergeReport:
    """Folds adapters into the weights for good: plain modules again, no adapter left.

    Modules that the adapters trained whole, and biases, keep the trained values. Every 4-bit layer of the model becomes
    a dense `nn.Linear` that holds the dequantised weight, which is what the adapter was trained against; or, with
    `requantize`, stays a 4-bit layer. A refusal changes nothing: weights that take the update in their own dtype are read
    first, to know that nothing can overflow, and then changed in their own memory, so that whatever shares it changes too;
    the others are held until all are folded.

    Args:
        model: a model with adapters. It is changed; the report is what is returned.
        names: the adapters to fold; None: the active ones. The others are dropped.
        dtype: cast the whole model to this after folding; None: each layer keeps its dtype (a 4-bit one takes that from
            before it was packed).
        requantize: pack the merged weight of a 4-bit layer in 4 bits again, in the format that it had. The report says
            what that lost.

    Raises:
        MergeError: no adapter is active, an adapted weight is tied to another module's, or a merged weight would not be
            finite in its dtype. The model is as it was.
    """
    root, registry = unwrap(model), registry_of(model)
    names, active, merged = _chosen(model, names), registry.active, is_merged(model)
    if merged:
        unmerge_adapter(model)
    quantized = [path for path, m in root.named_modules(remove_duplicate=False) if is_quantized(m)]
    try:
        _check_not_tied(root, names)
        _check_cast(root, dtype)
        errors = _fold_all(model, names, dtype, packed=requantize, for_good=True)
    except MergeError:
        if merged:
            merge_adapter(model, active)
        raise
    for layer in _layers(model, names).values():
        layer.keep_folded()
    for name in names:  # the trained copies of heads and biases become the base's own
        registry.originals.update(registry.adapters[name].copies)
    unload(root)
    dense: dict[nn.Module, nn.Module] = {}  # a layer used under two paths stays one layer
    for path in () if requantize else quantized:
        layer = submodule(root, path)
        if layer not in dense:
            dense[layer] = to_dense(layer)
        parent, _, name = path.rpartition(".")
        setattr(submodule(root, parent), name, dense[layer])
    if dense:
        _forget_quantization(root)
    if dtype is not None:
        root.to(dtype)
    return MergeReport(names, errors, tuple(quantized if dense else ()), tuple(quantized if requantize else ()))


def _forget_quantization(root: nn.Module) -> None:
    """Takes off a transformers model what says that its weights are 4-bit: it would save, move and load as such."""
    root.__dict__.pop("hf_quantizer", None)
    for flag in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        root.__dict__.pop(flag, None)
    if hasattr(getattr(root, "config", None), "quantization_config"):
        del root.config.quantization_config


def _layers(model: nn.Module, names: Iterable[str]) -> dict[str, LoraLayer]:
    """{path: layer} of every layer that carries one of the adapters `names`."""
    return {path: layer for name in names for path, layer in adapter_layers(model, find_adapter(model, name))}


def _chosen(model: nn.Module, names: str | Iterable[str] | None) -> tuple[str, ...]:
    chosen = registry_of(model).active if names is None else as_names(names)
    if not chosen:
        raise MergeError("no adapter is active; name the ones to merge")
    return chosen


def _fold_all(
    model: nn.Module,
    names: tuple[str, ...],
    dtype: torch.dtype | None = None,
    *,
    packed: bool = False,
    for_good: bool = False,
) -> dict[str, float]:
    """Makes `names` active and folds them in; {path: what the cast lost}. If one layer refuses, nothing has changed.

    4-bit layers are folded into 4-bit weights if `packed`; dense ones in their own memory, where they can be, if `for_good`.
    """
    active = registry_of(model).active
    check_not_mixing(model)
    refuse_sharded(model, "merging")
    activate(model, names)
    layers, lost, certain = _layers(model, names), {}, []
    try:
        for path, layer in layers.items():
            if for_good and dtype in (None, layer.weight.dtype) and layer.folds_in_place(names):
                certain.append(layer)
                lost[path] = 0.0
                continue
            lost[path] = layer.fold_packed(names) if packed and is_quantized(layer) else layer.fold(names, dtype)
    except MergeError as error:
        for layer in layers.values():
            layer.unfold()
        activate(model, active)
        raise MergeError(f"{path}: {error}; nothing was merged") from None
    for layer in certain:
        layer.fold_in_place(names)
    return lost


def _check_not_tied(root: nn.Module, names: Iterable[str]) -> None:
    owners = {id(layer.weight): path for path, layer in _layers(root, names).items()}
    for path, parameter in root.named_parameters(remove_duplicate=False):
        owner = owners.get(id(parameter))
        if owner is not None and path != f"{owner}.weight":
            raise MergeError(f"{owner}.weight is tied to {path}, which merging would change too; untie them first")


def _check_cast(root: nn.Module, dtype: torch.dtype | None) -> None:
    """Raises if a parameter is finite now and would not be in `dtype`."""
    if dtype is None:
        return
    largest = torch.finfo(dtype).max
    for path, parameter in root.named_parameters():
        if parameter.is_floating_point() and largest < parameter.detach().abs().amax() < torch.inf:
            raise MergeError(
                f"{path} overflows {str(dtype).removeprefix('torch.')}; use dtype=torch.bfloat16; nothing was merged"
            )
