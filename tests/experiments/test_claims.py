"""What the report says of claims follows from the numbers, either way."""

import math

import pytest

from experiments import claims, measured
from experiments.claims import CONTRADICTED, MISSED, NOT_KEPT, NOT_RUN, REACHED, SUPPORTED, TOO_WIDE, UNDECIDED
from tests.support import fabricated


def group(tmp_path, *made):
    (found,) = measured.grouped(measured.read(fabricated.write(tmp_path, *made)))
    return found


def runs(method, wrong, seeds=3, **changes):
    """A method's runs, wrong about so many of 872 sentences: the same ones each time."""
    return [fabricated.metrics(method, 1 - wrong / 872, seed, wrong=set(range(wrong)), **changes) for seed in range(seeds)]


def finding(number, tmp_path, *made):
    return claims.findings(group(tmp_path, *made))[number]


def aim(number, tmp_path, *made):
    return claims.aims(group(tmp_path, *made))[number]


def test_without_the_runs_nothing_is_claimed(tmp_path):
    found = group(tmp_path, fabricated.metrics("dora"))
    assert {claim.verdict for claim in (*claims.findings(found), *claims.aims(found))} == {NOT_RUN}
    assert (len(claims.findings(found)), len(claims.aims(found))) == (6, 6)


def test_without_predictions_no_difference_is_judged(tmp_path):
    names = ("base", "lora", "qlora", "full", "high-rank", "query-only", "bias", "rslora", "best")
    found = group(tmp_path, *(fabricated.metrics(name, wrong=None) for name in names))
    judged = [claims.findings(found)[i] for i in (0, 1, 3, 4, 5)] + claims.aims(found)[:4]
    assert {(claim.verdict, claim.numbers) for claim in judged} == {(NOT_RUN, NOT_KEPT)}


@pytest.mark.parametrize(
    ("low", "high", "wanted", "verdict"),
    [
        (0.1, 0.2, (0, 1), SUPPORTED),
        (-0.1, 0.2, (0, 1), UNDECIDED),
        (0.5, 1.5, (0, 1), UNDECIDED),
        (-1, 2, (0, 1), UNDECIDED),
        (-0.2, -0.1, (0, 1), CONTRADICTED),
        (1.1, 1.2, (0, 1), CONTRADICTED),
        (0.0, 0.0, (0, 1), CONTRADICTED),
        (-0.005, 5, (-0.01, math.inf), SUPPORTED),
    ],
)
def test_an_interval_lies_within_outside_or_on_either_side(low, high, wanted, verdict):
    assert claims._verdict(low, high, wanted) == verdict


@pytest.mark.parametrize(
    ("base", "share", "verdict"),
    [(500, 0.01, SUPPORTED), (390, 0.01, UNDECIDED), (200, 0.01, CONTRADICTED), (500, 0.06, CONTRADICTED)],
)
def test_lora_lifts_a_base_by_much_with_few_parameters(tmp_path, base, share, verdict):
    lora = runs("lora", 120, trainable_parameters=round(share * 23_009_668))
    assert finding(0, tmp_path, *runs("base", base), *lora).verdict == verdict


@pytest.mark.parametrize(
    ("wrong", "trained", "verdict"),
    [(180, 74_498, SUPPORTED), (122, 74_498, UNDECIDED), (60, 74_498, CONTRADICTED), (180, 295_682, CONTRADICTED)],
)
def test_query_projections_alone_train_the_fewest_at_a_lower_accuracy(tmp_path, wrong, trained, verdict):
    made = [*runs("lora", 120), *runs("high-rank", 119, trainable_parameters=590_594)]
    claim = finding(1, tmp_path, *made, *runs("query-only", wrong, trainable_parameters=trained))
    assert claim.verdict == verdict and f"query-only {trained:,}" in claim.numbers


@pytest.mark.parametrize(
    ("peaks", "verdict"),
    [
        ((880, 885, 890), SUPPORTED),
        ((949, 949, 949), CONTRADICTED),  # 5.1 % is not about 12
        ((840, 845, 840), CONTRADICTED),  # nor are 16 %
        ((1010, 1010, 1010), CONTRADICTED),
        ((885, 920, 890), UNDECIDED),
    ],
)
def test_about_12_per_cent_of_memory_is_a_band_for_every_seed(tmp_path, peaks, verdict):
    made = runs("lora", 120, peak_rss_mb=1000.0)
    for one, peak in zip(runs("qlora", 122, base_weight_bytes=53_351_904), peaks, strict=True):
        made.append(one | {"peak_rss_mb": float(peak)})
    claim = finding(2, tmp_path, *made)
    assert claim.verdict == verdict and "base weights 41.3 % lower" in claim.numbers


@pytest.mark.parametrize(("wrong", "verdict"), [(120, SUPPORTED), (121, SUPPORTED), (128, UNDECIDED), (160, CONTRADICTED)])
def test_little_cost_excludes_more_than_a_point(tmp_path, wrong, verdict):
    assert finding(3, tmp_path, *runs("lora", 120), *runs("qlora", wrong)).verdict == verdict


@pytest.mark.parametrize("number", [4, 5])
@pytest.mark.parametrize(
    ("wrong", "verdict"), [(113, SUPPORTED), (119, UNDECIDED), (120, CONTRADICTED), (130, CONTRADICTED), (80, CONTRADICTED)]
)
def test_marginally_is_more_than_nothing_and_at_most_two_points(tmp_path, number, wrong, verdict):
    method = {4: "high-rank", 5: "bias"}[number]
    assert finding(number, tmp_path, *runs("lora", 120), *runs(method, wrong)).verdict == verdict


@pytest.mark.parametrize(
    ("number", "of", "method"), [(0, "lora", "qlora"), (1, "full", "lora"), (2, "full", "rslora"), (3, "full", "best")]
)
def test_half_a_point_is_a_point_estimate_with_a_narrow_interval(tmp_path, number, of, method):
    for i, (wrong, verdict) in enumerate([(120, REACHED), (124, REACHED), (125, MISSED), (90, TOO_WIDE)]):
        assert aim(number, tmp_path / str(i), *runs(of, 120), *runs(method, wrong)).verdict == verdict


def test_the_peak_is_compared_seed_by_seed_on_the_gpu_where_there_is_one(tmp_path):
    lora = [fabricated.metrics("lora", seed=s, peak_rss_mb=1300.0, peak_cuda_mb=500.0 + s) for s in (0, 1)]
    qlora = [fabricated.metrics("qlora", seed=s, peak_rss_mb=1500.0, peak_cuda_mb=400.0) for s in (0, 1, 2)]
    found = aim(4, tmp_path / "a", *lora, *qlora)
    assert (found.verdict, found.numbers) == (REACHED, "peak GPU memory: QLoRA 400 MiB, LoRA 500 to 501 MiB")
    lora[1]["peak_cuda_mb"] = 399.0
    assert aim(4, tmp_path / "b", *lora, *qlora).verdict == UNDECIDED
    lora[0]["peak_cuda_mb"] = 399.0
    assert aim(4, tmp_path / "c", *lora, *qlora).verdict == MISSED


@pytest.mark.parametrize(("accuracy", "seeds", "verdict"), [(0.9, 3, REACHED), (0.899, 3, MISSED), (0.95, 2, NOT_RUN)])
def test_best_is_a_mean_of_three_seeds_at_the_full_budget(tmp_path, accuracy, seeds, verdict):
    made = [fabricated.metrics("best", accuracy, seed) for seed in range(seeds)]
    assert aim(5, tmp_path / "full", *made).verdict == verdict
    for one in made:
        one["data"] |= {"train": 12_000}
    assert aim(5, tmp_path / "part", *made).verdict == NOT_RUN


def test_a_verdict_on_one_seed_says_so(tmp_path):
    made = [*runs("lora", 120, seeds=1), *runs("qlora", 110, seeds=1), *runs("full", 120, seeds=1)]
    found = group(tmp_path, *made)
    assert claims.findings(found)[3].verdict == f"{SUPPORTED}, on one seed"
    assert claims.findings(found)[3].numbers.endswith(", 1 seed: over sentences alone)")
    assert claims.findings(found)[2].verdict == f"{CONTRADICTED}, on one seed"  # the peaks are alike
    assert claims.aims(found)[1].verdict == f"{REACHED}, on one seed"
    assert claims.aims(found)[4].verdict == f"{MISSED}, on one seed"


@pytest.mark.parametrize(("wrong", "verdict"), [(121, SUPPORTED), (129, UNDECIDED), (180, CONTRADICTED)])
def test_bfloat16_costs_little(tmp_path, wrong, verdict):
    """Only budgets that differ in nothing else are compared."""
    made = [*runs("lora", 120), *runs("qlora", 125), *runs("lora", wrong)]
    settings = [{**run["hyperparameters"], "precision": "fp32" if i < 6 else "bf16"} for i, run in enumerate(made)]
    settings += [{**settings[-1], "epochs": 9}]
    made = [run | {"hyperparameters": own} for run, own in zip([*made, made[-1]], settings, strict=True)]
    (claim,) = claims.of_precision(measured.grouped(measured.read(fabricated.write(tmp_path, *made))))
    assert claim.verdict == verdict and "bfloat16 costs lora little" in claim.text and "in float32 86.2 %" in claim.numbers


def test_the_accuracies_that_are_shown_are_of_the_seeds_that_are_compared(tmp_path):
    full = [fabricated.metrics("full", accuracy, seed) for seed, accuracy in enumerate((0.9, 0.9, 0.6))]
    best = [fabricated.metrics("best", 0.89, seed) for seed in range(2)]
    assert aim(3, tmp_path / "a", *full, *best).numbers.startswith("best 89.0 %, full 90.0 %: ")
    best[0]["wrong"] = None  # it kept no predictions
    full[1]["accuracy"] = 0.8
    assert aim(3, tmp_path / "b", *full, *best).numbers.startswith("best 89.0 %, full 80.0 %: +8.9 points (")
