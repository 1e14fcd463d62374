"""Adapters folded into a layer's weight, and taken out again. The only fold / unfold code.

    D = s B A                                     what LoRA adds to W, (d_out, d_in); other methods in `methods/`

Several are folded by the sum of their D, each worked out from the base alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..bases.forwards import refuse_offloaded, stored_weight
from ..errors import StateError, TargetError
from ..maths.lora import fold_
from ..maths.loss import Cost, cast, cost, is_finite
from .holder import AdapterHolder


class FoldedLayer(AdapterHolder):
    """What every kind of layer can do about its weight; how that is a matrix, `LoraLayer` says."""

    @torch.no_grad()
    def folded_weight(self, names: Iterable[str]) -> Tensor:
        """The dense weight with those of `names` that are on this layer folded in: float32 or float64, a new tensor.

        Raises:
            StateError: the result has NaN or infinite values.
        """
        names = self.present(names)
        W = self.dense_weight()
        base = W.clone() if len(names) > 1 and not self._are_products(names) else None
        for name in names:
            method = self.lora_method[name]
            if base is None or method.is_product:
                method.fold_(self, name, self.as_matrix(W))
            else:
                V = base.clone()
                method.fold_(self, name, self.as_matrix(V))
                W += V.sub_(base)
        if not is_finite(W):
            raise StateError(f"folding in {', '.join(names)} gives NaN or infinite weights")
        return W

    def weight_with(self, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """W + scaling B A, (d_out, d_in), a new tensor in float32 or float64: what the norms of a direction are taken of."""
        return fold_(self.as_matrix(self.dense_weight()), A, B, scaling)

    def update_norm(self, names: Iterable[str]) -> float:
        """Frobenius norm of the sum of the updates of `names`."""
        if not self._are_products(names):
            return self.folded_weight(names).sub_(self.dense_weight()).norm().item()
        A, B = (factor.detach().double() for factor in self.joined_factors(names))  # R d_in, d_out R; R the summed rank
        return ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt().item()  # |B A|^2 = sum of (B^T B) * (A A^T)

    def folded_bias(self, names: Iterable[str]) -> nn.Parameter | None:
        """The bias with those of the adapters added; the layer's own if none has one."""
        own = self.own_biases(names)
        if own is None:
            return self._parameters.get("bias")
        if self.bias is None:
            raise StateError("the adapter has a bias (lora_bias) and the layer has none to fold it into")
        bias = self.bias.detach().to(own.dtype) + own.detach()
        if not bias.isfinite().all():
            raise StateError(f"folding in {', '.join(names)} gives NaN or infinite biases")
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
        plain = self._are_products(names) and not self.has_own_bias(names)
        if W.dtype not in (torch.float32, torch.float64) or not plain or not W.is_contiguous():
            return False
        if W.is_meta or W.is_inference():  # no values here; no version that would tell of a change
            return False
        largest = torch.stack(W.detach().aminmax()).abs().max().double()
        for name in names:
            A, B = (factor.detach().abs().double() for factor in self.factors(name))
            products = B.amax(-2) * A.amax(-1)  # of each rank the largest
            largest += abs(self.lora_scaling[name]) * products.sum(-1).max()
        return bool(largest < torch.finfo(W.dtype).max)  # no, if anything is NaN

    def steps_in_place(self, names: Iterable[str]) -> Iterator[Callable[[], Tensor]]:
        """Operations that each add one of `names` to the weight's own values, for good; see `folds_in_place`."""
        W = self.as_matrix(self.weight.detach())  # a view that shares the weight's version
        for name in self.present(names):
            A, B = (factor.detach().to(W.dtype) for factor in self.factors(name))
            yield functools.partial(fold_, W, A, B, self.lora_scaling[name])

    def keep_folded(self) -> None:
        """Makes the folded weight the layer's own; the one before is dropped."""
        self.lora_unfolded = self.lora_folded = ()

    def has_own_bias(self, names: Iterable[str]) -> bool:
        """Whether one of these adapters has a bias of B on this layer, which folding adds to the layer's."""
        return any(self.lora_method[name].bias_table for name in self.present(names))

    def _are_products(self, names: Iterable[str]) -> bool:
        """Whether each of these changes the weight by s B A."""
        return all(self.lora_method[name].is_product for name in names)

    def check_shape(self, path: str, name: str) -> None:
        """Raises a TargetError if the layer, which is at `path`, has another shape than when it got the adapter."""
        method, now = self.lora_method[name], self.matrix_shape(self)
        if method.replaces_rows:
            method.check_layer(self, path, name)
            return
        d_in, d_out = method.sizes({t.name: getattr(self, t.name)[name] for t in method.tables if t.key})
        was = (now[0] if d_in is None else d_in, d_out)
        if was != now:
            raise TargetError(
                f"{path} maps {now[0]} to {now[1]} features, and adapter {name!r} was made for {was[0]} to {was[1]}: it was "
                "resized since; resize a model, as resize_token_embeddings does, before it gets adapters"
            )

    def check_stored(self, names: Iterable[str]) -> None:
        """Raises a StateError if what folding these adapters replaces is computed from other tensors, and would not last."""
        for tensor in (self.weight_name, "bias") if self.has_own_bias(names) else (self.weight_name,):
            if tensor not in self._parameters:
                raise StateError(
                    f"its {tensor} is computed from other tensors (pruned, or weight norm); make it a plain one first, as "
                    f"torch.nn.utils.prune.remove(layer, {tensor!r}), remove_weight_norm or remove_parametrizations do"
                )

    def unfold(self) -> None:
        """Puts back the weight and bias from before `fold`, byte for byte.

        Raises:
            StateError: one of them was pruned, or is computed otherwise, since.
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
