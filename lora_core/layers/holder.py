"""`AdapterHolder`: the adapters of one layer, by name: their tensors, and which of them are active.

An injected layer is the base layer itself, given a subclass of its class: same object, same parameters, same state-dict
keys. So `layer.weight` still works, hooks and tied weights survive, `isinstance(layer, nn.Linear)` holds, and `release`
gives back exactly what was there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..bases.forwards import change_class, execution_device, stored_entry
from ..errors import StateError
from ..methods.base import Method
from ..methods.registry import LORA, all_tables


def share(tensors: Mapping[str, Tensor], layers: Iterable[AdapterHolder]) -> dict[AdapterHolder, dict[str, nn.Parameter]]:
    """{layer: {table: parameter}} of tensors that all `layers` of an adapter hold: one parameter on each device."""
    made: dict[torch.device, dict[str, nn.Parameter]] = {}
    for device in map(execution_device, layers := tuple(layers)):
        if device not in made:
            made[device] = {t: nn.Parameter(tensor.to(device), requires_grad=False) for t, tensor in tensors.items()}
    return {layer: made[execution_device(layer)] for layer in layers}


class SharedTable(nn.ParameterDict):
    """A table whose entries other layers hold too."""

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """transformers asks modules for this as it saves: what may be tied, and then goes into a file once."""
        return {name: name for name in self}


class AdapterHolder(nn.Module):
    """A layer that holds adapters. What they do to it, its subclass `LoraLayer` says.

    An adapter's tensors stand in the tables of its method, which are `nn.ParameterDict`s by adapter: `lora_A`, `lora_B` and
    what else `methods/` says. (`lora_A0` and `lora_B0` are what A and B started from, for a start from the weight: such an
    adapter adds s (B A - B0 A0), so the base is left alone and the start changes nothing.)

    Attributes:
        lora_tables: names of the tables that it has: those of the methods that it met.
        lora_method: {adapter: what it adds}.
        lora_scaling: {adapter: s}.
        lora_dropout: {adapter: probability of dropout on the adapter's input}.
        lora_active: names of the adapters that the forward applies, in order.
        lora_folded: names of the adapters that are folded into `weight` now.
        lora_masks: the siblings that share a dropout mask with it; None if none do.
        lora_rows: {thread: the adapters that each row of its batch uses}.
        lora_reader: what the model reads, for methods that ask; None if none does.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    zero_A = False  # whether a new adapter has A zero and B random, instead of the reverse

    @classmethod
    def adopt(cls, module: nn.Module) -> AdapterHolder:
        """Turns `module` into a `cls`, in place; no adapter is on it yet, so it computes what it did."""
        base_class = type(module)
        change_class(module, cls)
        module.lora_base_class = base_class
        module.lora_tables = ()
        module.lora_scaling, module.lora_dropout, module.lora_method = {}, {}, {}
        module.lora_rows, module.lora_masks, module.lora_reader = {}, None, None
        module.lora_active = module.lora_folded = ()
        module.lora_unfolded = ()  # (weight, bias, dtype of the folded weight): in a tuple they are not registered
        return module

    def release(self) -> nn.Module:
        """The reverse of `adopt`: the base layer as it was, with its weight unfolded. Adapters are dropped.

        Raises:
            StateError: it was parametrised meanwhile, which is a matter of its class.
        """
        self.unfold()
        if is_parametrized(self):
            raise StateError(
                f"a {self.lora_base_class.__name__} was parametrised after it got its adapter, and would lose its weight with "
                "it; call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
            )
        self.leave_mask_group()
        change_class(self, self.lora_base_class)
        plain = (
            "scaling",
            "dropout",
            "method",
            "rows",
            "masks",
            "reader",
            "active",
            "folded",
            "unfolded",
            "base_class",
            "tables",
        )
        for name in (*self.lora_tables, *(f"lora_{attribute}" for attribute in plain)):
            delattr(self, name)
        return self

    def add_tables(self, names: Iterable[str]) -> None:
        """Makes the tables of these names that it has not."""
        new, known = tuple(name for name in names if name not in self.lora_tables), all_tables()
        for name in new:
            setattr(self, name, SharedTable() if known[name].shared or known[name].tied else nn.ParameterDict())
        self.lora_tables += new

    def leave_mask_group(self) -> None:
        """Makes the layer draw its dropout masks alone again."""
        if self.lora_masks is not None:
            self.lora_masks.leave(self)
            self.lora_masks = None

    def add_adapter(
        self,
        name: str,
        r: int,
        scaling: float,
        dropout: float,
        init: Any = True,
        method: Method = LORA,
        shared: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """Adds an adapter, started as `init` says (see `methods/start.py`); not active yet.

        Its tensors are float32 beside 16-bit and 4-bit weights, where the optimiser needs the precision, else of the
        weight's dtype. `shared` has those that it shares with other layers, in the place of their start.
        """
        self.add_tables(table.name for table in method.tables)
        dtype = self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32
        empty = torch.empty(0, dtype=dtype, device=execution_device(self))
        for table, tensor in self.started(method, empty, r, scaling, init).items():
            getattr(self, table)[name] = nn.Parameter(tensor, requires_grad=False)
        for table, parameter in (shared or {}).items():
            getattr(self, table)[name] = parameter
        self.put(name, method, scaling, dropout)
        method.settle(self, name)

    def started(self, method: Method, like: Tensor, r: int, scaling: float, init: Any) -> Mapping[str, Tensor]:
        """{table: the values that an adapter starts with}; see `Method.start`."""
        return method.start(self, like, r, scaling, init)

    def put(self, name: str, method: Method, scaling: float, dropout: float) -> None:
        """Makes what is in the tables under `name` an adapter."""
        self.lora_method[name], self.lora_scaling[name], self.lora_dropout[name] = method, scaling, dropout

    def delete_adapter(self, name: str) -> None:
        for table in self.lora_tables:
            if name in getattr(self, table):
                del getattr(self, table)[name]
        del self.lora_method[name], self.lora_scaling[name], self.lora_dropout[name]
        if not any(method.reads_text for method in self.lora_method.values()):
            self.lora_reader = None

    def rename_adapter(self, old: str, new: str) -> None:
        tables = [getattr(self, table) for table in self.lora_tables]
        for table in (*tables, self.lora_method, self.lora_scaling, self.lora_dropout):
            if old in table:
                table[new] = table.pop(old)
        self.lora_active, self.lora_folded = (
            tuple(new if name == old else name for name in names) for names in (self.lora_active, self.lora_folded)
        )

    def activate(self, names: Iterable[str]) -> None:
        """Makes the forward apply those of `names` that are on this layer."""
        self.lora_active = self.present(names)

    def present(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that are on this layer."""
        return tuple(name for name in names if name in self.lora_scaling)

    def trained(self, name: str) -> Iterator[nn.Parameter]:
        """What is trained of an adapter."""
        tables = (getattr(self, table.name) for table in self.lora_method[name].tables if table.trained)
        return (table[name] for table in tables if name in table)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) of the s B A that stands beside W in what an adapter computes."""
        return self.lora_method[name].product(self, name)

    def row_scale(self, name: str) -> Tensor | None:
        """f of an adapter, (d_out,), with which the output of W + s B A is multiplied; None: 1."""
        return self.lora_method[name].row_scale(self, name)

    def own_bias(self, name: str) -> Tensor | None:
        """s c, (d_out,), which an adapter adds to the output; None if it has no bias of its own."""
        table = self.lora_method[name].bias_table
        return None if table is None else stored_entry(getattr(self, table), name) * self.lora_scaling[name]

    def own_biases(self, names: Iterable[str]) -> Tensor | None:
        """The sum of those of `names`."""
        own = [bias for bias in map(self.own_bias, names) if bias is not None]
        return sum(own[1:], start=own[0]) if own else None

    def joined_factors(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """(A, B) of the sum of the products of `names`, of summed rank, with the scalings in B."""
        pairs = [(*self.factors(name), self.lora_scaling[name]) for name in names]
        return torch.cat([A for A, _, _ in pairs], dim=-2), torch.cat([B * s for _, B, s in pairs], dim=-1)
