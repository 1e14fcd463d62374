"""Where an adapter starts: A and B, from nothing or from the weight that they update.

    True            A Kaiming-uniform with a = sqrt(5), B zero      Hu et al., arXiv 2106.09685
    False           both random: an adapter that changes the model from the start (of use in tests)
    "gaussian"      A normal with standard deviation 1 / r, B zero
    "orthogonal"    A and B random and orthogonal, with B A = 0; r must be even
    "pissa"         the r largest singular triplets of W            Meng et al., arXiv 2404.02948
    "pissa_niter_N" the same by a randomised SVD of N iterations
    "olora"         the first r columns and rows of W = Q R         Büyükakyüz, arXiv 2406.01775

The last three start from W itself, with B A not zero. Their papers then subtract s B0 A0 from the base, so that the start
changes nothing; here the adapter does that, by adding s (B A - B0 A0). That is the same model, and the base stays as it
is, to the bit, in any dtype and in 4 bits too: other adapters on it, disabling and unloading are not touched, and the
adapter is plain LoRA of rank 2r for every reader of its files.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..spec.starts import starts_from_weight


def check_rank_fits(init: bool | str, path: str, shape: tuple[int, int], r: int) -> None:
    """Raises a ConfigError if no adapter of rank r can start so on the layer at `path`, of shape (d_in, d_out)."""
    if init == "orthogonal" and r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, not {r} ({path})")
    if starts_from_weight(init) and r > min(shape):
        raise ConfigError(f"init_lora_weights={init!r} needs a rank of at most {min(shape)} on {path}, not {r}")


def start(
    init: bool | str,
    like: Tensor,
    shape: tuple[int, int],
    r: int,
    scaling: float,
    weight: Callable[[], Tensor],
    zero_A: bool = False,
) -> tuple[Tensor, Tensor, bool]:
    """The values that an adapter starts with.

    Args:
        init: one of the above, as `LoraConfig.init_lora_weights` has it.
        like: a tensor of the dtype and device that A and B get.
        shape: (d_in, d_out).
        r: rank.
        scaling: the factor before B A.
        weight: makes W, (d_out, d_in), float32 or float64; called only by those that start from it.
        zero_A: for the starts from nothing, A zero and B normal instead, as embeddings have it.

    Returns:
        A, (r, d_in); B, (d_out, r); and whether their product is to be subtracted again.
    """
    d_in, d_out = shape
    A, B = like.new_zeros(r, d_in), like.new_zeros(d_out, r)
    if starts_from_weight(init):
        A_start, B_start = _olora(weight(), r) if init == "olora" else _pissa(weight(), r, scaling, _iterations(init))
        return A.copy_(A_start), B.copy_(B_start), True
    if init == "orthogonal":
        A_start, B_start = _orthogonal(d_in, d_out, r)
        return A.copy_(A_start), B.copy_(B_start), False
    if zero_A and init is not False:
        return A, nn.init.normal_(B), False
    if init == "gaussian":
        return nn.init.normal_(A, std=1 / r), B, False
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return A, B, False


def _iterations(init: str) -> int | None:
    return int(init.removeprefix("pissa_niter_")) if init != "pissa" else None


def _pissa(W: Tensor, r: int, scaling: float, iterations: int | None) -> tuple[Tensor, Tensor]:
    """sqrt(S / s) V^T and U sqrt(S / s) of the r largest singular triplets of W: s B A is that part of W."""
    if iterations is None:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        U, S, Vt = U[:, :r], S[:r], Vt[:r]
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=iterations)
        Vt = V.t()
    root = (S / scaling).sqrt()
    return root[:, None] * Vt, U * root


def _olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r rows of R and columns of Q; B is orthonormal."""
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


def _orthogonal(d_in: int, d_out: int, r: int) -> tuple[Tensor, Tensor]:
    """A of the odd and B of the even rows of one orthogonal (r, r) matrix, spread at random: so B A = 0."""
    Q, _ = torch.linalg.qr(torch.randn(r, r, device="cpu"))
    A = torch.randn(d_in, r // 2, device="cpu") @ Q[0::2]
    B = torch.randn(r // 2, d_out, device="cpu").t() @ Q[1::2]
    return A.t() / 10, B / 10
