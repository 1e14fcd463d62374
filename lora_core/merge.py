"""Folding adapters into the base: reversibly in place, or for good.

    merge_adapter(model);  unmerge_adapter(model)              # in place; unmerging restores every byte
    report = merge_and_unload(model, dtype=torch.float16)      # plain modules, ready to ship

The sum W + scaling * B A is computed in float32 (float64 for float64 weights) and cast once.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import copies
from .adapters import remove_all
from .atomic import LastSteps
from .copies import submodule
from .errors import MergeError
from .layers import LoraLayer
from .nf4 import is_quantized, to_dense
from .registry import activate, adapter_layers, as_names, change_adapters, changes_adapters, find_adapter, registry_of, unwrap
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
        untied: paths of weights that the base tied to others, and that are apart now.
    """

    adapters: tuple[str, ...]
    layers: dict[str, float]
    dequantized: tuple[str, ...]
    requantized: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()

    @property
    def largest_error(self) -> float:
        return max(self.layers.values(), default=0.0)

    def __str__(self) -> str:
        kinds = f"; {len(self.dequantized)} 4-bit layers made dense" if self.dequantized else ""
        kinds += f"; {len(self.requantized)} layers in 4 bits" if self.requantized else ""
        kinds += f"; no longer tied to others: {', '.join(self.untied)}" if self.untied else ""
        return (
            f"merged {', '.join(self.adapters)} into {len(self.layers)} layers, "
            f"losing at most {self.largest_error:.2g} of an update to rounding{kinds}"
        )


@changes_adapters
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


@changes_adapters
def unmerge_adapter(model: nn.Module) -> None:
    """Takes folded adapters out of the weights again: each weight is what it was before, byte for byte.

    Raises:
        MergeError: no adapter is folded in.
    """
    if not is_merged(model):
        raise MergeError("no adapter is folded into the weights; call merge_adapter(model) first")
    _unfold_all(model)


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

    Where the base ties an adapted or trained weight to others (a head that is the input embeddings), they are apart afterwards,
    as they were while the adapter was active, and each has a tensor of its own; a `config.tie_word_embeddings` then says so.

    Raises:
        MergeError: no adapter is active, or a merged weight would not be finite in its dtype. The model is as it was.
        MixedBatchError, ShardedError, OffloadedError: a thread is in a mixed batch or in `disable_adapters`, the model is
            spread over processes, or an adapted weight is offloaded.
    """
    change = functools.partial(_merge, model, names, dtype, requantize)
    return change_adapters(model, change, _configs(unwrap(model)))


def _merge(
    model: nn.Module, names: str | Iterable[str] | None, dtype: torch.dtype | None, requantize: bool, last: LastSteps
) -> MergeReport:
    """`merge_and_unload`, but for what is added in place: `last` gets that to do."""
    root, registry = unwrap(model), registry_of(model)
    names = _chosen(model, names)
    _unfold_all(model)
    quantized = [path for path, m in root.named_modules(remove_duplicate=False) if is_quantized(m)]
    _check_cast(root, dtype)
    ties = _ties(root)
    errors = _fold_all(model, names, dtype, packed=requantize, last=last, shared=ties)
    for layer in _layers(model, names).values():
        layer.keep_folded()
    copied = [path for name in names for path in registry.adapters[name].copied]
    for name in names:  # the trained copies of heads and biases become the base's own
        copies.keep(root, name, registry.adapters[name].copied, dtype)
    remove_all(root)
    dense: dict[nn.Module, nn.Module] = {}  # a layer used under two paths stays one layer
    for path in () if requantize else quantized:
        layer = submodule(root, path)
        if layer not in dense:
            dense[layer] = to_dense(layer)
        parent, _, name = path.rpartition(".")
        setattr(submodule(root, parent), name, dense[layer])
    untied = _untie(root, ties.values(), {*copied, *(f"{path}.weight" for path in errors)})
    if dense:
        _forget_quantization(root)
    _forget_ties(root, untied)
    if dtype is not None:
        root.to(dtype)
    return MergeReport(names, errors, tuple(quantized if dense else ()), tuple(quantized if requantize else ()), untied)


def _forget_quantization(root: nn.Module) -> None:
    """Takes off a transformers model what says that its weights are 4-bit: it would save, move and load as such."""
    root.__dict__.pop("hf_quantizer", None)
    for flag in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        root.__dict__.pop(flag, None)
    if hasattr(getattr(root, "config", None), "quantization_config"):
        del root.config.quantization_config


def _forget_ties(root: nn.Module, untied: Iterable[str]) -> None:
    """Takes off a transformers model what says that these weights are tied: it would save one of them, and tie them again."""
    if not untied:
        return
    for config in _configs(root):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    ties = root.__dict__.get("all_tied_weights_keys")
    for path in [p for p, source in ties.items() if p in untied or source in untied] if ties else ():
        del ties[path]


def _configs(root: nn.Module) -> list[Any]:
    """The configuration of a transformers model, and that of its language model if it has one of its own."""
    config = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return [c for c in (config, text) if hasattr(c, "__dict__")]


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
    last: LastSteps | None = None,
    shared: Container[int] = (),
) -> dict[str, float]:
    """Makes `names` active and folds them in; {path: what the cast lost}.

    4-bit layers are folded into 4-bit weights if `packed`. With `last`, dense ones are added to in their own memory, by a step
    of it, where they can be and that is not `shared`.
    """
    refuse_sharded(model, "merging")
    activate(model, names)
    lost = {}
    for path, layer in _layers(model, names).items():
        try:
            in_place = last is not None and dtype in (None, layer.weight.dtype) and layer.weight.data_ptr() not in shared
            if in_place and layer.folds_in_place(names):
                for step in layer.steps_in_place(names):
                    last.add(layer.weight, step)
                lost[path] = 0.0
            else:
                lost[path] = layer.fold_packed(names) if packed and is_quantized(layer) else layer.fold(names, dtype)
        except MergeError as error:
            raise MergeError(f"{path}: {error}; nothing was merged") from None
    return lost


def _unfold_all(model: nn.Module) -> None:
    for layer in _layers(model, registry_of(model).adapters).values():
        layer.unfold()


def _ties(root: nn.Module) -> dict[int, list[str]]:
    """{where it starts in memory: the paths}, of each tensor of the base that has several paths."""
    paths = defaultdict(list)
    for path in copies.base_tensors(root):
        if (place := copies.original_of(root, path).data_ptr()) != 0:
            paths[place].append(path)
    return {place: tied for place, tied in paths.items() if len(tied) > 1}


def _untie(root: nn.Module, ties: Iterable[Sequence[str]], changed: Container[str]) -> tuple[str, ...]:
    """Gives each path of a tie that the adapters have broken a tensor of its own; the paths, of those, that they changed.

    Also the paths that still are one: no library ties some of what its model ties, and not the rest.
    """
    untied = []
    for paths in ties:
        tensors = {path: copies.get_tensor(root, path) for path in paths}
        if len({tensor.data_ptr() for tensor in tensors.values()}) > 1:
            places = set()
            for path, tensor in tensors.items():
                if tensor.data_ptr() in places:
                    parent, _, name = path.rpartition(".")
                    setattr(submodule(root, parent), name, copies.copy_tensor(tensor))
                places.add(tensor.data_ptr())
            untied += [path for path in paths if path in changed]
    return tuple(untied)


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
