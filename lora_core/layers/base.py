"""`LoraLayer`: what adapters do to a layer, in the forward and folded into its weight. The only fold / unfold code.

Whatever the kind of layer, its weight is also a matrix W of (d_out, d_in), and an adapter adds to it

    D = s B A                                                     LoRA (arXiv 2106.09685, equation 3)
    D = f (W + s B A) - W,   f = m / |W + s B A| for each row     DoRA (arXiv 2402.09353, equation 5)

Several active adapters add up: each D is worked out from the base alone, so their order does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident

import torch
from torch import Tensor, nn

from ..bases.forwards import refuse_offloaded, stored_entry, stored_weight
from ..errors import MergeError, TargetError
from ..maths.lora import dora_factor, fold_
from ..maths.loss import Cost, cast, cost, is_finite
from .holder import AdapterHolder
from .rows import RowAdapters, check_rows
from .traits import Traits

Product = tuple[Tensor, Tensor, float, float]  # A, B, scaling, dropout


class LoraLayer(Traits, AdapterHolder):
    """What every kind of adapted layer shares. A subclass says how to multiply, and how its weight is a matrix."""

    bias: Tensor | None

    # --- what a kind of layer says ----------------------------------------------------------------------------------

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of the weight, as a matrix, of a layer that was adopted or may be."""
        raise NotImplementedError

    @classmethod
    def file_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """{table: the shape that an adapter's tensors have in PEFT's files}."""
        d_in, d_out = cls.matrix_shape(layer)
        return {"lora_A": (r, d_in), "lora_B": (d_out, r), "lora_magnitude": (d_out,), "lora_bias": (d_out,)}

    def as_matrix(self, W: Tensor) -> Tensor:
        """W, laid out as the layer's weight, as (d_out, d_in): a view."""
        raise NotImplementedError

    def base_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the base layer computes, with this bias in place of its own."""
        raise NotImplementedError

    def product(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        """scaling * B A dropout(x): what an adapter adds to the output, in plain operations."""
        raise NotImplementedError

    def adapted_forward(self, x: Tensor, bias: Tensor | None, products: list[Product]) -> Tensor:
        """The base layer's output with the products added, rounded once to the dtype that the base gives."""
        y = self.base_forward(x, bias)
        return sum((self.product(x, *product) for product in products), start=y).to(y.dtype)

    def add_products_by_row(self, y: Tensor, x: Tensor, rows: RowAdapters) -> Tensor:
        """y with each row's product added to it."""
        own = rows.A[rows.index], rows.B[rows.index]  # N R d_in, N R d_out
        return (y + torch.func.vmap(lambda x, A, B: self.product(x, A, B.t(), 1.0, 0.0))(x, *own)).to(y.dtype)

    def spread(self, values: Tensor, y: Tensor) -> Tensor:
        """`values`, one for each output feature (d_out,) and maybe row (N, d_out), in a shape that y broadcasts with."""
        return values if values.dim() == 1 else values.view(len(values), *(1,) * (y.dim() - 2), -1)

    def dense_weight(self) -> Tensor:
        """The weight that this layer computes with: a new tensor, in float32, or float64 if it is that."""
        weight = stored_weight(self).detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    def dense_dtype(self) -> torch.dtype:
        """The dtype of the weight once it is dense."""
        return self.weight.dtype

    # --- the forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.lora_rows and (rows := self.lora_rows.get(get_ident())):
            return self._mixed_forward(x, rows)
        if self.lora_folded or not self.lora_active:
            return self.base_forward(x, self.bias)
        if any(name in self.lora_magnitude for name in self.lora_active):
            return self._dora_forward(x)
        y = self.adapted_forward(x, self.bias, self.active_products())
        own = self._own_bias()
        return y if own is None else (y + self.spread(own, y)).to(y.dtype)

    def _own_bias(self) -> Tensor | None:
        """The sum of the active adapters' biases of B, (d_out,)."""
        names = [name for name in self.lora_active if name in self.lora_bias]
        own = [stored_entry(self.lora_bias, name) * self.lora_scaling[name] for name in names]
        return sum(own[1:], start=own[0]) if own else None

    def active_products(self) -> list[Product]:
        """What the forward must add. Adapters without dropout make one product of summed rank; each other has its own mask."""
        plain = [name for name in self.lora_active if not self._dropout_now(name)]
        dropped = [name for name in self.lora_active if name not in plain]
        products = [(*self.factors(name), self.lora_scaling[name], self._dropout_now(name)) for name in dropped]
        if len(plain) == 1:
            products.append((*self.factors(plain[0]), self.lora_scaling[plain[0]], 0.0))
        elif plain:
            products.append((*self.joined_factors(plain), 1.0, 0.0))
        return products

    def _dropout_now(self, name: str) -> float:
        return self.lora_dropout[name] if self.training else 0.0

    def _dora_forward(self, x: Tensor) -> Tensor:
        factors = {name: self.dora_factor(name) for name in self.lora_active if name in self.lora_magnitude}
        if len(self.lora_active) == 1 and not self._rounds(x):  # f (W x + s B A x): one pass over the plain layer's output
            (factor,) = factors.values()
            y = self.adapted_forward(x, None, self.active_products())
            dtype, y = y.dtype, y * self.spread(factor.to(y.dtype), y)
        else:
            y = self.base_forward(x, None)
            dtype, y = y.dtype, y * self.spread(1 + sum(f - 1 for f in factors.values()), y)
            for name in self.lora_active:
                A, B = self.factors(name)
                B = B * factors[name].to(B.dtype)[:, None] if name in factors else B
                y = y + self.product(x, A, B, self.lora_scaling[name], self._dropout_now(name))
        for bias in (self.bias, self._own_bias()):
            y = y if bias is None else y + self.spread(bias, y)
        return y.to(dtype)

    def _rounds(self, x: Tensor) -> bool:
        """Whether the base gives 16 bits and the update has more: then what is made of their sum is rounded at the end."""
        dtype = x.dtype if x.is_floating_point() else self.weight.dtype
        return dtype.itemsize < 4 and not torch.is_autocast_enabled(x.device.type)

    def dora_factor(self, name: str) -> Tensor:
        """DoRA's f = m / |W + s B A|, (d_out,), with the norm a constant in the gradient."""
        return dora_factor(self.direction(name), stored_entry(self.lora_magnitude, name))

    @torch.no_grad()
    def direction(self, name: str) -> Tensor:
        """W + s B A of one adapter, (d_out, d_in), a new tensor in float32 or float64."""
        return fold_(self.as_matrix(self.dense_weight()), *self.factors(name), self.lora_scaling[name])

    def _mixed_forward(self, x: Tensor, rows: RowAdapters) -> Tensor:
        index = rows.index
        check_rows(x, index)
        y = self.base_forward(x, None if rows.factor is not None else self.bias)
        dtype = y.dtype
        if rows.A.shape[1]:
            y = self.add_products_by_row(y, x, rows)
        if rows.factor is not None:
            y = y * self.spread(rows.factor[index], y)
            y = y if self.bias is None else y + self.spread(self.bias, y)
        y = y if rows.bias is None else y + self.spread(rows.bias[index], y)
        return y.to(dtype)

    # --- folding ----------------------------------------------------------------------------------------------------

    def folded_weight(self, names: Iterable[str]) -> Tensor:
        """The dense weight with those of `names` that are on this layer folded in: float32 or float64, a new tensor.

        Raises:
            MergeError: the result has NaN or infinite values.
        """
        names = self.present(names)
        W = self.dense_weight()
        base = W.clone() if len(names) > 1 and any(name in self.lora_magnitude for name in names) else None
        for name in names:
            update = (*(t.detach() for t in self.factors(name)), self.lora_scaling[name])
            if name not in self.lora_magnitude:
                fold_(self.as_matrix(W), *update)
            elif base is None:
                fold_(self.as_matrix(W), *update, self.lora_magnitude[name].detach())
            else:
                V = base.clone()
                fold_(self.as_matrix(V), *update, self.lora_magnitude[name].detach())
                W += V.sub_(base)
        if not is_finite(W):
            raise MergeError(f"folding in {', '.join(names)} gives NaN or infinite weights")
        return W

    def update_norm(self, names: Iterable[str]) -> float:
        """Frobenius norm of the sum of the updates of `names`."""
        if any(name in self.lora_magnitude for name in names):
            return self.folded_weight(names).sub_(self.dense_weight()).norm().item()
        A, B = (factor.detach().double() for factor in self.joined_factors(names))  # R d_in, d_out R; R the summed rank
        return ((B.t() @ B) * (A @ A.t())).sum().clamp(min=0).sqrt().item()  # |B A|^2 = sum of (B^T B) * (A A^T)

    def folded_bias(self, names: Iterable[str]) -> nn.Parameter | None:
        """The bias with those of the adapters added; the layer's own if none has one."""
        own = [self.lora_bias[name].detach() * self.lora_scaling[name] for name in names if name in self.lora_bias]
        if not own:
            return self._parameters.get("bias")
        if self.bias is None:
            raise MergeError("the adapter has a bias (lora_bias) and the layer has none to fold it into")
        bias = self.bias.detach().to(own[0].dtype) + sum(own)
        if not bias.isfinite().all():
            raise MergeError(f"folding in {', '.join(names)} gives NaN or infinite biases")
        return nn.Parameter(bias.to(self.bias.dtype), requires_grad=False)

    def fold(self, names: Iterable[str], dtype: torch.dtype | None = None) -> Cost:
        """Folds those of `names` that are on this layer into `weight`, cast to `dtype` (None: that of the dense weight).

        The weight before is kept, for `unfold`. The folded one is a parameter of its own, dense for a 4-bit layer: what
        is tied to this weight elsewhere keeps the old values.

        Returns:
            What the cast lost of the update.
        """
        refuse_offloaded(self.lora_base_class.__name__, self, "a merged weight")
        names = self.present(names)
        exact, bias = self.folded_weight(names), self.folded_bias(names)
        weight = cast(exact, dtype or self.dense_dtype(), "the merged weight")
        spent = Cost()
        if weight.dtype != exact.dtype:
            base = stored_weight(self).detach() if self.weight.is_floating_point() else self.dense_weight()
            spent = cost(exact, base, weight, None if base.dtype == weight.dtype else base.to(weight.dtype))
        self.lora_unfolded = (self.weight, self._parameters.get("bias"), weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not self._parameters.get("bias"):
            self.bias = bias
        self.lora_folded = names
        return spent

    def folds_in_place(self, names: Iterable[str]) -> bool:
        """Whether the updates of `names` can be added to the weight's own values, with nothing to refuse.

        They can to a dense weight that is summed in its own dtype, if |W| + s |B| |A| shows that no sum overflows: W is read
        once, and no copy is made that would tell.
        """
        W, names = self.weight, self.present(names)
        plain = not any(name in self.lora_magnitude or name in self.lora_bias for name in names)
        if W.dtype not in (torch.float32, torch.float64) or not plain or not W.is_contiguous():
            return False
        if W.is_meta or W.is_inference():  # no values here; no version that would tell of a change
            return False
        largest = torch.stack(W.detach().aminmax()).abs().max().double()
        for name in names:
            A, B = (factor.detach().abs().double() for factor in self.factors(name))
            largest += abs(self.lora_scaling[name]) * (B.amax(0) @ A.amax(1))  # of each rank the largest product
        return bool(largest < torch.finfo(W.dtype).max)  # no, if anything is NaN

    def steps_in_place(self, names: Iterable[str]) -> Iterator[Callable[[], Tensor]]:
        """Operations that each add one of `names` to the weight's own values, for good; see `folds_in_place`."""
        W = self.as_matrix(self.weight.detach())  # a view that shares the weight's version
        for name in self.present(names):
            A, B = (factor.detach().to(W.dtype) for factor in self.factors(name))
            yield functools.partial(W.addmm_, B, A, alpha=self.lora_scaling[name])

    def keep_folded(self) -> None:
        """Makes the folded weight the layer's own; the one before is dropped."""
        self.lora_unfolded = self.lora_folded = ()

    def has_own_bias(self, names: Iterable[str]) -> bool:
        """Whether one of these adapters has a bias of B on this layer, which folding adds to the layer's."""
        return any(name in self.lora_bias for name in names)

    def check_shape(self, path: str, name: str) -> None:
        """Raises a TargetError if the layer, which is at `path`, has another shape than when it got the adapter."""
        A, B = self.factors(name)
        was, now = (A.shape[1], B.shape[0]), self.matrix_shape(self)
        if was != now:
            raise TargetError(
                f"{path} maps {now[0]} to {now[1]} features, and adapter {name!r} was made for {was[0]} to {was[1]}: it was "
                "resized since; resize a model, as resize_token_embeddings does, before it gets adapters"
            )

    def check_stored(self, names: Iterable[str]) -> None:
        """Raises a MergeError if what folding these adapters replaces is computed from other tensors, and would not last."""
        for tensor in (self.weight_name, "bias") if self.has_own_bias(names) else (self.weight_name,):
            if tensor not in self._parameters:
                raise MergeError(
                    f"its {tensor} is computed from other tensors (pruned, or weight norm); make it a plain one first, as "
                    f"torch.nn.utils.prune.remove(layer, {tensor!r}), remove_weight_norm or remove_parametrizations do"
                )

    def unfold(self) -> None:
        """Puts back the weight and bias from before `fold`, byte for byte.

        Raises:
            MergeError: one of them was pruned, or is computed otherwise, since.
        """
        if self.lora_folded:
            (weight, bias, folded_dtype), folded = self.lora_unfolded, self.weight
            self.check_stored(self.lora_folded)
            # The model may have been moved or cast while these were waiting.
            if weight.is_floating_point():
                weight.data = weight.data.to(folded.device, weight.dtype if folded.dtype == folded_dtype else folded.dtype)
            elif weight.device != folded.device:
                weight = weight.to(folded.device)  # a 4-bit one, with its scales
            self.weight = weight
            if self.has_own_bias(self.lora_folded):
                bias.data = bias.data.to(self.bias.device, self.bias.dtype)
                self.bias = bias
            self.lora_unfolded = self.lora_folded = ()
