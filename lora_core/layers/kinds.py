"""Which layers can carry adapters: from a base layer's class to its subclass that does.

A subclass of a known class that keeps its forward computes the same, and is known with it. One that has a forward of its own
may compute something else, which the adapter would not be part of: it is refused, unless its kind is registered.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from ..bases import is_packed, weight_shape
from ..cpu.products import FastLinear
from ..errors import ConfigError
from .attention import LoraAttention, LoraOutProjection
from .base import LoraLayer
from .conv import LoraConv, LoraGroupedConv
from .embedding import LoraEmbedding, LoraScaledEmbedding
from .experts import LoraHost, LoraParameter
from .linear import LoraConv1D, LoraFalconLinear, LoraFastLinear, LoraLinear, LoraPacked
from .slots import ParameterSlot
from .subclass import subclass

#: {class of a base layer: its kind}, for that class and for subclasses that keep what it computes.
_KINDS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Linear: LoraLinear,
    FastLinear: LoraFastLinear,
    nn.Conv1d: LoraConv,
    nn.Conv2d: LoraConv,
    nn.Conv3d: LoraConv,
    nn.Embedding: LoraEmbedding,
    nn.MultiheadAttention: LoraAttention,
    NonDynamicallyQuantizableLinear: LoraOutProjection,
    ParameterSlot: LoraParameter,
}
#: The methods that say what a layer computes.
_COMPUTING = ("__call__", "forward", "_conv_forward")


def register_kind(base_class: type[nn.Module], kind: type[LoraLayer]) -> None:
    """Makes layers of `base_class`, and of subclasses that keep its forward, ones that can carry adapters.

    Register before a model gets adapters, and in every process that loads a pickled one. `docs/extend.md` shows a kind whole.

    Args:
        base_class: the class of the layers.
        kind: a subclass of `LoraLayer`, or of another kind, that says how such a layer multiplies.

    Raises:
        ConfigError: one of the two is no such class, or `base_class` has another kind already.
    """
    if not isinstance(base_class, type) or not issubclass(base_class, nn.Module) or issubclass(base_class, LoraLayer):
        raise ConfigError(f"base_class must be the class of a layer, a subclass of nn.Module, not {base_class!r}")
    if not isinstance(kind, type) or not issubclass(kind, LoraLayer):
        raise ConfigError(f"kind must be a subclass of lora_core.layers.LoraLayer, not {kind!r}")
    if _KINDS.get(base_class, kind) is not kind:
        raise ConfigError(f"{base_class.__name__} has the kind {_KINDS[base_class].__name__} already; it can't have another")
    _KINDS[base_class] = kind


def lora_class(module: nn.Module) -> type[LoraLayer] | None:
    """The class that carries adapters on layers of `module`'s exact type; None if there is none, as `why_not` says."""
    base = type(module)
    if issubclass(base, LoraLayer):
        return base
    kind = _kind(module)
    return None if kind is None or kind.refusal(module) else subclass(kind, base)


def why_not(module: nn.Module) -> str:
    """Why `module` can't carry adapters, in half a line."""
    kind = _kind(module)
    if kind is not None and (reason := kind.refusal(module)):
        return reason
    if isinstance(module, LoraHost):
        return "an adapter is on a parameter of it (target_parameters)"
    known = _known(type(module))
    if known is None:
        matrices = [name for name, p in module.named_parameters(recurse=False) if len(weight_shape(p)) == 3]
        instead = f"; its parameters can: name {' and '.join(matrices)} in target_parameters" if matrices else ""
        return f"no kind of layer is registered for it{instead}"
    if hasattr(type(module), "weight"):
        return "its weight is computed from other tensors (parametrised, say)"
    return f"its forward may compute something else than that of nn.{known.__name__}"


def packs(module: nn.Module) -> bool:
    """Whether a layer with a packed weight computes what `module` does: x W^T + b, with no state besides W and b.

    A weight that is computed from other tensors (pruned, say) is none that can be packed.
    """
    plain = set(module._parameters) == {"weight", "bias"} and not module._buffers and not module._modules
    return plain and _kind(module) in (LoraLinear, LoraFastLinear, LoraFalconLinear)


def _kind(module: nn.Module) -> type[LoraLayer] | None:
    """The kind of a layer that has no adapters yet."""
    base = type(module)
    if is_packed(module) and isinstance(module, nn.Linear):
        return LoraPacked
    known, named = _known(base), _named(module)
    if named is not None and (known is None or known in (nn.Linear, nn.Embedding)):
        return named
    if known is None or hasattr(base, "weight") or is_lazy(module._parameters.get("weight")):
        return None
    kept = all(getattr(base, name) is getattr(known, name) for name in _COMPUTING if hasattr(known, name))
    kind = _KINDS[known] if kept else None
    return LoraGroupedConv if kind is LoraConv and module.groups > 1 else kind


def _known(base: type[nn.Module]) -> type[nn.Module] | None:
    """The registered class that `base` is, or that it comes from first."""
    return next((known for known in base.__mro__ if known in _KINDS), None)


def _named(module: nn.Module) -> type[LoraLayer] | None:
    """The kind of a class of transformers with a forward of its own, which is found by its name and shape, not imported."""
    base = type(module)
    if base.__name__ == "Conv1D" and hasattr(module, "nf"):
        return LoraConv1D
    if not base.__module__.startswith("transformers."):
        return None
    if base.__name__ == "FalconLinear" and isinstance(module, nn.Linear):
        return LoraFalconLinear
    if base.__name__.endswith("ScaledWordEmbedding") and isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return LoraScaledEmbedding
    return None
