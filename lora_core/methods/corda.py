"""CorDA: A and B start from the weight as its inputs see it (Yang et al., arXiv 2406.05223).

    W C = U diag(S) V^T,   W = U diag(S) V^T C^-1        C: (d_in, d_in), the second moment of the layer's inputs

    IPM, "instruction-previewed": the r largest triplets, for inputs of the task that is to be learned
    KPM, "knowledge-preserved": the r smallest, for inputs of what is to be kept: they matter least to those

    B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r^T C^-1,   so that s B A is that part of W

C is scaled to a mean diagonal of one. That leaves B A as it is, and shares it out between A and B so that inputs without a
direction, C = I, give PiSSA. A hundredth of the identity is added, as in the authors' code: so C has an inverse, also where
there are fewer inputs than dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.lowrank import Factors

MODES = ("ipm", "kpm")
#: What is added to the diagonal, in parts of its mean.
DAMPING = 0.01


def corda(W: Tensor, C: Tensor, r: int, scaling: float, mode: str) -> Factors:
    """A and B whose product s B A is a part of W, to be subtracted again.

    Args:
        W: the weight, (d_out, d_in).
        C: sum of x^T x over the layer's inputs, (d_in, d_in), with a positive trace.
        r: rank, up to min(d_out, d_in).
        scaling: s.
        mode: one of MODES.

    Returns:
        A, (r, d_in), and B, (d_out, r), float64; the share of |W C|^2 that they hold.
    """
    C = C.double()
    C = C / C.diagonal().mean() + DAMPING * torch.eye(len(C), dtype=C.dtype, device=C.device)
    U, S, Vt = torch.linalg.svd(W.double() @ C, full_matrices=False)
    part = slice(r) if mode == "ipm" else slice(len(S) - r, len(S))
    root = (S[part] / scaling).sqrt()
    V = torch.cholesky_solve(Vt[part].t(), torch.linalg.cholesky(C))  # d_in r: C^-1 V, and C is symmetric
    return root[:, None] * V.t(), U[:, part] * root, (S[part].square().sum() / S.square().sum()).item()


def check_mode(mode: str) -> None:
    """Raises a ConfigError unless it is one of MODES."""
    if mode not in MODES:
        raise ConfigError(f"mode must be {' or '.join(map(repr, MODES))}, not {mode!r}")
