"""Folding adapters into the base: reversibly in place, or for good.

    merge_adapter(model);  unmerge_adapter(model)              # in place; unmerging restores every byte
    report = merge_and_unload(model, dtype=torch.float16)      # plain modules, ready to ship

The sum W + scaling * B A is computed in float32 (float64 for float64 weights) and cast once.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..bases import base_of, is_packed
from ..errors import StateError
from ..layers import LoraLayer
from ..layers.packed import PackedHost, packed_experts, unpack_parameters
from ..layers.slots import ParameterSlot
from ..maths.loss import Cost, describe_loss, overflow, refuse_loss
from ..methods.base import refuse_unmergeable
from ..methods.registry import method_of
from ..progress import watched
from . import copies
from .adapters import remove_all
from .atomic import LastSteps
from .conventions import allow_saving, forget_quantization
from .lifecycle import activate, unfold_all
from .registry import Registry, changed_layers, find_adapter, registry_of, unwrap
from .replicate import keep_layers, replicated
from .sharding import refuse_sharded
from .untie import ties, untie
from .verbs import as_names, change_adapters, changes_adapters

#: What helps where the weights' own precision is too coarse for an update.
_REMEDY = "merge with dtype=torch.float32"
_REMEDY_NF4 = (
    "merge over the base's files, where the original weights are at hand (python -m lora_core merge, with --base-as), or "
    "without requantize"
)


@dataclass(frozen=True)
class MergeReport:
    """What `merge_and_unload` did.

    Attributes:
        adapters: names of the adapters that were folded in.
        layers: {path: what casting the sum to the weight's dtype, or packing it, lost of the update D, as
            |cast(W + D) - (W + D)| / |D| in Frobenius norms}. Zero in float32; in 16 bits a small update can be lost
            altogether (1.0), and packing usually adds more error than the update is large.
        dequantized: paths of packed layers (4-bit ones, say) and experts that are dense now.
        requantized: paths of those that are packed.
        untied: paths of weights that the base tied to others, and that are apart now.
        kept: {path: how much of the update there is in what is stored: 1 all of it, 0 nothing}; see `maths/loss.py`. Also of
            the tensors that were trained whole and are cast, the update being what training changed.
        moved: {path in a base's files: what the adapter calls it}, where that is another name.
    """

    adapters: tuple[str, ...]
    layers: dict[str, float]
    dequantized: tuple[str, ...]
    requantized: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    kept: dict[str, float] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)

    @property
    def largest_error(self) -> float:
        return max(self.layers.values(), default=0.0)

    @property
    def least_kept(self) -> float:
        return min(self.kept.values(), default=1.0)

    def __str__(self) -> str:
        kinds = f"; {len(self.dequantized)} packed layers made dense" if self.dequantized else ""
        kinds += f"; {len(self.requantized)} layers packed" if self.requantized else ""
        kinds += f"; {len(self.moved)} modules have other names in the base" if self.moved else ""
        kinds += f"; no longer tied to others: {', '.join(self.untied)}" if self.untied else ""
        left = describe_loss(self.kept) or f"at least {min(self.least_kept, 1):.1%} of each update is there"
        error = f"; rounding moved a weight by up to {self.largest_error:.2g} times its update" if self.largest_error else ""
        return f"merged {', '.join(self.adapters)} into {len(self.layers)} layers: {left}{error}{kinds}"


@changes_adapters
def merge_adapter(model: nn.Module, names: str | Iterable[str] | None = None, *, allow_loss: bool = False) -> None:
    """Folds adapters into the weights, in place: the forward then costs what the base's does.

    The weights before are kept, so that `unmerge_adapter` restores every byte; packed layers are dense meanwhile, and what the
    base ties to an adapted or trained weight is apart (a `config.tie_word_embeddings` then says so), so that a model saved now
    loads as it computes.

    Args:
        model: a model with adapters.
        names: the adapters to fold, which are made active; None: the active ones.
        allow_loss: merge although the weights' 16 bits lose more than half of the update in some layer.

    Raises:
        ConfigError: no weight can hold what an adapter does (activated LoRA).
        StateError: adapters are folded in already, none is active, a weight is computed from others (pruned, say) or
            not finite once it is folded, or too much would be lost; a thread is in a mixed batch or in `disable_adapters`,
            the model is spread over processes, or an adapted weight is offloaded.
    """
    root, registry, names = unwrap(model), registry_of(model), _chosen(model, names)
    tied = ties(root)
    spent = _fold_all(model, names)
    if not allow_loss:
        refuse_loss({path: c.kept for path, c in spent.items()}, f"{_REMEDY}; or pass allow_loss=True")
    _, registry.folded_ties = untie(root, tied.values(), _changed(registry, names, _layers(root, names)))
    if replicated(root) is None:  # else weights are one in a way that files have no place for
        allow_saving(root, registry.held_back)


@changes_adapters
def unmerge_adapter(model: nn.Module) -> None:
    """Takes folded adapters out of the weights again: each weight is what it was before, byte for byte.

    Raises:
        StateError: no adapter is folded in, or a weight was pruned since, say.
    """
    if not is_merged(model):
        raise StateError("no adapter is folded into the weights; call merge_adapter(model) first")
    unfold_all(model)


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are folded into the weights now."""
    return any(layer.lora_folded for layer in _layers(model, registry_of(model).adapters).values())


def merge_and_unload(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    *,
    requantize: bool = False,
    allow_loss: bool = False,
) -> MergeReport:
    """Folds adapters into the weights for good: plain modules again, no adapter left.

    Modules that the adapters trained whole, and biases, keep the trained values. Every packed layer of the model becomes
    a dense `nn.Linear` that holds the dequantised weight, which is what the adapter was trained against; or, with
    `requantize`, stays packed. A refusal changes nothing: weights that take the update in their own dtype are read
    first, to know that nothing can overflow, and then changed in their own memory, so that whatever shares it changes too;
    the others are held until all are folded.

    Args:
        model: a model with adapters. It is changed; the report is what is returned.
        names: the adapters to fold; None: the active ones. The others are dropped.
        dtype: cast the whole model to this after folding; None: each layer keeps its dtype (a packed one takes that from
            before it was packed).
        requantize: pack the merged weight of a packed layer again, in the format that it had. The report says
            what that lost: weights that lie on the 4-bit grid snap back after a small update.
        allow_loss: merge although the cast, or packing, loses more than half of the update in some layer.

    Where the base ties an adapted or trained weight to others (a head that is the input embeddings), they are apart afterwards,
    as they were while the adapter was active, and each has a tensor of its own; a `config.tie_word_embeddings` then says so.

    Raises:
        ConfigError: no weight can hold what an adapter does (activated LoRA).
        StateError: no adapter is active, a weight is computed from others (pruned, say), a merged one would not be
            finite in its dtype, or in some layer less than half of the update would be left. The model is as it was; a
            thread is in a mixed batch or in `disable_adapters`, the model is spread over processes, or an adapted weight is
            offloaded.
    """
    return change_adapters(model, functools.partial(_merge, model, names, dtype, requantize, allow_loss))


def _merge(
    model: nn.Module,
    names: str | Iterable[str] | None,
    dtype: torch.dtype | None,
    requantize: bool,
    allow_loss: bool,
    last: LastSteps,
) -> MergeReport:
    """`merge_and_unload`, but for what is added in place: `last` gets that to do."""
    root, registry = unwrap(model), registry_of(model)
    names = _chosen(model, names)
    unfold_all(model)
    keep_layers(root)
    modules = root.named_modules(remove_duplicate=False)
    quantized = [path for path, m in modules if is_packed(m) and not isinstance(m, ParameterSlot)]
    packed = (*quantized, *packed_experts(root))
    _check_cast(root, dtype)
    tied = ties(root)
    spent = _fold_all(model, names, dtype, packed=requantize, last=last, shared=tied)
    for layer in _layers(model, names).values():
        layer.keep_folded()
    changed, whole = _changed(registry, names, _layers(root, names)), {}
    for name in names:  # the trained copies of heads and biases become the base's own
        whole |= copies.keep(root, name, registry.adapters[name].copied, dtype)
    kept = {path: c.kept for path, c in (spent | whole).items()}
    if not allow_loss:
        refuse_loss(kept, f"{_REMEDY_NF4 if requantize else _REMEDY}; or pass allow_loss=True")
    remove_all(root)
    dense: dict[nn.Module, nn.Module] = {}  # a layer used under two paths stays one layer
    for path in () if requantize else watched(quantized, "unpacking layers"):
        layer = copies.submodule(root, path)
        if layer not in dense:
            dense[layer] = base_of(layer).to_dense(layer)
        parent, _, name = path.rpartition(".")
        setattr(copies.submodule(root, parent), name, dense[layer])
    for host in () if requantize else [m for m in root.modules() if isinstance(m, PackedHost)]:
        unpack_parameters(host)
    untied, _ = untie(root, tied.values(), changed)
    if packed and not requantize:
        forget_quantization(root)
    if dtype is not None:
        root.to(dtype)
    return MergeReport(
        adapters=names,
        layers={path: c.lost for path, c in spent.items()},
        dequantized=() if requantize else packed,
        requantized=packed if requantize else (),
        untied=untied,
        kept=kept,
    )


def _layers(model: nn.Module, names: Iterable[str]) -> dict[str, LoraLayer]:
    """{path: layer} of every layer that carries one of the adapters `names`."""
    return {path: layer for name in names for path, layer in changed_layers(model, find_adapter(model, name))}


def _changed(registry: Registry, names: Iterable[str], layers: Mapping[str, LoraLayer]) -> set[str]:
    """The paths of the base's tensors that adapters own a copy of or add to."""
    copied = (path for name in names for path in registry.adapters[name].copied)
    return {*copied, *(layer.weight_path(path) for path, layer in layers.items())}


def _chosen(model: nn.Module, names: str | Iterable[str] | None) -> tuple[str, ...]:
    chosen = registry_of(model).active if names is None else as_names(names)
    if not chosen:
        raise StateError("no adapter is active; name the ones to merge")
    return chosen


def _fold_all(
    model: nn.Module,
    names: tuple[str, ...],
    dtype: torch.dtype | None = None,
    *,
    packed: bool = False,
    last: LastSteps | None = None,
    shared: Container[int] = (),
) -> dict[str, Cost]:
    """Makes `names` active and folds them in; {path: what the cast lost}.

    4-bit layers are folded into 4-bit weights if `packed`. With `last`, dense ones are added to in their own memory, by a step
    of it, where they can be and that is not `shared`.
    """
    refuse_sharded(model, "merging")
    for name in names:
        refuse_unmergeable(method_of(find_adapter(model, name).config), f"adapter {name!r}")
    activate(model, names)
    root, spent = unwrap(model), {}
    for path, layer in watched(_layers(model, names).items(), "merging layers"):
        for name in layer.present(names):
            layer.check_shape(path, name)
        try:
            layer.check_stored(names)
            own = copies.original_of(root, layer.weight_path(path)) is not layer.weight  # not the base's to write to
            in_place = last is not None and dtype in (None, layer.weight.dtype) and not own
            in_place = in_place and layer.weight.data_ptr() not in shared
            if in_place and layer.folds_in_place(names):
                for step in layer.steps_in_place(names):
                    last.add(layer.weight, step)
                spent[path] = Cost()
            else:
                spent[path] = layer.fold_packed(names) if packed and is_packed(layer) else layer.fold(names, dtype)
        except StateError as error:
            raise StateError(f"{path}: {error}; nothing was merged") from None
    for name in names:
        _keep_tied(root, name)
    return spent


def _keep_tied(root: nn.Module, name: str) -> None:
    """Gives layers that were one before, and got the same rows, one folded weight."""
    first: dict[tuple[int, ...], LoraLayer] = {}
    for path in find_adapter(root, name).tokens:
        layer = copies.submodule(root, path)
        if all(layer.lora_method[n].replaces_rows for n in layer.lora_folded):
            rows = (id(layer.lora_tokens[n]) for n in layer.lora_folded)
            layer.weight = first.setdefault((id(layer.lora_unfolded[0]), *rows), layer).weight


def _check_cast(root: nn.Module, dtype: torch.dtype | None) -> None:
    """Raises if a parameter is finite now and would not be in `dtype`."""
    if dtype is None:
        return
    largest = torch.finfo(dtype).max
    for path, parameter in root.named_parameters():
        if parameter.is_floating_point() and largest < parameter.detach().abs().amax() < torch.inf:
            raise overflow(path, dtype)
