"""LoRA-GA: A and B start so that their first step is that of training the weight (Wang et al., arXiv 2407.05000, algorithm 1).

    G = dL/dW = U diag(S) V^T,   A = c V_[1..r]^T,   B = c U_[r+1..2r],   c = d_out^(1/4) / sqrt(gamma)        "stable"

A's rows and B's columns are other triplets: so the first steps of A and B move W in 2r directions of its gradient, the
largest. c keeps the size of what A and B compute, and of their gradients, the same whatever the width. (That gamma stands under
the root, as algorithm 1 has it, the authors say: github.com/Outsider565/LoRA-GA, issue 12.)

PEFT 0.21 scales otherwise, and scale="peft" does as it does:

    A = V_[1..r]^T,   B = c U_[r+1..2r] diag(S_[r+1..2r])
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.lowrank import Factors, largest_triplets

SCALES = ("stable", "peft")


def lora_ga(G: Tensor, r: int, gamma: float, scale: str) -> Factors:
    """A and B along the gradient of a weight; s B A is to be subtracted again.

    Args:
        G: the gradient, (d_out, d_in), float32 or float64.
        r: rank, up to min(d_out, d_in) / 2.
        gamma: the larger, the smaller A and B.
        scale: one of SCALES.

    Returns:
        A, (r, d_in), and B, (d_out, r); the share of |G|^2 that is in their 2 r directions.

    Raises:
        ConfigError: G has fewer than 2 r directions.
    """
    U, S, Vt = largest_triplets(G, 2 * r)
    noise = torch.finfo(G.dtype).eps * max(G.shape) * S[0]
    if (found := int((noise < S).sum())) < 2 * r:
        raise ConfigError(
            f"its gradient has {found} directions, too few for a rank of {r}, which takes {2 * r}; pass more batches"
        )
    c, energy = len(G) ** 0.25 / gamma**0.5, min(1.0, (S.double().norm() / G.double().norm()).item() ** 2)
    if scale == "peft":
        return Vt[:r], c * U[:, r:] * S[r:], energy
    return c * Vt[:r], c * U[:, r:], energy


def check_scale(scale: str) -> None:
    """Raises a ConfigError unless it is one of SCALES."""
    if scale not in SCALES:
        raise ConfigError(f"scale must be {' or '.join(map(repr, SCALES))}, not {scale!r}")
