"""What the study claims and what this project aims at, held against the runs of one budget.

A difference of two accuracies is paired over seeds and sentences (`paired.py`) and judged by its 95 % interval; a peak by the
spread of its seeds. Each claim says a range that what it speaks of must lie in:

    supported             the whole interval, or every seed, lies within
    contradicted          all of it lies outside
    can't be told apart   some lies on either side

So each can fail. What one seed says is told apart: its interval is over sentences alone. What contradicts them:

    LoRA lifts a base       it gains less than 30 points on the untrained base (published: 41), or trains 5 % or more
    query projections       they are no worse than LoRA on all four, or train no fewer than LoRA or rank 32 (the methods that
                            were published; `low-rank`, which was not, trains as few, and is shown beside)
    QLoRA's memory          the peak falls by less than 9 % or by more than 15 % (published: 12)
    QLoRA's little cost     it costs more than 1 point; so of bfloat16, where a budget was run in float32 too
    a higher rank, biases   they gain nothing, or more than 2 points: then it is not marginal

An aim of half a point is one of the mean: it is reached or missed, or its interval is too wide to say, which is more than 1
point either way, and not all of it below the aim.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .measured import Group, Row, percent
from .paired import Difference, difference

SUPPORTED, CONTRADICTED, UNDECIDED, NOT_RUN = "supported", "contradicted", "can't be told apart", "not run"
REACHED, MISSED, TOO_WIDE = "reached", "missed", "too wide an interval to say"
NOT_KEPT = "no seed has the predictions of both"
ONE_SEED = ", on one seed"

LIFT, FEW = 0.30, 0.05  # at least so many points more, of less than so much trained
SAVING = (0.09, 0.15)  # "about 12 %" of a peak
LITTLE_COST = (-0.01, math.inf)
MARGINALLY = (0.0, 0.02)
#: How far an aim lets one accuracy lie below another, and how wide the interval may be, either way.
WITHIN, WIDEST = 0.005, 0.01
#: What `best` is to reach on all of SST-2 in three epochs, as a mean of so many seeds.
BEST, BEST_SEEDS, WHOLE = 0.90, 3, (67_349, 3)


@dataclass(frozen=True)
class Claim:
    """A claim or an aim, the verdict, and the numbers behind it."""

    text: str
    verdict: str
    numbers: str = ""


def findings(group: Group) -> list[Claim]:
    """The study's findings, as the rows of one budget show them."""
    return [
        _lift(group),
        _query_only(group),
        _memory(group),
        _gain(group, "That costs QLoRA little accuracy", "lora", "qlora", LITTLE_COST),
        _gain(group, "A higher rank helps marginally", "lora", "high-rank", MARGINALLY),
        _gain(group, "Training biases too helps a little", "lora", "bias", MARGINALLY),
    ]


def of_precision(groups: Sequence[Group]) -> list[Claim]:
    """What bfloat16 costs each method that was run on one budget in float32 too."""
    found = []
    for low, high in itertools.permutations(groups, 2):
        if (low.budget.precision, high.budget) == ("bf16", replace(low.budget, precision="fp32")):
            pairs = ((high.row(row.label), row) for row in low.rows)
            found += [_cheap(before, after) for before, after in pairs if before]
    return found


def _cheap(before: Row, after: Row) -> Claim:
    text = f"bfloat16 costs {after.label} little accuracy"
    if (found := difference(before, after)) is None:
        return Claim(text, NOT_RUN, NOT_KEPT)
    what, float32, bfloat16 = peaks(before, after)
    a, b = _means(found, before, after)
    numbers = f"{percent(b)}, in float32 {percent(a)}: {found}"
    if float32:
        numbers += f"; {what} {spread(bfloat16)} MiB, in float32 {spread(float32)} MiB"
    return Claim(text, _judged(found, LITTLE_COST), numbers)


def aims(group: Group) -> list[Claim]:
    """What this project wants to reach on one budget."""
    return [
        _close(group, "QLoRA within 0.5 point of LoRA", "lora", "qlora"),
        _close(group, "LoRA within 0.5 point of full fine-tuning", "full", "lora"),
        _close(group, "rsLoRA, LoRA at four times the scale, within 0.5 point of full fine-tuning", "full", "rslora"),
        _close(group, "`best`, LoRA on every linear layer, within 0.5 point of full fine-tuning", "full", "best"),
        _lighter(group, "QLoRA's measured peak memory is below LoRA's"),
        _best(group, "`best` reaches 90.0 % at the full budget"),
    ]


# --- findings ---------------------------------------------------------------------------------------------------------


def _lift(group: Group) -> Claim:
    text = "LoRA lifts a base from chance (84 % up from 43 %) with few trained parameters"
    base, lora = group.row("base"), group.row("lora")
    if not base or not lora:
        return Claim(text, NOT_RUN)
    found, share = difference(base, lora), _share(lora)
    if found is None:
        return Claim(text, NOT_RUN, NOT_KEPT)
    verdict = CONTRADICTED if share >= FEW else _judged(found, (LIFT, math.inf))
    return Claim(text, verdict, f"{_accuracies(found, base, lora)}; {100 * share:.3g} % of the parameters trained")


def _query_only(group: Group) -> Claim:
    text = "Of the published methods, adapters on the query projections alone train the fewest parameters, at a lower accuracy"
    rows = {name: group.row(name) for name in ("lora", "high-rank", "query-only")}
    if not all(rows.values()):
        return Claim(text, NOT_RUN)
    counts = {name: row.mean("trainable_parameters") for name, row in rows.items()}
    found = difference(rows["lora"], rows["query-only"])
    if found is None:
        return Claim(text, NOT_RUN, NOT_KEPT)
    fewest = counts["query-only"] < min(counts["lora"], counts["high-rank"])
    verdict = _judged(found, (-math.inf, 0)) if fewest else CONTRADICTED
    trained = ", ".join(f"{name} {count:,.0f}" for name, count in counts.items())
    if low := group.row("low-rank"):
        trained += f"; low-rank, on all four, {low.mean('trainable_parameters'):,.0f}: {percent(low.accuracy)}"
    return Claim(text, verdict, f"{_accuracies(found, rows['lora'], rows['query-only'])}; trained: {trained}")


def _memory(group: Group) -> Claim:
    text = "QLoRA saves about 12 % of memory"
    lora, qlora = group.row("lora"), group.row("qlora")
    if not lora or not qlora:
        return Claim(text, NOT_RUN)
    what, before, after = peaks(lora, qlora)
    saved = [1 - b / a for a, b in zip(before, after, strict=True)]
    if not saved:
        return Claim(text, NOT_RUN, "no seed has both")
    weights = 1 - qlora.mean("base_weight_bytes") / lora.mean("base_weight_bytes")
    shown = " to ".join(dict.fromkeys(map(_less, (min(saved), max(saved)))))
    verdict = _with_seeds(_verdict(min(saved), max(saved), SAVING), len(saved))
    return Claim(text, verdict, f"{what} {shown}, base weights {_less(weights)}")


def _gain(group: Group, text: str, before: str, after: str, wanted: tuple[float, float]) -> Claim:
    a, b = group.row(before), group.row(after)
    if not a or not b:
        return Claim(text, NOT_RUN)
    found = difference(a, b)
    if found is None:
        return Claim(text, NOT_RUN, NOT_KEPT)
    return Claim(text, _judged(found, wanted), _accuracies(found, a, b))


def _judged(found: Difference, wanted: tuple[float, float]) -> str:
    return _with_seeds(_verdict(found.low, found.high, wanted), len(found.seeds))


def _with_seeds(verdict: str, seeds: int) -> str:
    """A verdict that says so if it rests on one seed."""
    return verdict + (ONE_SEED if seeds == 1 and verdict not in (UNDECIDED, TOO_WIDE) else "")


def _verdict(low: float, high: float, wanted: tuple[float, float]) -> str:
    """Whether what lies between `low` and `high` is within a range, its ends left out."""
    if wanted[0] < low and high < wanted[1]:
        return SUPPORTED
    return CONTRADICTED if high <= wanted[0] or low >= wanted[1] else UNDECIDED


# --- aims -------------------------------------------------------------------------------------------------------------


def _close(group: Group, text: str, of: str, method: str) -> Claim:
    a, b = group.row(of), group.row(method)
    if not a or not b:
        return Claim(text, NOT_RUN)
    found = difference(a, b)
    if found is None:
        return Claim(text, NOT_RUN, NOT_KEPT)
    return Claim(text, _with_seeds(_reached(found), len(found.seeds)), _accuracies(found, a, b))


def _reached(found: Difference) -> str:
    if found.half > WIDEST:
        return MISSED if found.high < -WITHIN else TOO_WIDE
    return REACHED if found.gain >= -WITHIN else MISSED


def _lighter(group: Group, text: str) -> Claim:
    lora, qlora = group.row("lora"), group.row("qlora")
    if not lora or not qlora:
        return Claim(text, NOT_RUN)
    what, before, after = peaks(lora, qlora)
    if not before:
        return Claim(text, NOT_RUN, "no seed has both")
    lighter = [b < a for a, b in zip(before, after, strict=True)]
    verdict = REACHED if all(lighter) else UNDECIDED if any(lighter) else MISSED
    return Claim(text, _with_seeds(verdict, len(lighter)), f"{what}: QLoRA {spread(after)} MiB, LoRA {spread(before)} MiB")


def _best(group: Group, text: str) -> Claim:
    best, budget = group.row("best"), group.budget
    if not best or not budget.usual or (budget.data, budget.train, budget.epochs) != ("SST-2", *WHOLE):
        return Claim(text, NOT_RUN)
    numbers = f"{percent(best.accuracy)}, the mean of {len(best.runs)}"
    if len(best.runs) < BEST_SEEDS:
        return Claim(text, NOT_RUN, f"{numbers}; {BEST_SEEDS} seeds are needed")
    return Claim(text, REACHED if best.accuracy >= BEST else MISSED, numbers)


# --- numbers ----------------------------------------------------------------------------------------------------------


def peaks(a: Row, b: Row) -> tuple[str, list[float], list[float]]:
    """What is compared, and its peak in MiB for each seed that both rows have: the GPU's memory if all ran on one, else the
    process's."""
    pairs = [(one, other) for one in a.runs for other in b.runs if one["seed"] == other["seed"]]
    gpu = bool(pairs) and all(run["peak_cuda_mb"] is not None for pair in pairs for run in pair)
    what, key = ("peak GPU memory", "peak_cuda_mb") if gpu else ("peak memory", "peak_rss_mb")
    return what, [one[key] for one, _ in pairs], [other[key] for _, other in pairs]


def spread(values: list[float]) -> str:
    """The least and the largest of some values; one where they are shown alike."""
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values))))


def _accuracies(found: Difference, before: Row, after: Row) -> str:
    a, b = _means(found, before, after)
    return f"{after.label} {percent(b)}, {before.label} {percent(a)}: {found}"


def _means(found: Difference, a: Row, b: Row) -> tuple[float, float]:
    """The accuracies of two rows over the seeds of their difference: means over others may lie on its other side."""
    first, second = (statistics.fmean(run["accuracy"] for run in row.runs if run["seed"] in found.seeds) for row in (a, b))
    return first, second


def _share(row: Row) -> float:
    return row.mean("trainable_parameters") / row.mean("total_parameters")


def _less(share: float) -> str:
    return f"{percent(abs(share))} {'lower' if share > 0 else 'higher'}"
