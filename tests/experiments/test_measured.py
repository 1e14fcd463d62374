"""Runs become rows, rows become groups, and intervals are what statistics says."""

import math

import pytest

from experiments import measured
from experiments.errors import ExperimentError
from tests.support import fabricated


def rows(tmp_path, *made):
    groups = measured.grouped(measured.read(fabricated.write(tmp_path, *made)))
    return {group.budget: [(row.label, len(row.runs)) for row in group.rows] for group in groups}


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (770, 872), (444, 872), (1, 3)])
def test_wilson_s_interval_is_scipy_s(hits, n):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert measured.wilson(hits / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_margin_is_that_of_two_binomials():
    p, q, n = 0.888, 0.883, 872
    assert measured.margin(p, q, n) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n + q * (1 - q) / n), rel=1e-4)


def test_seeds_make_a_row_and_methods_a_group(tmp_path):
    made = [fabricated.metrics("qlora"), *(fabricated.metrics("lora", 0.8 + seed / 100, seed) for seed in (2, 0, 1))]
    runs = measured.read(fabricated.write(tmp_path, *made))
    (group,) = measured.grouped(runs)
    assert [row.label for row in group.rows] == ["lora", "qlora"]  # in the order of METHODS
    lora = group.row("lora")
    assert [run["seed"] for run in lora.runs] == [0, 1, 2]
    assert lora.accuracy == pytest.approx(0.81) and lora.deviation == pytest.approx(0.01)
    assert lora.interval == measured.wilson(lora.accuracy, 872)  # three seeds are no more sentences than one
    assert group.row("qlora").deviation is None and group.row("full") is None


def test_other_budgets_are_other_groups_and_most_methods_come_first(tmp_path):
    short = fabricated.metrics("lora")
    short["hyperparameters"]["epochs"] = 1
    few = fabricated.metrics("lora")
    few["data"]["train"] = 12_000
    found = rows(tmp_path, short, few, fabricated.metrics("lora"), fabricated.metrics("qlora"))
    assert list(found.values()) == [[("lora", 1), ("qlora", 1)], [("lora", 1)], [("lora", 1)]]
    assert [(b.train, b.epochs) for b in found] == [(67_349, 3), (67_349, 1), (12_000, 3)]


@pytest.mark.parametrize("part", ["data", "base_model"])
def test_other_data_or_another_base_of_one_name_is_another_group(tmp_path, part):
    """Rows of different sentences, or different weights, can't be compared, whatever they are called."""
    made = []
    for seed, digest in enumerate([None, "0123456789abcdef", "0123456789abcdef", "fedcba9876543210"]):
        one = fabricated.metrics("lora", seed=seed)
        one[part] |= {"sha256": digest} if digest else {}  # older files have none
        made.append(one)
    found = rows(tmp_path, *made)
    assert sorted(map(tuple, found.values())) == [(("lora", 1),), (("lora", 1),), (("lora", 2),)]
    assert len(set(map(str, found))) == 3  # each with a title of its own
    (old,) = (str(budget) for budget in found if "hash" not in str(budget))
    assert old == "SST-2, 67,349 sentences, 3 epochs, all-MiniLM-L6-v2, fp32"


def test_what_differs_from_the_recipe_is_a_row_of_its_own(tmp_path):
    other = fabricated.metrics("lora")
    other["hyperparameters"] |= {"r": 4, "bias": "all"}
    wide = fabricated.metrics("lora")
    wide["hyperparameters"] |= {"target_modules": ["all-linear"], "lora_plus_ratio": 4}
    less = fabricated.metrics("bias")
    del less["hyperparameters"]["bias"]  # as a run with --bias none records it
    held = fabricated.metrics("lora")
    held["hyperparameters"]["quantize"] = "int8"
    scaled, slow, head = (fabricated.metrics(name) for name in ("best", "lora", "full"))
    scaled["hyperparameters"]["use_rslora"] = True
    slow["hyperparameters"]["learning_rate"] = 1e-4
    head["hyperparameters"]["trains"] = "head"
    made = (fabricated.metrics("lora"), other, wide, less, held, scaled, slow, head)
    (found,) = rows(tmp_path, *made).values()
    assert found == [
        (label, 1)
        for label in (
            "full (training head)",
            "lora",
            "lora (LoRA+ ratio 4, on all-linear)",
            "lora (base int8)",
            "lora (learning rate 0.0001)",
            "lora (rank 4, bias all)",
            "bias (bias none)",
            "best (rsLoRA)",
        )
    ]


def test_another_schedule_or_layers_that_no_recipe_names_are_a_group_of_their_own(tmp_path):
    other, unknown = fabricated.metrics("lora"), fabricated.metrics("lora")
    other["hyperparameters"] |= {"batch_size": 8, "warmup": 0.0}
    unknown["base_model"] = {"name": "mine", "model_type": "unheard-of"}
    unknown["hyperparameters"]["target_modules"] = ["a", "b"]
    found = rows(tmp_path, fabricated.metrics("lora"), other, unknown)
    assert list(map(tuple, found.values())) == [(("lora", 1),)] * 3  # claims find its rows under their names there too
    shown = sorted(map(str, found))
    assert shown[1].endswith("fp32, batch size 8, warm-up 0") and shown[2].endswith("mine, fp32, on a b")
    assert sorted(budget.usual for budget in found) == [False, False, True]


def test_a_seed_that_is_there_twice_is_refused(tmp_path):
    directory = fabricated.write(tmp_path, fabricated.metrics("lora"), fabricated.metrics("lora", accuracy=0.5))
    with pytest.raises(ExperimentError, match=r"run0 and .*run1 are the same run, lora, seed 0; name a directory"):
        measured.grouped(measured.read(directory))


def test_what_ran_on_a_gpu_is_a_group_of_its_own(tmp_path):
    found = rows(tmp_path, fabricated.metrics("lora", peak_cuda_mb=5.0), fabricated.metrics("lora", seed=1))
    assert [" on a GPU" in str(budget) for budget in found] == [True, False] and len(found) == 2


def test_a_largest_value_needs_every_seed(tmp_path):
    on_gpu = [fabricated.metrics("lora", seed=0, peak_cuda_mb=5.0), fabricated.metrics("lora", seed=1, peak_cuda_mb=7.0)]
    (row,) = measured.grouped(measured.read(fabricated.write(tmp_path / "a", *on_gpu)))[0].rows
    assert row.most("peak_cuda_mb") == 7
    on_cpu = [fabricated.metrics("lora"), fabricated.metrics("lora", seed=1)]
    (row,) = measured.grouped(measured.read(fabricated.write(tmp_path / "b", *on_cpu)))[0].rows
    assert row.most("peak_cuda_mb") is None


def test_trials_of_a_sweep_are_no_results(tmp_path):
    fabricated.write(tmp_path / "trials", fabricated.metrics())
    assert measured.read(tmp_path) == []
    assert len(measured.read(tmp_path / "trials")) == 1  # unless they are what is asked for


def test_what_can_t_be_read_is_named(tmp_path):
    with pytest.raises(ExperimentError, match="'.*nowhere' is no directory"):
        measured.read(tmp_path / "nowhere")
    made = fabricated.metrics()
    del made["f1"]
    with pytest.raises(ExperimentError, match=r"metrics\.json has no f1; run it again"):
        measured.read(fabricated.write(tmp_path / "a", made))
    made = fabricated.metrics(data={"name": "SST-2"}, wrong=None)
    with pytest.raises(ExperimentError, match="not as written here"):
        measured.read(fabricated.write(tmp_path / "b", made))
