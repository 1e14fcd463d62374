"""Paired differences: what statistics' own tools say of one seed, and an interval that holds what it promises over several."""

import numpy as np
import pytest

from experiments import measured, paired
from experiments.errors import ExperimentError
from tests.support import fabricated

stats = pytest.importorskip("scipy.stats")


def row(tmp_path, *made):
    (group,) = measured.grouped(measured.read(fabricated.write(tmp_path, *made)))
    return group.rows


def one_seed(seed, n=872, both=0.8, only_a=0.03, only_b=0.05):
    """(1, N) differences in {-1, 0, 1}."""
    kinds = np.random.default_rng(seed).choice([0, -1, 1], n, p=[1 - only_a - only_b, only_a, only_b])
    return kinds[None]


def test_one_seed_is_the_paired_t_test_and_the_bootstrap():
    d = one_seed(0)
    mean, error, freedom = paired.estimate(d)
    t = stats.ttest_1samp(d[0], 0)
    found = paired.Difference(mean, error, freedom, (0,))
    assert mean / error == pytest.approx(t.statistic) and found.p == pytest.approx(t.pvalue)
    drawn = stats.bootstrap((d[0],), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0))
    assert (found.low, found.high) == pytest.approx(tuple(drawn.confidence_interval), abs=1e-3)


def test_one_seed_is_mcnemar_s_test():
    d = one_seed(1, only_a=0.03, only_b=0.06)
    lost, won = int((d == -1).sum()), int((d == 1).sum())
    mean, error, _ = paired.estimate(d)
    chi_squared = (won - lost) ** 2 / (won + lost)
    # McNemar divides by won + lost, the variance without a difference; the standard error here has the difference in it.
    assert (mean / error) ** 2 == pytest.approx(chi_squared, rel=0.03)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("effect", [0.0, 0.006])
def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says(seeds, effect):
    """Methods that are alike on average, with seeds that differ by `effect`, as much as sentences make two of them differ: 95 %
    of the intervals hold 0, within sampling."""
    rng, trials, held = np.random.default_rng(seeds), 800, 0
    for _ in range(trials):
        likely = rng.beta(0.3, 5, 872) * 0.9  # that a sentence is called otherwise at all: most never, some often
        sign = np.where(rng.random((seeds, 872)) < 0.5 + 0.5 * rng.choice([1, -1], 872), 1, -1)
        d = (rng.random((seeds, 872)) < likely) * sign
        moved = rng.normal(0, effect, (seeds, 1)) if effect else np.zeros((seeds, 1))
        d = np.where(rng.random(d.shape) < abs(moved), np.sign(moved), d)
        found = paired.Difference(*paired.estimate(d), ())
        held += found.low <= 0 <= found.high
    assert 0.935 < held / trials < 0.99


def test_rows_are_paired_by_seed_and_sentence(tmp_path):
    made = [fabricated.metrics(name, seed=seed) for name in ("lora", "qlora") for seed in (0, 1)]
    made.append(fabricated.metrics("qlora", seed=2))  # no LoRA beside it
    wrong = {("lora", 0): {1, 2}, ("lora", 1): {1}, ("qlora", 0): {2, 3, 4}, ("qlora", 1): {1}, ("qlora", 2): set(range(400))}
    for one in made:
        one["wrong"] = wrong[one["method"], one["seed"]]
    found = paired.difference(*row(tmp_path, *made))
    assert found.seeds == (0, 1) and found.gain == pytest.approx((-1 + 0) / (2 * 872))
    assert str(found).startswith("-0.1 points (± ") and str(found).endswith(", 2 seeds)")


def test_without_predictions_nothing_is_paired(tmp_path):
    made = [fabricated.metrics("lora"), fabricated.metrics("qlora")]
    made[0]["wrong"] = None
    assert paired.difference(*row(tmp_path, *made)) is None


def test_other_labels_are_refused(tmp_path):
    rows = row(tmp_path, fabricated.metrics("lora"), fabricated.metrics("qlora"))
    path = rows[1].runs[0].path.parent / "predictions.txt"
    text = path.read_text()
    path.write_text(("1" if text[0] == "0" else "0") + text[1:])
    with pytest.raises(ExperimentError, match="lora and qlora, seed 0, were judged on different labels"):
        paired.difference(*rows)


def test_seeds_that_differ_on_every_sentence_alike_say_little():
    """Each sentence has the same mean over the seeds: all that varies is the seed, and two have one degree of freedom."""
    mean, error, freedom = paired.estimate(np.array([[1] * 50, [0] * 50]))
    assert (mean, error, freedom) == pytest.approx((0.5, 0.5, 1))
    assert paired.Difference(mean, error, freedom, (0, 1)).low < 0


def test_rows_that_say_the_same_differ_by_nothing(tmp_path):
    found = paired.difference(*row(tmp_path, *(fabricated.metrics(name, wrong={1, 2}) for name in ("lora", "qlora"))))
    assert (found.gain, found.half, found.p) == (0, 0, 1)
