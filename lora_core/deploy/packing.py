"""Which layers of a base are packed, where a merge goes into packed weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from ..errors import ConfigError, StateError
from ..files.checkpoint import Checkpoint
from ..integrations.model_class import ModelClass
from ..spec.targets import is_embedding, is_head
from .placement import Placement
from .probe import quantized_layers
from .updates import AdapterUpdates


def matrices(base: Checkpoint, placement: Placement, without: Set[str]) -> set[str]:
    """Paths of what may be a linear layer: a matrix, but for tensors of these names, in the base or in what is written."""
    return {
        name.removesuffix(".weight")
        for name, source in placement.names.items()
        if name.endswith(".weight") and len(base.tensors[source].shape) == 2 and without.isdisjoint((name, source))
    }


def layers_to_pack(
    matrices: Collection[str], named: Sequence[str] | None, adapters: Sequence[AdapterUpdates], known: ModelClass | None
) -> set[str]:
    """Paths of the layers that are packed: those named, or that an adapter's probe names, or else all that are linear.

    Args:
        matrices: paths of what may be one.
        named: by the recipe; None: it does not say.
        adapters: the adapters.
        known: what transformers knows of the model's class.

    Raises:
        ConfigError: one that is named is no matrix of the base.
    """
    if named is None:
        named = next((names for adapter in adapters if (names := quantized_layers(adapter.directory))), None)
    if named is not None:
        named = set(named).difference(*(adapter.packed_experts for adapter in adapters))  # they have no packed form in files
        if absent := sorted(set(named) - set(matrices)):
            raise ConfigError(f"{absent[0]!r} is to be packed, and is no matrix of this base")
        return set(named)
    if known:
        linear = {path for path in matrices if path in known.linear or known.renamed(path) in known.linear}
    else:
        linear = {path for path in matrices if not is_embedding(path)}
    return {path for path in linear.difference(*(a.split for a in adapters)) if not is_head(path)}


def refuse_renamed(layers: Collection[str], known: ModelClass | None) -> None:
    """Raises a StateError if transformers renames some of these as it loads them, and would not find their scales."""
    renamed = sorted(path for path in layers if known and path not in known.linear and known.renamed(path) in known.linear)
    if renamed:
        raise StateError(
            f"transformers calls {renamed[0]!r} otherwise in memory, and packed layers of such models are not written; leave "
            "base_as out, which makes them dense"
        )
