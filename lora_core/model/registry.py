"""Which adapters a model holds: one record for each, kept on the module that `inject` was given. What becomes of them,
`lifecycle.py` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..bases import Base
from ..errors import AdapterNameError, ConfigError
from ..layers.base import LoraLayer
from ..methods.activated import Text
from ..spec.config import LoraConfig
from ..spec.targets import LayerPlan
from . import copies
from .atomic import Record
from .copies import submodule
from .untie import Broken
from .wrappers import unwrap

ATTRIBUTE = "lora_registry"


@dataclass
class Adapter(Record):
    """One adapter of a model.

    Attributes:
        config: its settings.
        layers: {path of a layer that carries its A and B: its rank and scaling there}.
        saved_modules: paths of the modules that it trains whole.
        copied: paths of the base's tensors that it has a copy of, in place of the base's while it is active.
        untied: those of them that the base ties to tensors which it has no part in.
        kept: those of them that it does not train: embeddings that came with its file, of a vocabulary that grew.
        tokens: paths of the layers that it trains some rows of, one for each token.
        trainable: whether its tensors require gradients while it is active.
        scale: what its updates are multiplied by, besides what its configuration says (`scale_adapter`).
    """

    config: LoraConfig
    layers: Mapping[str, LayerPlan]
    saved_modules: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    trainable: bool = True
    scale: float = 1.0

    @property
    def stored(self) -> LoraConfig:
        """Its settings as a file has them.

        Raises:
            ConfigError: it is scaled by what a file can't say.
        """
        config = self.config.as_stored()
        return config if self.scale == 1 else config.scaled_by(self.scale)

    @property
    def stored_layers(self) -> Mapping[str, LayerPlan]:
        """{path: what those settings mean there}. Raises as `stored` does."""
        config = self.stored
        return {path: LayerPlan.of(config, settings.owner) for path, settings in self.layers.items()}


@dataclass
class Registry(Record):
    """The adapters of one model.

    Attributes:
        adapters: {name: record}, in the order they were added.
        active: names of the active ones.
        disabled: {of each `disable_adapters` that is open: the thread that it is in}.
        suspended: names of the adapters that are active again when the last of these is closed.
        trainable_before: paths of the parameters that required gradients before the first adapter froze the base.
        held_back: what the model's own library is not to do meanwhile; see `conventions.hold_back`.
        adopted: other libraries' layers whose forward is ours while there are adapters, and what holds their weights.
        mixing: threads that are in a mixed batch.
        folded_ties: what ties the base's weights again, once adapters that are folded in are unfolded.
        text: what the model reads, while an adapter asks for it.
        ties: what says that they are tied, again, once no adapter is left that trains some of them apart.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    disabled: dict[object, int] = field(default_factory=dict)
    suspended: tuple[str, ...] = ()
    trainable_before: frozenset[str] = frozenset()
    held_back: dict[str, Any] = field(default_factory=dict)
    adopted: list[tuple[Base, nn.Module]] = field(default_factory=list)
    mixing: set[int] = field(default_factory=set)
    folded_ties: Broken | None = None
    ties: Broken | None = None
    text: Text | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"disabled": {}, "mixing": set()}  # a copy of the model is in nobody's hands


def registry_of(model: nn.Module) -> Registry:
    """The registry of `model`.

    Raises:
        AdapterNameError: it holds no adapters.
    """
    registry = unwrap(model).__dict__.get(ATTRIBUTE)
    if registry is None:
        raise AdapterNameError(
            f"this {type(model).__name__} holds no adapters; call inject() or load_adapter() on it first, "
            "and pass the same module that they were given"
        )
    return registry


def has_adapters(model: nn.Module) -> bool:
    return ATTRIBUTE in unwrap(model).__dict__


def find_adapter(model: nn.Module, name: str) -> Adapter:
    """The record of the adapter `name`.

    Raises:
        AdapterNameError: there is none; names those that there are.
    """
    adapters = registry_of(model).adapters
    if name not in adapters:
        raise AdapterNameError(f"no adapter {name!r} on this model; it holds {', '.join(map(repr, adapters))}")
    return adapters[name]


def adapter_layers(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of each layer that carries the A and B of `adapter`, or what its method has in their place."""
    model = unwrap(model)
    for path in adapter.layers:
        yield path, submodule(model, path)


def changed_layers(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of each layer that `adapter` changes: those, and the layers of which it has rows."""
    yield from adapter_layers(model, adapter)
    for path in adapter.tokens:
        yield path, submodule(unwrap(model), path)


def lora_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """What the adapter `name` trains on its layers (A, B, ...), layer by layer, each once."""
    trained = (p for _, layer in changed_layers(model, find_adapter(model, name)) for p in layer.trained(name))
    yield from {id(parameter): parameter for parameter in trained}.values()


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """All that the adapter `name` trains: its A, B, ..., and its copies of the base's parameters, each once."""
    yield from lora_parameters(model, name)
    own = {path: t for path, t in copies_of(model, name).items() if path not in find_adapter(model, name).kept}
    yield from {id(t): t for t in own.values() if isinstance(t, nn.Parameter)}.values()


def copies_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """{path: tensor} of the adapter's copies of the base's tensors."""
    return {path: copies.copy_of(unwrap(model), name, path) for path in find_adapter(model, name).copied}


def check_new_name(model: nn.Module, name: str) -> None:
    """Refuses a name that can't be a directory and a key of a module, or that is taken."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]{0,127}", name) or hasattr(nn.ParameterDict(), name):
        raise ConfigError(
            f"adapter_name must be made of letters, digits, '_' and '-', at most 128, and be no attribute of torch's "
            f"ParameterDict, not {name!r}"
        )
    if has_adapters(model) and name in registry_of(model).adapters:
        raise AdapterNameError(
            f"the model has an adapter {name!r} already; choose another adapter_name or delete_adapter(model, {name!r})"
        )
