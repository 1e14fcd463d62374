"""Whether something of torch's looks at each operation, and then must see its own."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether a compiler traces the operations, or a transform of torch.func (vmap, grad, jvp) works on them.

    Both see plain operations better than autograd functions written by hand: a compiler fuses them, and a transform has no
    rule for the others.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
