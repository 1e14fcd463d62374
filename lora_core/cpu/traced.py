"""Whether something of torch's looks at each operation, and then must see its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Whether `torch.export` traces, which torch before 2.7 can't tell from a compiler.
_may_export = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_traced() -> bool:
    """Whether a compiler traces the operations, or a transform of torch.func (vmap, grad, jvp) works on them.

    Both see plain operations better than autograd functions written by hand: a compiler fuses them, and a transform has no
    rule for the others.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_compiled() -> bool:
    """Whether a compiler traces the operations, and not `torch.export`.

    An exported program has no backward, torch can't write a checkpoint into it, and it may run without this package.
    """
    return torch.compiler.is_dynamo_compiling() and not _may_export()


def made_again(dense: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """dense(weight), which a compiler makes again in the backward: it would keep the dense weight of every layer until then."""
    if is_compiled() and torch.is_grad_enabled():
        return checkpoint(dense, weight, use_reentrant=False)
    return dense(weight)
