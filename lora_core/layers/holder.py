"""`AdapterHolder`: the adapters of one layer, by name: their tensors, and which of them are active.

An injected layer is the base layer itself, given a subclass of its class: same object, same parameters, same state-dict
keys. So `layer.weight` still works, hooks and tied weights survive, `isinstance(layer, nn.Linear)` holds, and `release`
gives back exactly what was there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..bases.forwards import change_class, execution_device, stored_entry
from ..errors import MergeError
from ..methods.start import start

#: The modules that hold an adapter's tensors on a layer, each by adapter name.
TABLES = ("lora_A", "lora_B", "lora_A0", "lora_B0", "lora_magnitude", "lora_bias")

#: Those that are trained.
TRAINED = ("lora_A", "lora_B", "lora_magnitude", "lora_bias")


class AdapterHolder(nn.Module):
    """A layer that holds adapters. What they do to it, its subclass `LoraLayer` says.

    Attributes:
        lora_A: {adapter: A}, (r, d_in).
        lora_B: {adapter: B}, (d_out, r).
        lora_A0, lora_B0: {adapter: the values that A and B started from}, for initialisers that start from the weight:
            such an adapter adds s (B A - B0 A0), so the base is left alone and the start changes nothing.
        lora_magnitude: {adapter: m of DoRA}, (d_out,).
        lora_bias: {adapter: bias of B}, (d_out,).
        lora_scaling: {adapter: s}.
        lora_dropout: {adapter: probability of dropout on the adapter's input}.
        lora_active: names of the adapters that the forward applies, in order.
        lora_folded: names of the adapters that are folded into `weight` now.
        lora_masks: the siblings that share a dropout mask with it; None if none do.
        lora_rows: {thread: the adapters that each row of its batch uses}.
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
        for table in TABLES:
            setattr(module, table, nn.ParameterDict())
        module.lora_scaling, module.lora_dropout, module.lora_rows, module.lora_masks = {}, {}, {}, None
        module.lora_active = module.lora_folded = ()
        module.lora_unfolded = ()  # (weight, bias, dtype of the folded weight): in a tuple they are not registered
        return module

    def release(self) -> nn.Module:
        """The reverse of `adopt`: the base layer as it was, with its weight unfolded. Adapters are dropped.

        Raises:
            MergeError: it was parametrised meanwhile, which is a matter of its class.
        """
        self.unfold()
        if is_parametrized(self):
            raise MergeError(
                f"a {self.lora_base_class.__name__} was parametrised after it got its adapter, and would lose its weight with "
                "it; call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
            )
        self.leave_mask_group()
        change_class(self, self.lora_base_class)
        plain = ("scaling", "dropout", "rows", "masks", "active", "folded", "unfolded", "base_class")
        for name in (*TABLES, *(f"lora_{attribute}" for attribute in plain)):
            delattr(self, name)
        return self

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
        init: bool | str = True,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        """Adds an adapter, started as `init` says (see `initializers.start`); not active yet.

        Its tensors are float32 beside 16-bit and 4-bit weights, where the optimiser needs the precision, else of the
        weight's dtype.
        """
        d_in, d_out = self.matrix_shape(self)
        dtype = self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32
        empty = torch.empty(0, dtype=dtype, device=execution_device(self))
        A, B, from_weight = start(
            init, empty, (d_in, d_out), r, scaling, lambda: self.as_matrix(self.dense_weight()), self.zero_A
        )
        tensors = {"lora_A": A, "lora_B": B}
        if from_weight:
            tensors |= {"lora_A0": A.clone(), "lora_B0": B.clone()}
        if lora_bias:
            tensors["lora_bias"] = empty.new_zeros(d_out)
        for table, tensor in tensors.items():
            getattr(self, table)[name] = nn.Parameter(tensor, requires_grad=False)
        self.lora_scaling[name], self.lora_dropout[name] = scaling, dropout
        if use_dora:
            self.lora_magnitude[name] = nn.Parameter(empty.new_empty(d_out), requires_grad=False)
            self.reset_magnitude(name)

    @torch.no_grad()
    def reset_magnitude(self, name: str) -> None:
        """Makes DoRA's m, if the adapter has one, the norms |W + s B A| as they are: its factor f is then 1."""
        if name in self.lora_magnitude:
            magnitude = self.lora_magnitude[name]
            magnitude.data = self.direction(name).norm(dim=1).to(magnitude)

    def delete_adapter(self, name: str) -> None:
        for table in TABLES:
            if name in getattr(self, table):
                del getattr(self, table)[name]
        del self.lora_scaling[name], self.lora_dropout[name]

    def rename_adapter(self, old: str, new: str) -> None:
        for table in (*(getattr(self, table) for table in TABLES), self.lora_scaling, self.lora_dropout):
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
        """What is trained of an adapter: A, B, and the magnitude and bias if it has them."""
        return (getattr(self, table)[name] for table in TRAINED if name in getattr(self, table))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) of what an adapter adds: its own, or [A; A0] and [B, -B0], of rank 2r, if its start is subtracted."""
        A, B = stored_entry(self.lora_A, name), stored_entry(self.lora_B, name)
        if name in self.lora_A0:
            A0, B0 = stored_entry(self.lora_A0, name), stored_entry(self.lora_B0, name)
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        return A, B

    def file_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) as a file holds them."""
        return self.factors(name)

    def joined_factors(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """(A, B) of the sum of the products of `names`, of summed rank, with the scalings in B."""
        pairs = [(*self.factors(name), self.lora_scaling[name]) for name in names]
        return torch.cat([A for A, _, _ in pairs]), torch.cat([B * s for _, B, s in pairs], dim=1)
