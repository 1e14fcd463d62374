"""The loss of the next token behind a frozen head, without the logits of all tokens at once.

    head = FrozenHead.of(model)                        None: the model's own logits are to be taken
    hidden = head.inputs(model, **inputs)              what the model would make logits of, (B, T, d)
    loss = summed_cross_entropy(hidden[learned], head.weight, head.bias, targets)

Logits are the largest tensors of a language model's step: N tokens of V words, which torch holds in several copies and passes
over ten times. A head that is not trained needs no gradient of its own, so that the gradient of its input is made on the way
forward, block by block, and kept instead of all of that (as in Liger Kernel, Hsu et al., arXiv 2410.10989). Each logit is
computed and rounded as it would be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_core.cpu.dropout import default_generator, first_derivative_only
from lora_core.cpu.products import FastLinear, cast, product
from lora_core.maths.lora import autocast_dtype

#: Logits of a block: 16 MiB of float32, which stay near a core while they are passed over; on a GPU, enough to keep it busy.
BLOCK, GPU_BLOCK = 2**22, 2**27


class FrozenHead:
    """The linear layer at the end of a causal language model, which nothing trains and nobody looks into."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    @classmethod
    def of(cls, model: nn.Module) -> FrozenHead | None:
        """The head of `model`, if it is a plain frozen one."""
        layer = model.get_output_embeddings()
        plain = layer is not None and type(layer).forward in (nn.Linear.forward, FastLinear.forward)
        trained = plain and any(p.requires_grad for p in layer.parameters())
        hooked = plain and (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
        return cls(layer) if plain and not trained and not hooked else None

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def inputs(self, model: nn.Module, **inputs: Any) -> Tensor | None:
        """What `model` gives to its head; None if it does more with the logits than to return them, as capping them. Then
        torch's generator is as it was, so that a call of the model in its place draws the masks that it would have drawn."""
        given: list[Tensor] = []
        generator = default_generator(self.weight.device)
        state = generator.get_state()
        self.layer.forward = lambda x: given.append(x) or x
        try:
            returned = model(**inputs).logits
        finally:
            del self.layer.forward
        if len(given) == 1 and returned is given[0]:
            return returned
        generator.set_state(state)
        return None


def summed_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The sum of the cross entropies of x W^T + b, in float32 or wider.

    Args:
        x: (N, d), floating point.
        weight: W, (V, d), frozen; the logits are computed in autocast's dtype if that is on, else in that of x.
        bias: b, (V,), or None.
        targets: N of the V words, integers.
    """
    dtype = autocast_dtype(x)
    return _SummedCrossEntropy.apply(x, cast(weight, dtype), None if bias is None else cast(bias, dtype), targets)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        need_x, sums = ctx.needs_input_grad[0], []
        rows, wide = cast(x, weight.dtype), torch.promote_types(weight.dtype, torch.float32)
        dx = torch.empty_like(rows) if need_x else None
        step = min(max(1, (GPU_BLOCK if x.is_cuda else BLOCK) // len(weight)), max(1, len(rows)))
        scores = torch.empty(step, len(weight), dtype=wide, device=x.device)  # once: new memory costs as much as a pass
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            logits = product(rows[block], weight, bias)  # b V
            slope = torch.log_softmax(logits, -1, dtype=wide, out=scores[: len(logits)])
            right = targets[block, None]
            sums.append(slope.gather(1, right).sum())
            if need_x:
                slope.exp_().scatter_add_(1, right, slope.new_full((1, 1), -1.0).expand_as(right))
                slope = slope if logits.dtype == wide else logits.copy_(slope)
                dx[block] = product(slope, weight.t())
        ctx.save_for_backward(dx)
        ctx.dtype = x.dtype
        return -torch.stack(sums).sum() if sums else x.new_zeros((), dtype=wide)

    @staticmethod
    @first_derivative_only
    def backward(ctx, slope: Tensor):
        (dx,) = ctx.saved_tensors
        return cast(dx, ctx.dtype) * slope, None, None, None
