"""What peft made of the same work: the rows that `python -m bench reference` left, and what they say beside ours.

    rows = read()               each: engine, harness, method, data, train, settings, accuracy, peak_rss_mb, ...
    two_by_two(rows, "qlora")   the peaks of engine x harness, and which part of the gap is whose

The engine puts the adapters on, the harness trains. Rows of an earlier version name no harness: how they were trained is lost.
"""

from __future__ import annotations

import functools
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.files.disk import write_whole

from . import provenance, record
from .command import Parser
from .errors import ExperimentError
from .flags import schedule_flags
from .methods import FP32

FILE = Path(__file__).parents[1] / "bench" / "results" / "reference.json"
ENGINES, HARNESSES = ("ours", "peft"), ("ours", "plain")
REQUIRED = ("engine", "harness", "method", "data", "train", "settings", "seed")
HARNESS = {"ours": "our harness", "plain": "a plain Trainer", None: "a harness that was not kept"}  # in words
Row = dict[str, Any]
#: What is made: (flags of the work, flags of the data, methods, cells), each cell an engine in a harness. As the study, in
#: bfloat16. peft in a plain Trainer has three seeds where that takes minutes, so that differences are judged over seeds too.
CELLS = tuple(itertools.product(ENGINES, HARNESSES))
STUDY, WHOLE = "--train-samples 12000 --epochs 2 --precision bf16", "--epochs 3 --precision bf16"
RUNS = (
    (STUDY, (), ("lora", "qlora"), CELLS),
    (STUDY, (), ("query-only",), (("peft", "ours"),)),
    (f"{STUDY} --seed 1", (), ("lora", "qlora"), (("peft", "plain"),)),
    (f"{STUDY} --seed 2", (), ("lora", "qlora"), (("peft", "plain"),)),
    (WHOLE, (), ("lora", "qlora"), (("peft", "plain"),)),
    (WHOLE, ("--data", "packaged"), ("lora", "qlora"), (("peft", "ours"),)),
)


def read(path: Path = FILE) -> list[Row]:
    """The rows of a file; none if there is no file.

    Raises:
        ExperimentError: it is not as written here.
    """
    rows = record.read_json(path).get("rows") if path.exists() else []
    if not isinstance(rows, list):
        raise ExperimentError(f"{path} has no list of rows; run python -m bench reference")
    for number, row in enumerate(rows):
        if missing := [name for name in REQUIRED if name not in row]:
            raise ExperimentError(f"{path}: row {number} has no {', '.join(missing)}; run python -m bench reference")
    return rows


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
    """What of `RUNS` is missing among some rows, what is there besides or twice, and what other code made; a line each."""
    there, asked = Counter(map(named, rows)), Counter(wanted())
    found = [f"{name}: missing" for name in asked - there] + [f"{name}: there besides, or twice" for name in there - asked]
    for row in rows:
        known = row.get(provenance.KEY) or {}
        other = [*provenance.differing(row), *(["bench"] if known.get("bench") != bench_code() else [])]
        found += [f"{named(row)}: other {' and '.join(other)}"] if other else []
        found += [] if "predicted" in row else [f"{named(row)}: no predictions"]
    return [f"{FILE.name}: {line}" for line in found]


def wanted() -> list[str]:
    """The names of the rows of `RUNS`."""
    p = Parser(__doc__)
    p.add_argument("--precision")
    p.add_argument("--data")
    schedule_flags(p)
    names = []
    for work, of, methods, cells in RUNS:
        args = p.parse_args([*shlex.split(work), *of])
        data = "Rotten Tomatoes" if args.data == "packaged" else "SST-2"
        settings = {"train_samples": args.train_samples, "epochs": args.epochs, "precision": args.precision}
        for method, (engine, harness) in itertools.product(methods, cells):
            row = {
                "engine": engine,
                "harness": harness,
                "method": method,
                "data": data,
                "seed": args.seed,
                "settings": settings,
            }
            names.append(named(row))
    return names


def named(row: Row) -> str:
    """A row in words: no two have the same."""
    settings = row["settings"]
    much = f"{settings['train_samples']:,}" if settings.get("train_samples") else "all"
    work = f"{row['method']}, {much} of {row['data']} x {settings['epochs']}, {precision(row)}, seed {row['seed']}"
    return f"{work}, {row['engine']} in {row['harness']}"


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
