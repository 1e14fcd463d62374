"""TIES, DARE and magnitude pruning on tensors: worked examples, and what must hold of any input."""

import pytest
import torch

from lora_core.maths.pruning import MAJORITIES, PRUNING, Rule
from tests.support import oracle


def combine(updates, method, density=1.0, majority="total", seed=0):
    tensors = [torch.as_tensor(update, dtype=torch.float64) for update in updates]
    return Rule(method, density, majority, torch.Generator().manual_seed(seed))(tensors)


def random(n, *shape):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]


def test_magnitude_pruning_by_hand():
    assert combine([[1, -4, 2, 3], [0, 0, 5, -1]], "magnitude_prune", 0.5).tolist() == [0, -4, 5, 2]  # -4, 3; 5, -1


def test_ties_by_hand():
    #          agree    disagree: 3 - 1 > 0    one is zero    cancel       two of three
    rows = [[2, 3, 4, 1, 1], [4, -1, 0, -1, 1], [0, 0, 0, 0, -5]]
    assert combine(rows, "ties").tolist() == [3, 3, 4, 0, -5]
    assert combine(rows, "ties", majority="frequency").tolist() == [3, 0, 4, 0, 1]


def test_values_as_large_as_the_smallest_that_stays_stay_too_and_one_always_does():
    assert combine([[1, 1, -1, 0.5]], "magnitude_prune", 0.5).tolist() == [1, 1, -1, 0]
    assert combine([[1, 2, 3, 0.5]], "magnitude_prune", 0.01).tolist() == [0, 0, 3, 0]


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("majority", MAJORITIES)
@pytest.mark.parametrize("density", [0.1, 0.55, 1.0])
def test_any_values(method, majority, density):
    updates = random(3, 6, 7)
    expected = oracle.combined(updates, method, density, majority, seed=4)
    torch.testing.assert_close(combine(updates, method, density, majority, seed=4), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", PRUNING)
def test_negating_every_update_negates_the_result(method):
    updates = random(2, 5, 5)
    for majority in MAJORITIES:
        negated = combine([-D for D in updates], method, 0.6, majority)
        assert torch.equal(negated, -combine(updates, method, 0.6, majority))


def test_dare_keeps_the_expectation():
    updates = random(2, 4, 5)
    draws = torch.stack([combine(updates, "dare_linear", 0.3, seed=seed) for seed in range(2000)])
    # One draw's variance is D^2 (1 / 0.3 - 1) for each update; the mean of 2,000 is within 5 standard deviations of it.
    deviation = (sum(D**2 for D in updates) * (1 / 0.3 - 1) / len(draws)).sqrt()
    assert ((draws.mean(0) - sum(updates)).abs() < 5 * deviation).all()
    share = (torch.stack([combine(updates[:1], "dare_linear", 0.3, seed=seed) for seed in range(2000)]) != 0).double().mean()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 40_000) ** 0.5
