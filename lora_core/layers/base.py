"""`LoraLayer`: adapters by name on one layer, which of them are active, and the only fold / unfold code.

An injected layer is the base layer itself, given a subclass of its class: same object, same parameters, same state-dict
keys. So `layer.weight` still works, hooks and tied weights survive, `isinstance(layer, nn.Linear)` holds, and `release`
gives back exactly what was there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import MergeError


class LoraLayer(nn.Module):
    """What every kind of adapted layer shares. A subclass says how to compute and where a delta goes.

    Attributes:
        lora_A: {adapter: A}, (r, d_in).
        lora_B: {adapter: B}, (d_out, r).
        lora_scaling: {adapter: the factor before B A}.
        lora_dropout: {adapter: dropout probability}.
        lora_active: names of the adapters that the forward applies, in order.
        lora_folded: names of the adapters that are folded into `weight` now.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    @classmethod
    def adopt(cls, module: nn.Module) -> LoraLayer:
        """Turns `module` into a `cls`, in place; no adapter is on it yet, so it computes what it did."""
        module.lora_base_class = type(module)
        module.__class__ = cls
        module.lora_A, module.lora_B = nn.ParameterDict(), nn.ParameterDict()
        module.lora_scaling, module.lora_dropout = {}, {}
        module.lora_active = module.lora_folded = ()
        module.lora_unfolded_weight = ()  # (weight, dtype of the folded one): in a tuple it is not registered
        return module

    def release(self) -> nn.Module:
        """The reverse of `adopt`: the base layer as it was, with its weight unfolded. Adapters are dropped."""
        self.unfold()
        self.__class__ = self.lora_base_class
        for name in ("lora_A", "lora_B", "lora_scaling", "lora_dropout", "lora_active", "lora_folded"):
            delattr(self, name)
        del self.lora_unfolded_weight, self.lora_base_class
        return self

    # --- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, r: int, scaling: float, dropout: float, random_B: bool = False) -> None:
        """Adds an adapter: A Kaiming-uniform (a = sqrt(5)), B zero unless `random_B`; not active yet.

        A and B are float32 beside 16-bit and 4-bit weights, where the optimiser needs the precision, else of the
        weight's dtype.
        """
        d_in, d_out = self.lora_shape()
        dtype = self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32
        A = torch.empty(r, d_in, dtype=dtype, device=self.weight.device)
        B = torch.zeros(d_out, r, dtype=dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if random_B:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(A, requires_grad=False)
        self.lora_B[name] = nn.Parameter(B, requires_grad=False)
        self.lora_scaling[name], self.lora_dropout[name] = scaling, dropout

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_B, self.lora_scaling, self.lora_dropout):
            del table[name]

    def activate(self, names: Iterable[str]) -> None:
        """Makes the forward apply those of `names` that are on this layer."""
        self.lora_active = tuple(name for name in names if name in self.lora_scaling)

    def active_products(self) -> list[tuple[Tensor, Tensor, float, float]]:
        """(A, B, scaling, dropout) for each product that the forward must add.

        Adapters of the same dropout make one product of summed rank, and share its dropout mask.
        """
        if len(self.lora_active) == 1:
            (name,) = self.lora_active
            return [(self.lora_A[name], self.lora_B[name], self.lora_scaling[name], self._dropout_now(name))]
        groups: dict[float, list[str]] = {}
        for name in self.lora_active:
            groups.setdefault(self._dropout_now(name), []).append(name)
        return [
            (
                torch.cat([self.lora_A[name] for name in names]),
                torch.cat([self.lora_B[name] * self.lora_scaling[name] for name in names], dim=1),
                1.0,
                dropout,
            )
            for dropout, names in groups.items()
        ]

    def _dropout_now(self, name: str) -> float:
        return self.lora_dropout[name] if self.training else 0.0

    # --- folding ----------------------------------------------------------------------------------------------------

    def lora_shape(self) -> tuple[int, int]:
        """(d_in, d_out) of the matrix that an adapter updates."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The weight that this layer computes with: a new tensor, in float32, or float64 if it is that."""
        return self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)

    def dense_dtype(self) -> torch.dtype:
        """The dtype of the weight once it is dense."""
        return self.weight.dtype

    def add_delta_(self, W: Tensor, name: str) -> None:
        """Adds the update of an adapter to W, a tensor laid out as the weight, in place."""
        raise NotImplementedError

    def folded_weight(self, names: Iterable[str]) -> Tensor:
        """The dense weight with those of `names` that are on this layer folded in: float32 or float64, a new tensor.

        Raises:
            MergeError: the result has NaN or infinite values.
        """
        W = self.dense_weight()
        names = [name for name in names if name in self.lora_scaling]
        for name in names:
            self.add_delta_(W, name)
        if not torch.stack(W.aminmax()).isfinite().all():  # one pass, and NaN comes through
            raise MergeError(f"folding in {', '.join(names)} gives NaN or infinite weights")
        return W

    def update_norm(self, names: Iterable[str]) -> float:
        """Frobenius norm of the sum of the updates of `names`, from their factors: |B A|^2 = sum of (B^T B) * (A A^T)."""
        A = torch.cat([self.lora_A[name].detach().double() for name in names])  # R d_in, R the summed rank
        B = torch.cat([self.lora_B[name].detach().double() * self.lora_scaling[name] for name in names], dim=1)  # d_out R
        return ((B.t() @ B) * (A @ A.t())).sum().clamp(min=0).sqrt().item()

    def fold(self, names: Iterable[str], dtype: torch.dtype | None = None) -> float:
        """Folds those of `names` that are on this layer into `weight`, cast to `dtype` (None: that of the dense weight).

        The weight before is kept, for `unfold`. The folded one is a parameter of its own, dense for a 4-bit layer: what
        is tied to this weight elsewhere keeps the old values.

        Returns:
            What the cast lost of the update D: |cast(W + D) - (W + D)| / |D|; 0 without a cast.
        """
        names = tuple(name for name in names if name in self.lora_scaling)
        exact = self.folded_weight(names)
        weight = exact.to(dtype or self.dense_dtype())
        lost = 0.0
        if weight.dtype != exact.dtype:
            if weight.dtype == torch.float16 and not torch.stack(weight.aminmax()).isfinite().all():
                raise MergeError("the merged weight overflows float16; use dtype=torch.bfloat16")
            update = self.update_norm(names)
            lost = exact.sub_(weight).norm().item() / update if update else 0.0
        self.lora_unfolded_weight = (self.weight, weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_folded = names
        return lost

    def keep_folded(self) -> None:
        """Makes the folded weight the layer's own; the one before is dropped."""
        self.lora_unfolded_weight = self.lora_folded = ()

    def unfold(self) -> None:
        """Puts back the weight from before `fold`, byte for byte."""
        if self.lora_folded:
            (weight, folded_dtype), folded = self.lora_unfolded_weight, self.weight
            # The model may have been moved or cast while this weight was waiting.
            if weight.is_floating_point():
                weight.data = weight.data.to(folded.device, weight.dtype if folded.dtype == folded_dtype else folded.dtype)
            elif weight.device != folded.device:
                weight = weight.to(folded.device)  # a 4-bit one, with its scales
            self.weight = weight
            self.lora_unfolded_weight = self.lora_folded = ()
