"""What the report says of claims follows from the numbers, either way."""

import pytest

from experiments import claims, measured
from tests.support import fabricated


def group(tmp_path, *made):
    (found,) = measured.grouped(measured.read(fabricated.write(tmp_path, *made)))
    return found


def verdicts(tmp_path, *made):
    found = group(tmp_path, *made)
    return [claim.verdict for claim in claims.findings(found)], [claim.verdict for claim in claims.aims(found)]


def test_without_the_runs_nothing_is_claimed(tmp_path):
    findings, aims = verdicts(tmp_path, fabricated.metrics("dora"))
    assert set(findings) == set(aims) == {claims.NOT_RUN}
    assert (len(findings), len(aims)) == (4, 3)


def test_differences_beyond_the_interval_support_or_contradict(tmp_path):
    made = [("base", 0.45), ("lora", 0.85), ("high-rank", 0.90), ("bias", 0.80)]
    findings, _ = verdicts(tmp_path, *(fabricated.metrics(*one) for one in made))
    assert findings == [claims.SUPPORTED, claims.NOT_RUN, claims.SUPPORTED, claims.CONTRADICTED]


def test_differences_within_the_interval_say_nothing(tmp_path):
    made = [("base", 0.86), ("lora", 0.87), ("high-rank", 0.88), ("bias", 0.87)]
    findings, _ = verdicts(tmp_path, *(fabricated.metrics(*one) for one in made))
    assert [findings[i] for i in (0, 2, 3)] == [claims.UNDECIDED] * 3


@pytest.mark.parametrize(
    ("accuracy", "peak", "finding", "aims"),
    [
        (0.865, 1200, claims.SUPPORTED, [claims.REACHED, claims.REACHED]),
        (0.865, 1500, claims.CONTRADICTED, [claims.REACHED, claims.MISSED]),
        (0.855, 1200, claims.UNDECIDED, [claims.MISSED, claims.REACHED]),
        (0.80, 1200, claims.CONTRADICTED, [claims.MISSED, claims.REACHED]),
    ],
)
def test_qlora_s_memory_and_its_cost(tmp_path, accuracy, peak, finding, aims):
    lora = fabricated.metrics("lora", 0.87, peak_rss_mb=1300.0)
    qlora = fabricated.metrics("qlora", accuracy, peak_rss_mb=float(peak), base_weight_bytes=53_351_904)
    found = group(tmp_path, lora, qlora)
    claim = claims.findings(found)[1]
    assert claim.verdict == finding
    assert "base weights 41.3 % lower" in claim.numbers
    assert [claims.aims(found)[i].verdict for i in (0, 2)] == aims


def test_the_gpu_s_peak_is_compared_where_there_is_one(tmp_path):
    lora = fabricated.metrics("lora", peak_rss_mb=1300.0, peak_cuda_mb=500.0)
    qlora = fabricated.metrics("qlora", peak_rss_mb=1500.0, peak_cuda_mb=400.0)
    aim = claims.aims(group(tmp_path, lora, qlora))[2]
    assert (aim.verdict, aim.numbers) == (claims.REACHED, "peak GPU memory: QLoRA 400 MiB, LoRA 500 MiB")


def test_lora_is_held_against_full_fine_tuning(tmp_path):
    _, aims = verdicts(tmp_path, fabricated.metrics("lora", 0.87), fabricated.metrics("full", 0.885))
    assert aims[1] == claims.MISSED


def test_the_published_counts_are_recounted():
    table = {row[0]: row for row in claims.recounted()}
    assert list(table) == ["lora", "qlora", "high-rank", "query-only"]
    assert table["high-rank"][1:] == ("0.34 %", "1,179,648 (1.72 %)", "1,771,778 (2.58 %)", "68,726,788")
    assert table["lora"][2:4] == ("589,824 (0.87 %)", "1,181,954 (1.73 %)")
    assert table["query-only"][2] == "147,456 (0.22 %)"


def test_where_the_published_figures_disagree_is_said_with_numbers():
    text = " ".join(claims.disagreements())
    for number in ("1,771,778 of 68,726,788", "2.58 %", "0.34 %", "4.51 MB", "4.51 MiB", "380 MB", "12.3 %", "141 MiB"):
        assert number in text
