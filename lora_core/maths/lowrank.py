"""The best approximation of a matrix by two thin factors, and how much of the matrix it keeps.

    D = U S V^T,   D_r = U_r S_r V_r^T = s B A   with   B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r^T

No matrix of rank r is nearer to D in the Frobenius norm (Eckart and Young, 1936). It keeps the share

    |D_r|^2 / |D|^2 = (sum of the r largest S^2) / (sum of all S^2)

of D's energy. Three ways to the SVD: of a small D as it is; of a large one by a randomised range finder (Halko, Martinsson
and Tropp, arXiv 0909.4061, algorithm 4.4); of a product B A that is thin in the middle by QR, with D never built:

    A^T = Q_A R_A,   B = Q_B R_B,   B A = Q_B (R_B R_A^T) Q_A^T,   where the middle is no larger than (R, R)
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Up to this smaller side a matrix gets an exact SVD, in float64: a fraction of a second on one core.
EXACT_SIDE = 512

#: The randomised SVD looks for twice the rank and EXTRA more directions, and refines them ITERATIONS times. On the hardest
#: spectrum, noise of 1,024 x 1,024 whose singular values hardly fall, r from 8 to 64, it then keeps 1.2e-4 of the energy
#: less than the exact one does (2.3e-2 less at the customary two iterations); where they fall like k^-1/4, 2e-7 less.
EXTRA, ITERATIONS = 8, 16

Factors = tuple[Tensor, Tensor, float]  # A, B, share of the energy


def best_of_matrix(D: Tensor, r: int, scaling: float = 1.0) -> Factors:
    """The best factors of rank r of a dense matrix.

    Args:
        D: (d_out, d_in), float32 or float64.
        r: rank; no more than min(d_out, d_in) is used.
        scaling: s, a positive number.

    Returns:
        A, (k, d_in), and B, (d_out, k), with k = min(r, d_out, d_in), such that s B A approximates D; and the share of |D|^2
        that it keeps, 1 if D is zero. The same D gives the same factors, and torch's generators are left as they were.
    """
    total = torch.linalg.vector_norm(D, dtype=torch.float64).item() ** 2
    return _cut(*largest_triplets(D, r), r, total, scaling)


def largest_triplets(D: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of the r largest singular triplets of a dense matrix.

    Args:
        D: (d_out, d_in), float32 or float64.
        r: how many; no more than min(d_out, d_in) are there.

    Returns:
        U, (d_out, k), S, (k,), falling, and V^T, (k, d_in), with k = min(r, d_out, d_in), in float64 where D is small. The same
        D gives the same ones, and torch's generators are left as they were.
    """
    directions = 2 * r + EXTRA
    if min(D.shape) <= max(EXACT_SIDE, 2 * directions):
        U, S, Vt = torch.linalg.svd(D.double(), full_matrices=False)
    else:
        with torch.random.fork_rng([D.device] if D.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(D, directions, niter=ITERATIONS)
        Vt = V.t()
    return U[:, :r], S[:r], Vt[:r]


def best_of_product(A: Tensor, B: Tensor, r: int | None, eps: float) -> Factors:
    """The best factors of rank r of the product B A, at the cost of its factors.

    A singular value is taken for zero if it is below the rounding of the largest one in what the factors are stored in, or
    below what the float64 arithmetic here may be off by, which is more where the terms of the product cancel.

    Args:
        A: (R, d_in), float64.
        B: (d_out, R), float64.
        r: rank; no more than min(R, d_out, d_in) is used. None: the number of singular values that are not zero, or 1.
        eps: the rounding of the numbers in A and B: that of the dtype which they were made from.

    Returns:
        A, (k, d_in), and B, (d_out, k), whose product approximates the given one; and the share of the energy kept.
    """
    Q_A, R_A = torch.linalg.qr(A.t())  # d_in k, k R
    Q_B, R_B = torch.linalg.qr(B)  # d_out k, k R
    U, S, Vt = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    zero = eps * S[0] + len(A) * torch.finfo(A.dtype).eps * A.norm() * B.norm()
    S = torch.where(zero < S, S, 0)
    r = max(1, int(S.count_nonzero())) if r is None else r
    return _cut(Q_B @ U, S, Vt @ Q_A.t(), r, S.square().sum().item())


def _cut(U: Tensor, S: Tensor, Vt: Tensor, r: int, total: float, scaling: float = 1.0) -> Factors:
    U, S, Vt = U[:, :r], S[:r], Vt[:r]
    energy = min(1.0, S.double().square().sum().item() / total) if total else 1.0
    root = (S / scaling).sqrt()
    return root[:, None] * Vt, U * root, energy
