"""`Method`: what an adapter adds to a layer, and how its tensors stand in PEFT's files. The contract, and what follows from it.

An adapter makes of the base's output W x + b, (..., d_out) from x, (..., d_in),

    f * (W x + s B A dropout(x)) + b + s c        W: (d_out, d_in);  A: (r, d_in);  B: (d_out, r);  f and c: (d_out,)

A method says where A and B come from, and f and c if it has any. From that the layer works out the rest: the forward, what is
folded into W, what a row of a mixed batch needs, the norm of the update. Several active adapters add up: the change of each is
worked out from the base alone. One that has no A and B gives `fold_` instead: its update D = fold(W) - W is then A, and B is
the identity.

A method has no state. An adapter's tensors stand in tables on the layer, `torch.nn.ParameterDict`s by the adapter's name, so
that state dicts, FSDP2 and checkpoints see them as any parameter.

A method of one's own: derive from `Method` (or from `Lora`), derive a configuration from `LoraConfig`, and register it:

    register_method(Mine())
    inject(model, MineConfig(r=8, target_modules=["q_proj"]))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TargetError
from ..maths.lora import fold_
from ..spec.config import LoraConfig

#: What a table holds, by its shape in memory: (r, d_in), (d_out, r), (d_out,) twice, and (r,). In files a kind of layer may
#: have other shapes for them: a convolution's A is a kernel, and "scale" goes along its channels.
FORMS = ("A", "B", "scale", "bias", "rank")


@dataclass(frozen=True)
class Table:
    """One tensor of an adapter on each of its layers.

    Attributes:
        name: of the layer's table, an attribute of it.
        form: one of FORMS; "" for a shared one, whose shape its method says.
        key: how its key ends in PEFT's files, after the layer's path; of a shared one after "base_model."; "": not in files.
        embedding_key: the same on an embedding, where it is another.
        trained: whether it is trained.
        shared: whether all layers of the adapter hold the same one.
        tied: whether layers that the base ties hold the same one.
    """

    name: str
    form: str
    key: str = ""
    embedding_key: str = ""
    trained: bool = True
    shared: bool = False
    tied: bool = False


class Method:
    """What one kind of adapter does. A subclass gives the attributes and either `product` or `fold_`.

    Attributes:
        name: a word that no other method has; pickled models have it.
        label: what reports call it ("DoRA"); "" for plain LoRA.
        asked: how a configuration asks for it ("use_dora=True"), for messages.
        peft_type: what the files of such an adapter say in `peft_type`.
        config: the class of its configuration.
        tables: its tensors.
        mark: what tells it from others in an adapter's fingerprint.
        is_product: whether it changes W by s B A alone: f is 1.
        replaces_rows: whether it changes some rows of W alone, as `methods/tokens.py` does.
        adds_itself: whether `add` says what it adds to a layer's output, and not A, B, f and c.
        reads_text: whether it asks what the model reads; its layers have `lora_reader` (see `methods/activated.py`).
        unmergeable: why no weight can hold what it does; "" where one can.
        owns_factors: whether A and B are tables of its own that may be overwritten.
        bias_table: the name of the table that holds c; None: there is no c.
        besides: what it may change where B A is zero; "" for nothing.
        needs_base: why making plain LoRA of its files takes the base.
    """

    name = label = asked = besides = needs_base = unmergeable = ""
    peft_type = LoraConfig.peft_type
    config: type[LoraConfig] = LoraConfig
    tables: tuple[Table, ...] = ()
    mark: tuple[Any, ...] = ()
    is_product, owns_factors, replaces_rows = True, False, False
    adds_itself, reads_text = False, False
    bias_table: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its files are those of plain LoRA, or of that with a bias of B."""
        return self.is_product and self.owns_factors

    # --- asked for, and started -------------------------------------------------------------------------------------

    def asked_by(self, config: LoraConfig) -> bool:
        """Whether `config` asks for this method. Of several that say so, the one registered last is meant."""
        return isinstance(config, self.config)

    def check(self, config: LoraConfig, path: str, module: nn.Module, shape: tuple[int, int], r: int) -> None:
        """Raises a TargetError or ConfigError if no such adapter of rank r goes on `module`, of shape (d_in, d_out)."""

    def start_of(self, config: LoraConfig) -> Any:
        """The `init` that `start` is given for this configuration."""
        return config.init_lora_weights

    def shared(self, config: LoraConfig, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """{name of a shared table: its tensor} for layers of these shapes, (d_in, d_out), on the CPU."""
        return {}

    def shared_shapes(self, config: LoraConfig, shapes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """{name of a shared table that is in the files: its shape} for layers of these shapes, (d_in, d_out)."""
        return {}

    def start(self, layer: Any, like: Tensor, r: int, scaling: float, init: Any) -> dict[str, Tensor]:
        """{name of a table: the values that it starts with}, without what is shared or comes with `settle`.

        Args:
            layer: the layer; it has no such adapter yet.
            like: a tensor of the dtype and device that they get.
            r: the rank.
            scaling: s.
            init: what `start_of` said.
        """
        raise NotImplementedError

    def settle(self, layer: Any, name: str) -> None:
        """Sets what follows from A and B, when they start or are given other values that are to change nothing else."""

    # --- what it does -----------------------------------------------------------------------------------------------

    def product(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) of s B A, (r, d_in) and (d_out, r), with gradients."""
        W = layer.as_matrix(layer.dense_weight())
        D = (self.fold_(layer, name, W.clone()) - W) / layer.lora_scaling[name]
        return D, torch.eye(len(D), dtype=D.dtype, device=D.device)

    def row_scale(self, layer: Any, name: str) -> Tensor | None:
        """f, (d_out,), with gradients; None: it is 1."""
        return None

    def add(self, layer: Any, name: str, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output y for x with what the adapter adds to it, where `adds_itself`. It may write into y."""
        raise NotImplementedError

    def fold_(self, layer: Any, name: str, W: Tensor) -> Tensor:
        """f (W + s B A) in the place of W, (d_out, d_in), the base's, in float32 or float64. Returns W."""
        return fold_(W, *layer.factors(name), layer.lora_scaling[name])

    def factors(self, layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
        """(A, B) of the whole update of the weight, D = s B A; None if it is no such product."""
        return self.product(layer, name) if self.is_product else None

    # --- its files --------------------------------------------------------------------------------------------------

    def fields(self, config: LoraConfig) -> dict[str, Any]:
        """{field: value}: what a configuration file says of it, as PEFT's has it."""
        return dataclasses.asdict(config)

    def settings(self, config: LoraConfig) -> tuple[Any, ...]:
        """What a fingerprint says of the method, for JSON: two adapters that compute otherwise have another."""
        return self.mark

    def files(self, config: LoraConfig) -> tuple[Table, ...]:
        """Its tables that are in the files."""
        return tuple(table for table in self.tables if table.key)

    def stored(self, layer: Any, name: str) -> dict[str, Tensor]:
        """{name of a table that is in the files: what stands there}, as in memory."""
        return {table.name: getattr(layer, table.name)[name] for table in self.tables if table.key}

    def rank(self, tensors: Mapping[str, Tensor]) -> int:
        """r of the adapter on a layer that these are of, {name of a table: tensor}."""
        return next(len(tensors[table.name]) for table in self.tables if table.form in ("A", "rank"))

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int]:
        """(d_in, d_out) of the layer that these are of, {name of a table: tensor}; None where they don't say."""
        raise NotImplementedError

    def as_plain(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of its configuration file, for the same adapter as plain LoRA."""
        return fields

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return method_named, (self.name,)


#: {name: method}, those that are registered; `registry.py` fills it.
METHODS: dict[str, Method] = {}


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"no method {name!r} here, only {', '.join(METHODS)}; call register_method first")
    return METHODS[name]


def refuse_foreign_factors(method: Method, what: str) -> None:
    """Raises a ConfigError if the method has no A and B of its own, which `what` is about to write or to add up."""
    if not method.owns_factors:
        raise ConfigError(f"{what} is for adapters with A and B of their own, and {method.label} has none; use plain LoRA")


def refuse_other_than_linear(label: str, path: str, module: nn.Module) -> None:
    """Raises a TargetError if `module`, at `path`, is no linear layer."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or weight is None or weight.dim() != 2:
        raise TargetError(f"target_modules: {path!r} is no linear layer, and {label} is for those; leave it out")


def refuse_unmergeable(method: Method, adapter: object) -> None:
    """Raises a ConfigError if no weight can hold what such an adapter does."""
    if method.unmergeable:
        raise ConfigError(f"{adapter} is {method.label}, which {method.unmergeable}; keep it beside the base")


def refuse_no_product(method: Method, name: str) -> None:
    """Raises a ConfigError if the update of the adapter `name` is no product, and so does not add up with others."""
    refuse_unmergeable(method, f"adapter {name!r}")
    if not method.is_product:
        raise ConfigError(
            f"adapter {name!r} is {method.label}, whose update depends on the weight it is on and does not add up with others; "
            "merge it into the base, or combine plain LoRA adapters"
        )
