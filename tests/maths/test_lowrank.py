"""The best thin factors: against torch's exact SVD in float64, by Eckart and Young's characterisation.

A product of rank r whose distance from D is the norm of D's singular values beyond the r-th is a best approximation, also
where the singular values are so close that the best one is not unique.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.maths.lowrank import EXACT_SIDE, best_of_matrix, best_of_product
from tests.support import oracle

EPS = torch.finfo(torch.float32).eps


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(singular_values, n):
    """A square matrix of these singular values, and random singular vectors."""
    U, V = torch.linalg.qr(random(n, n, seed=1))[0], torch.linalg.qr(random(n, n, seed=2))[0]
    return U * singular_values @ V.t()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 6), (6, 6)])
@pytest.mark.parametrize("r", [1, 3, 9])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_a_small_matrix(shape, r, scaling):
    D = random(*shape)
    A, B, energy = best_of_matrix(D, r, scaling)
    kept, missed = oracle.truncation(D, r)
    assert A.shape == (min(r, *shape), shape[1]) and B.shape == (shape[0], min(r, *shape))
    assert energy == pytest.approx(kept, abs=1e-12)
    assert (scaling * B @ A - D).norm().item() == pytest.approx(missed, abs=1e-12)
    torch.testing.assert_close(A @ A.t(), B.t() @ B, rtol=0, atol=1e-12)  # the singular values are shared out evenly


K = torch.arange(1, 1025, dtype=torch.float64)
SPECTRA = {
    "noise": lambda: random(1024, 1024),
    "noise over a signal": lambda: random(1024, 8) @ random(8, 1024, seed=1) + random(1024, 1024, seed=2),
    "falling slowly": lambda: with_spectrum(K**-0.25, 1024),
    "falling fast": lambda: with_spectrum(1 / K, 1024),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_large_matrix_keeps_what_the_exact_svd_does_within_a_thousandth(spectrum):
    D = SPECTRA[spectrum]().float()
    assert min(D.shape) > EXACT_SIDE  # so these go the randomised way
    squares = torch.linalg.svdvals(D.double()) ** 2
    for r in (4, 32):
        A, B, energy = best_of_matrix(D, r)
        kept = (squares[:r].sum() / squares.sum()).item()
        assert kept - 1e-3 <= energy <= kept + 1e-6
        missed = (B @ A - D).double().square().sum() / squares.sum()
        assert energy == pytest.approx(1 - missed.item(), abs=1e-5)  # and the figure is true of these very factors


def test_the_randomised_way_gives_the_same_each_time_and_leaves_the_generator_alone():
    D = random(600, 700)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = best_of_matrix(D, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], best_of_matrix(D, 4)[:2], strict=True))


@pytest.mark.parametrize("R", [3, 12])  # thin in the middle, and wider than the matrix
@pytest.mark.parametrize("r", [1, 2, 20])
def test_a_product(R, r):
    A0, B0 = random(R, 6), random(9, R, seed=1)
    A, B, energy = best_of_product(A0, B0, r, EPS)
    kept, missed = oracle.truncation(B0 @ A0, r)
    assert len(A) == min(r, R, 6)
    assert energy == pytest.approx(kept, abs=1e-12)
    assert (B @ A - B0 @ A0).norm().item() == pytest.approx(missed, abs=1e-10)


def test_the_smallest_exact_rank_of_a_product():
    A, B = random(3, 8), random(6, 3, seed=1)
    twice = torch.cat([A, A]), torch.cat([B, 0.3 * B], dim=1)  # 1.3 B A: no more than rank 3
    found_A, found_B, energy = best_of_product(*twice, None, EPS)
    assert len(found_A) == 3 and energy == 1.0
    torch.testing.assert_close(found_B @ found_A, 1.3 * B @ A, rtol=0, atol=1e-12)


def test_what_float32_factors_can_not_tell_from_zero_counts_as_zero_and_what_they_can_does_not():
    values = torch.tensor([1.0, 1e-6, 1e-8], dtype=torch.float64)
    A, B = torch.linalg.qr(random(8, 3))[0].t(), torch.linalg.qr(random(6, 3))[0] * values
    assert len(best_of_product(A, B, None, EPS)[0]) == 2
    assert len(best_of_product(A, B, None, torch.finfo(torch.float64).eps)[0]) == 3


def test_a_sum_that_cancels_is_zero_at_rank_one():
    A, B = random(3, 8), random(6, 3, seed=1)
    cancelled = torch.cat([A, A]), torch.cat([0.1 * B + 0.2 * B, -0.3 * B], dim=1)
    found_A, found_B, energy = best_of_product(*cancelled, None, EPS)
    assert len(found_A) == 1 and energy == 1.0 and not (found_B @ found_A).any()
    assert best_of_matrix(torch.zeros(4, 3), 2)[2] == 1.0


def test_a_product_is_never_built():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                self.elements = max(self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    A, B = random(6, 300), random(400, 6, seed=1)
    with Largest() as seen:
        best_of_product(A, B, 4, EPS)
    assert 400 * 6 <= seen.elements < 300 * 400 / 10
