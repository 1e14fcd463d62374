"""The numbers that a run must reach, each with where it comes from, and the check.

    judge(measured.read(directory))        a row for each expectation: met, NOT MET, or not run

Five kinds. The study's published accuracies are a floor for its own base, data and length of training. peft's runs
(`reference.py`, with the settings they were made with) may lie above each of ours by no more than the 95 % interval of two
binomials, and above ours of the same seeds by no more than that of their difference, paired by seed and sentence (`paired.py`).
What is trained must beat the larger class by the interval of two binomials. Counts and bytes are exact: `counts.py`. A run's
accuracy is that of its last epoch, and of what it predicted of each sentence.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import predictions, reference
from .counts import Architecture, counted, halved
from .measured import Run, margin, percent
from .methods import NOTHING
from .paired import Difference, over_seeds
from .recipes import METHODS

MET, NOT_MET, NOT_RUN = "met", "NOT MET", "not run"
ITSELF = "the run itself"  # as the source of a number
FILE = Path(__file__).with_name("expected.json")
#: A run that has seen fewer sentences than this is a trial, and may have learned nothing.
TRIAL = 10_000
#: Settings that a row of peft's need not share: how the sentences were cut is in its number of them.
OF_THE_RUN = ("train_samples", "max_steps")
#: What the rows of one job of peft's share, whatever their seeds.
OF_A_JOB = ("harness", "method", "base", "data", "sha256", "train", "validation", "settings")


@dataclass(frozen=True)
class Judgement:
    """One expectation and what became of it."""

    what: str
    expected: str
    found: str
    source: str
    verdict: str


@functools.cache
def known() -> dict[str, Any]:
    """expected.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


@functools.cache
def architectures() -> dict[str, Architecture]:
    """{base: its sizes}, of the bases whose counts are known."""
    return {name: Architecture(**sizes) for name, sizes in known()["architectures"].items()}


def judge(runs: Sequence[Run], peft: Sequence[reference.Row] | None = None) -> list[Judgement]:
    """Every expectation, judged on the runs that it speaks of; `peft`'s rows are the committed ones if none are given."""
    return [
        *_published(runs),
        *_peft(runs, reference.read() if peft is None else peft),
        *_majority(runs),
        *_consistent(runs),
        *_consistent_rows(runs, reference.read() if peft is None else peft),
        *_exact(runs),
    ]


# --- accuracies -------------------------------------------------------------------------------------------------------


def _published(runs: Sequence[Run]) -> Iterator[Judgement]:
    table = known()["published"]
    for row in table["rows"]:
        if METHODS[row["method"]].trains == NOTHING:
            continue  # an untrained head says whatever its random numbers say

        def meant(run: Run, row: dict = row) -> bool:
            b = run.budget
            enough = b.train >= table["train"] and b.epochs >= table["epochs"] and b.max_steps is None
            return (b.base, b.data, run.label) == (table["base"], table["data"], row["method"]) and enough

        yield _accuracy(
            f"{row['method']}, {table['data']} x {table['epochs']}, {table['base']}",
            filter(meant, runs),
            lambda run, row=row: row["accuracy"],
            f"at least {percent(row['accuracy'])}",
            f"published: {table['source']}",
        )


def unmatched(runs: Sequence[Run], rows: Sequence[reference.Row]) -> list[str]:
    """Of which of peft's rows no run has the settings, a line each."""
    lines = (f"{found.what}, {found.source}" for found in _peft(runs, rows) if found.verdict == NOT_RUN)
    return [f"{reference.FILE.name}: {line}: no run of ours has its settings" for line in lines]


def _peft(runs: Sequence[Run], rows: Sequence[reference.Row]) -> Iterator[Judgement]:
    jobs: dict[str, list[reference.Row]] = {}
    for row in rows:
        if row["engine"] == "peft":
            jobs.setdefault(json.dumps([row.get(name) for name in OF_A_JOB], sort_keys=True), []).append(row)
    for job in jobs.values():
        row, theirs = job[0], sum(row["accuracy"] for row in job) / len(job)

        def meant(run: Run, row: dict = row) -> bool:
            same = (run["method"], run["base_model"]["name"]) == (row["method"], row["base"])
            data = all(run["data"][key] == row[key] for key in ("train", "validation")) and run["data"]["name"] == row["data"]
            data = data and run["data"].get("sha256") == row.get("sha256", run["data"].get("sha256"))
            own = {key: value for key, value in row["settings"].items() if key not in OF_THE_RUN}
            own["precision"] = reference.precision(row)
            return (
                same and data and all(run.settings.get(key) == value for key, value in own.items()) and not run.budget.max_steps
            )

        ours = list(filter(meant, runs))
        found = _accuracy(
            f"{row['method']}, {row['train']:,} of {row['data']} x {row['settings']['epochs']}, {Path(row['base']).name}",
            ours,
            lambda run, row=row, theirs=theirs: theirs - margin(run["accuracy"], theirs, row["validation"]),
            f"{percent(theirs)}, less the interval",
            reference.source(job),
        )
        if difference := _against(ours, job):
            verdict = NOT_MET if difference.high < 0 else found.verdict
            found = replace(found, found=f"{found.found}; {difference}", verdict=verdict)
        yield found


def _against(runs: Sequence[Run], job: Sequence[reference.Row]) -> Difference | None:
    """Our runs against peft's of the same seeds; None if none of them kept what it said of each sentence."""
    labels = _labels(runs)
    ours = {
        run["seed"]: kept
        for run in runs
        if (kept := _whole(run)) is not None and np.array_equal(kept[0], labels[_sentences(run)])
    }
    theirs = {
        row["seed"]: (kept[0], said)
        for row in job
        if (kept := ours.get(row["seed"])) and (said := reference.predicted(row)) is not None
    }
    return over_seeds(theirs, ours, f"{job[0]['method']} of peft's and ours")


def _majority(runs: Sequence[Run]) -> Iterator[Judgement]:
    table = known()["majority"]
    for row in table["rows"]:
        share, n = row["larger"] / row["validation"], row["validation"]

        def meant(run: Run, row: dict = row) -> bool:
            b = run.budget
            trained = METHODS[run["method"]].trains != NOTHING if run["method"] in METHODS else False
            seen = b.train * b.epochs >= TRIAL and b.max_steps is None
            return (b.data, b.validation) == (row["data"], row["validation"]) and trained and seen

        yield _accuracy(
            f"whatever is trained, {row['data']}",
            filter(meant, runs),
            lambda run, share=share, n=n: share + margin(run["accuracy"], share, n),
            f"above {percent(share)} by the interval",
            table["source"],
        )


def _accuracy(what: str, runs: Iterable[Run], floor: Callable[[Run], float], expected: str, source: str) -> Judgement:
    runs = list(runs)
    if not runs:
        return Judgement(what, expected, "-", source, NOT_RUN)
    met = all(run["accuracy"] >= floor(run) for run in runs)
    found = [run["accuracy"] for run in runs]
    shown = " to ".join(dict.fromkeys((percent(min(found)), percent(max(found)))))
    shown += f", {len(runs)} runs" if len(runs) > 1 else ""
    return Judgement(what, expected, shown, source, MET if met else NOT_MET)


# --- exact numbers ----------------------------------------------------------------------------------------------------


def _consistent(runs: Sequence[Run]) -> Iterator[Judgement]:
    """The accuracy of a run is that of its last epoch, not of its best, and that of what it predicted, sentence by sentence."""
    trained = [run for run in runs if run["accuracy_by_epoch"]]
    other = [str(run.path.parent) for run in trained if run["accuracy_by_epoch"][-1] != run["accuracy"]]
    if trained:
        found = f"not in {', '.join(other)}" if other else f"{len(trained)} runs"
        yield Judgement("accuracy", "that of the last epoch", found, ITSELF, NOT_MET if other else MET)
    if runs:
        labels = _labels(runs)
        wrong = [str(run.path.parent) for run in runs if not _agrees(run.metrics, labels.get(_sentences(run)), _whole(run))]
        yield _predictions("predictions", wrong, f"{len(runs)} runs")


def _consistent_rows(runs: Sequence[Run], rows: Sequence[reference.Row]) -> Iterator[Judgement]:
    """The accuracies of peft's rows, and of ours beside them, are those of what they predicted."""
    labels, found = _labels(runs), {}
    for row in rows:
        known = labels.get((row["data"], row["validation"], row.get("sha256")))
        if known is not None and (said := reference.predicted(row)) is not None:
            found[reference.named(row)] = _agrees(row, known, (known, said))
    if found:
        yield _predictions(
            "predictions beside peft's", [name for name, right in found.items() if not right], f"{len(found)} rows"
        )


def _predictions(what: str, wrong: Sequence[str], all_of_them: str) -> Judgement:
    found = f"not in {', '.join(wrong)}" if wrong else all_of_them
    return Judgement(what, "as many right as the accuracy says", found, ITSELF, NOT_MET if wrong else MET)


def _agrees(metrics: Mapping[str, Any], labels: np.ndarray | None, kept: tuple[np.ndarray, np.ndarray] | None) -> bool:
    """Whether predictions were kept, are of these labels, and are right as often as the metrics say."""
    if kept is None or not np.array_equal(labels, kept[0]):
        return False
    return round(metrics["accuracy"] * len(labels)) == int((labels == kept[1]).sum())


def _labels(runs: Sequence[Run]) -> dict[tuple, np.ndarray]:
    """{validation sentences: their labels, as most runs that were judged on them have them}."""
    found: dict[tuple, Counter[bytes]] = {}
    for run in runs:
        if kept := _whole(run):
            found.setdefault(_sentences(run), Counter())[kept[0].tobytes()] += 1
    return {key: np.frombuffer(seen.most_common(1)[0][0], np.uint8) for key, seen in found.items()}


def _sentences(run: Run) -> tuple:
    """What tells one set of validation sentences from another."""
    return run["data"]["name"], run["data"]["validation"], run["data"].get("sha256")


def _whole(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """(labels, predicted) of a run, if it kept one for each sentence."""
    kept = predictions.read(run.path.parent)
    return kept if kept is not None and len(kept[0]) == run["data"]["validation"] else None


def _exact(runs: Sequence[Run]) -> Iterator[Judgement]:
    """Counts and bytes: one row for all runs of a method on a base that must come to the same."""
    found: dict[tuple[str, str, str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for run in runs:
        base, method = run["base_model"]["name"], METHODS.get(run["method"])
        if base not in architectures() or method is None:
            continue
        architecture, settings = architectures()[base], run.settings
        where = f"{run.label}, {Path(base).name}"
        trains = settings.get("trains", method.trains)
        if counts := counted(architecture, trains, settings):
            expectation = (where, "parameters in the adapter, trained, held", "closed form", tuple(vars(counts).values()))
            values = tuple(run[f"{name}_parameters"] for name in ("adapter", "trainable", "total"))
            found.setdefault(expectation, []).append(values)
        quantize = settings.get("quantize", False)
        held, size = ("int8", architecture.int8_bytes) if quantize == "int8" else ("NF4", architecture.quantized_bytes)
        source = f"{8 * size / architecture.quantized:.3f} bits a parameter in {held}, 32 in the rest"
        if (half := halved(architecture, trains, settings)) is None:
            continue
        dense = "16 bits a frozen weight, 32 in the rest" if half else "32 bits a parameter"
        weight = (where, "bytes of the base", source if quantize else dense)
        found.setdefault((*weight, (architecture.base_bytes(quantize, half),)), []).append((run["base_weight_bytes"],))
    for (where, text, source, numbers), values in found.items():
        wrong = sorted({value for value in values if value != numbers})
        shown = " or ".join(map(_numbers, wrong or [numbers]))
        yield Judgement(f"{where}: {text}", _numbers(numbers), shown, source, NOT_MET if wrong else MET)


def _numbers(values: Iterable[int]) -> str:
    return " / ".join(f"{value:,}" for value in values)
