"""LoftQ: s B A starts as the best approximation of what quantisation took from the weight (Li et al., arXiv 2310.08659).

    A, B = argmin |W - Q - s B A|        W: the dense weight;  Q: the packed one, which stays

This is the first of the paper's alternations. The others would change Q too, and then no file of the adapter would be right
on the packed base that others have.
"""

from __future__ import annotations

from torch import Tensor

from ..maths.lowrank import Factors, best_of_matrix


def loftq(W: Tensor, Q: Tensor, r: int, scaling: float) -> Factors:
    """A and B towards the dense weight, and the share of |W - Q|^2 that they give back.

    Args:
        W: (d_out, d_in), float32 or float64.
        Q: the same of the packed weight.
        r: rank.
        scaling: s.

    Returns:
        A, (k, d_in), and B, (d_out, k), with k = min(r, d_out, d_in); the share.
    """
    return best_of_matrix(W - Q, r, scaling)
