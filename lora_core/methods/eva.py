"""EVA: A starts as the directions in which a layer's inputs vary most (Paischl et al., arXiv 2410.07170).

    C = sum of x^T x = V diag(l) V^T,   A = the first r rows of V^T,   B = 0

B is zero, so the start changes nothing. The eigenvalues say what share of the inputs each direction explains; with them ranks
can move from layers whose inputs a few directions explain to those whose inputs take more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def directions(C: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first eigenvectors of the inputs' second moment, and the share of it that each explains.

    Args:
        C: (d_in, d_in), symmetric, with a positive trace.
        most: how many, up to d_in.

    Returns:
        A, (most, d_in), orthonormal, and the shares, (most,), falling; float64.
    """
    values, V = torch.linalg.eigh(C.double())  # ascending
    shares = values.flip(0).clamp(min=0)[:most] / C.trace().double()
    return V.flip(1)[:, :most].t(), shares


def share_out(budget: int, shares: Mapping[str, Tensor]) -> dict[str, int]:
    """{path: rank}, at least 1 each and `budget` in all, that take the directions which explain most of their inputs."""
    further = [(share, path) for path, of_layer in shares.items() for share in of_layer[1:].tolist()]
    ranks = dict.fromkeys(shares, 1)
    for _, path in sorted(further, key=lambda pair: -pair[0])[: budget - len(shares)]:
        ranks[path] += 1
    return ranks
