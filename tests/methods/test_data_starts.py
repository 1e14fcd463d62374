"""CorDA's and LoRA-GA's A and B against what the papers define them by, in float64."""

import pytest
import torch

from lora_core.errors import ConfigError
from lora_core.methods.corda import DAMPING, corda
from lora_core.methods.lora_ga import lora_ga
from lora_core.methods.start import start

D_IN, D_OUT, R, SCALING = 40, 24, 6, 0.7


def weight():
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def moment(count=500):
    """Sum of x^T x of inputs that vary more in some directions than in others."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, D_IN).double()
    x = torch.randn(count, D_IN, generator=generator, dtype=torch.float64) @ mix.t()
    return x.t() @ x


def damped(C):
    return C / C.diagonal().mean() + DAMPING * torch.eye(D_IN).double()


@pytest.mark.parametrize(("mode", "kept"), [("ipm", slice(R, None)), ("kpm", slice(0, D_OUT - R))])
def test_corda_takes_the_part_of_the_weight_that_matters_most_or_least_to_its_inputs(mode, kept):
    W, C = weight(), damped(moment())
    A, B, share = corda(W, moment(), R, SCALING, mode)
    assert A.shape == (R, D_IN) and B.shape == (D_OUT, R)
    S = torch.linalg.svdvals(W @ C)
    left, taken = (torch.linalg.svdvals(part @ C) for part in (W - SCALING * B @ A, SCALING * B @ A))
    # W C falls apart into the two, each with its own singular values; to the rounding of C^-1 of condition 100 d.
    torch.testing.assert_close(left[: D_OUT - R], S[kept], rtol=0, atol=1e-9)
    other = S[:R] if mode == "ipm" else S[D_OUT - R :]
    torch.testing.assert_close(taken[:R], other, rtol=0, atol=1e-9)
    assert share == pytest.approx((other.square().sum() / S.square().sum()).item())
    torch.testing.assert_close(B.norm(dim=0), (other / SCALING).sqrt(), rtol=0, atol=1e-9)  # one half of each to B


def test_the_two_parts_of_corda_are_the_weight():
    W, C = weight(), moment()
    (A, B, _), (A_rest, B_rest, _) = corda(W, C, R, SCALING, "ipm"), corda(W, C, D_OUT - R, SCALING, "kpm")
    torch.testing.assert_close(SCALING * (B @ A + B_rest @ A_rest), W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_corda_of_inputs_without_a_direction_is_pissa_whatever_their_scale(scale):
    W = weight()
    A, B, _ = corda(W, scale * torch.eye(D_IN).double(), R, SCALING, "ipm")
    A_pissa, B_pissa, _ = start("pissa", W.new_empty(0), (D_IN, D_OUT), R, SCALING, W.clone)
    torch.testing.assert_close(B @ A, B_pissa @ A_pissa, rtol=0, atol=1e-12)
    # The damping stays in how the product is shared out.
    torch.testing.assert_close((A * (1 + DAMPING) ** 0.5).abs(), A_pissa.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", ["stable", "peft"])
def test_lora_ga_starts_along_the_largest_directions_of_the_gradient(scale):
    G = weight()
    A, B, share = lora_ga(G, R, 16, scale)
    c = D_OUT**0.25 / 4
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    assert share == pytest.approx((S[: 2 * R].square().sum() / S.square().sum()).item())
    torch.testing.assert_close(A.abs(), (c if scale == "stable" else 1) * Vt[:R].abs(), rtol=0, atol=1e-12)
    factor = c * (S[R : 2 * R] if scale == "peft" else 1)
    torch.testing.assert_close(B.abs(), (factor * U[:, R : 2 * R]).abs(), rtol=0, atol=1e-12)


def test_the_first_step_of_lora_ga_is_the_best_there_is_towards_the_full_one():
    """The paper's aim: dB A + B dA of a step of gradient descent is G cut to rank 2r, which no product of that rank beats."""
    G = weight()
    A, B, _ = lora_ga(G, R, 16, "stable")
    step = (G @ A.t()) @ A + B @ (B.t() @ G)  # dB = G A^T, dA = B^T G
    c = D_OUT**0.5 / 16
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(step / c, (U[:, : 2 * R] * S[: 2 * R]) @ Vt[: 2 * R], rtol=0, atol=1e-11)


def test_a_gradient_of_too_few_directions_is_refused():
    x, g = torch.randn(2 * R - 1, D_IN), torch.randn(2 * R - 1, D_OUT)
    with pytest.raises(
        ConfigError, match=f"has {2 * R - 1} directions, too few for a rank of {R}, which takes {2 * R}; pass more"
    ):
        lora_ga(g.t() @ x, R, 16, "stable")
