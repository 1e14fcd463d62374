"""What peft made of the same work: the rows that `python -m bench reference` left, and what they say beside ours.

    rows = read()               each: engine, harness, method, data, train, settings, accuracy, peak_rss_mb, ...
    two_by_two(rows, "qlora")   the peaks of engine x harness, and which part of the gap is whose

The engine puts the adapters on, the harness trains. Rows of an earlier version name no harness: how they were trained is lost.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.files.disk import write_whole

from . import provenance, record
from .errors import ExperimentError
from .methods import FP32

FILE = Path(__file__).parents[1] / "bench" / "results" / "reference.json"
ENGINES, HARNESSES = ("ours", "peft"), ("ours", "plain")
HARNESS = {"ours": "our harness", "plain": "a plain Trainer", None: "a harness that was not kept"}  # in words
Row = dict[str, Any]


def read(path: Path = FILE) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return record.read_json(path)["rows"] if path.exists() else []


def of(directory: Path) -> list[Row]:
    """The rows that stand beside the runs of a directory: those in it, if there are any, else the committed ones."""
    return read(directory / FILE.name) or read()


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes the file, a line a row, whole or not at all."""
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'{{\n "rows": [\n  {lines}\n ]\n}}\n'.encode())


def replaces(new: Row, old: Row) -> bool:
    """Whether a row takes the place of an older one: the same work, in the same harness or in one that is not known."""
    same = all(new[name] == old[name] for name in ("engine", "method", "data", "train", "seed"))
    return same and new["settings"]["epochs"] == old["settings"]["epochs"] and old["harness"] in (new["harness"], None)


def precision(row: Row) -> str:
    """What its products were computed in; rows of an earlier version do not say, and were in float32."""
    return row["settings"].get("precision", FP32)


def predicted(row: Row) -> np.ndarray | None:
    """What it called each validation sentence, (N,) uint8, 0 or 1; None for a row of an earlier version.

    Raises:
        ExperimentError: it does not say it of each sentence.
    """
    if "predicted" not in row:
        return None
    digits = row["predicted"]
    if len(digits) != row["validation"] or not set(digits) <= set("01"):
        raise ExperimentError(
            f"peft's {row['method']}, seed {row['seed']}: 'predicted' must be {row['validation']} digits, each 0 or 1; "
            "run python -m bench reference"
        )
    return np.frombuffer(digits.encode(), np.uint8) - ord("0")


def beside(rows: Sequence[Row], method: str, data: str, train: int, epochs: int, computed: str) -> Row | None:
    """peft's row of one job, in a plain Trainer as its users have it, of the first seed; the only one, if there is no such."""
    wanted = ("peft", method, data, train, epochs, computed)
    found = [
        row
        for row in rows
        if (row["engine"], row["method"], row["data"], row["train"], row["settings"]["epochs"], precision(row)) == wanted
    ]
    return min(found, key=lambda row: (row["harness"] != "plain", row["seed"]), default=None)


@dataclass(frozen=True)
class TwoByTwo:
    """The peaks of one job in MiB, {(engine, harness): peak}."""

    work: str
    peaks: dict[tuple[str, str], float]

    @property
    def engine(self) -> float:
        """What peft's engine takes more than ours, on average over the harnesses."""
        return sum(self.peaks["peft", h] - self.peaks["ours", h] for h in HARNESSES) / 2

    @property
    def harness(self) -> float:
        """What a plain Trainer takes more than our harness, on average over the engines."""
        return sum(self.peaks[e, "plain"] - self.peaks[e, "ours"] for e in ENGINES) / 2

    def __str__(self) -> str:
        whole = self.peaks["peft", "plain"] - self.peaks["ours", "ours"]
        return (
            f"{self.work}: peft in a plain Trainer takes {whole:+,.0f} MiB, of which {self.engine:+,.0f} are the engine's and "
            f"{self.harness:+,.0f} the harness's"
        )


def two_by_two(rows: Sequence[Row], method: str) -> TwoByTwo | None:
    """The largest job of a method of which all four cells were made; None if there is none."""
    jobs: dict[tuple, dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["method"] == method and row["harness"]:
            epochs = row["settings"]["epochs"]
            job = row["train"] * epochs, row["data"], row["train"], epochs, precision(row), row["seed"]
            jobs.setdefault(job, {})[row["engine"], row["harness"]] = row["peak_rss_mb"]
    whole = [(job, peaks) for job, peaks in jobs.items() if len(peaks) == len(ENGINES) * len(HARNESSES)]
    if not whole:
        return None
    (_, data, train, epochs, computed, _), peaks = max(whole, key=lambda found: found[0])
    return TwoByTwo(f"{method}, {train:,} sentences of {data} x {epochs}, {computed}", peaks)


def outdated(rows: Sequence[Row]) -> list[str]:
    """What other code made, a line each; a line if there is nothing."""
    if not rows:
        return [f"{FILE.name}: no row of peft's"]
    found = []
    for row in rows:
        other = [
            *provenance.differing(row),
            *(["bench"] if (row.get(provenance.KEY) or {}).get("bench") != bench_code() else []),
        ]
        job = f"{row['method']}, {row['train']:,} of {row['data']} x {row['settings']['epochs']}, seed {row['seed']}"
        found += [f"{FILE.name}: {job}, {row['engine']} in {row['harness']}: other {' and '.join(other)}"] if other else []
    return found


@functools.cache
def bench_code() -> str:
    """The hash of the bench's code that makes a row, as `bench.reference_run` records it."""
    start = FILE.parents[1] / "reference_run.py"
    return provenance.code_hash(provenance.imported(start), start.parent)


def source(rows: Sequence[Row]) -> str:
    """Where the rows of one job, in one harness, come from, in words."""
    row, seeds = rows[0], sorted(row["seed"] for row in rows)
    version = row.get("versions", {}).get("peft", "0.21.2")
    seen = f"peft {version}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    made = ", beside other code of ours" if row["harness"] and any(map(provenance.differing, rows)) else ""
    return f"{seen}, in {HARNESS[row['harness']]}{made}"
