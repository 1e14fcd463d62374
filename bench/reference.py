"""peft's rows beside ours: the same data, base, batches and settings, in the experiments' harness and in a plain Trainer.

    python -m bench reference --data DIR        GLUE's SST-2 lies in DIR
    python -m bench reference --plan            only says what is to be done

Each run is a process of its own (`reference_run.py`), so that its peak is its own. What the present code made is left as it is.
Leaves bench/results/reference.json, a row a run; the study's report and the bench's goals read peft's numbers there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import shlex
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import provenance
from experiments.errors import ExperimentError
from experiments.record import read_json
from experiments.reference import CELLS, FILE, RUNS, Row, precision, read, replaces, write
from experiments.several import Several

from . import reference_run

#: Runs at a time, each with its share of the cores, as the study's own.
JOBS = 2
WRITING = threading.Lock()
QUICK = (("--precision bf16 --train-samples 32 --max-steps 1 --epochs 1 --max-length 16", (), ("lora", "qlora"), CELLS),)


class Run:
    """One row that is to be made, and put into the file `output`."""

    examples = 1  # of a bar over all of them

    def __init__(self, engine: str, harness: str, method: str, flags: Sequence[str], row: Path, output: Path) -> None:
        self.row, self.output = row, output
        self.cell = {"engine": engine, "harness": harness, "method": method}
        given = {"--engine": engine, "--harness": harness, "--method": method, "--output": str(row)}
        words = [word for pair in given.items() for word in pair]
        self.command = [sys.executable, "-m", "bench.reference_run", *words, *flags]
        self.job = reference_run.job_of(reference_run.parser().parse_args(self.command[3:]))
        self.name = f"{method}, seed {self.job.schedule.seed}: {engine} in {harness}"

    def made(self, row: Row) -> bool:
        """Whether a row is this one, of the same data and base in every byte, and made by the present code and peft."""
        plan, known = json.loads(json.dumps(self.job.plan())), row.get(provenance.KEY) or {}
        work = {
            **self.cell,
            "settings": plan["hyperparameters"],
            "seed": plan["seed"],
            "sha256": plan["data"]["sha256"],
            "base_sha256": plan["base_model"]["sha256"],
        }
        with_peft = row.get("versions", {}).get("peft") == importlib.metadata.version("peft")
        own = known.get("bench") == reference_run.sources() and not provenance.differing(row)
        return own and with_peft and all(row.get(name) == value for name, value in work.items())

    def like(self, row: Row) -> bool:
        """Whether a row is of the same work, whatever code made it: it took about as long, and may stand in its place."""
        schedule, data = self.job.schedule, self.job.data
        work = (data.name, schedule.train_samples or len(data.train), schedule.epochs, schedule.seed, self.job.precision)
        found = row["data"], row["train"], row["settings"]["epochs"], row["seed"], precision(row)
        return found == work and all(row.get(name) == value for name, value in self.cell.items())

    def outcome(self) -> str:
        """Puts the row into the file; says what it is."""
        made = read_json(self.row)
        with WRITING:
            write(self.output, [*(row for row in read(self.output) if not replaces(made, row)), made])
        return f"{self.name}: accuracy {made['accuracy']:.1%}, peak {made['peak_rss_mb']:,.0f} MiB"


def make(args: argparse.Namespace) -> None:
    """Makes the rows that the present code has not made; each is in the file as soon as it is there. Then rows of other work on
    the same data, which no run makes, are left out of it.

    Raises:
        ExperimentError: peft is not installed, or a row could not be made.
    """
    if importlib.util.find_spec("peft") is None:
        raise ExperimentError("the reference needs peft; run pip install 'lora-core[bench]'")
    output = args.output or (Path("runs", "bench-quick-reference.json") if args.quick else FILE)
    rows = read(output)
    with tempfile.TemporaryDirectory() as folder:
        asked = runs(QUICK if args.quick else RUNS, args.data, Path(folder), output)
        todo = [run for run in asked if not any(map(run.made, rows))]
        before = [row for row in rows if provenance.KEY in row]
        took = sum(next((row[provenance.KEY]["seconds"] for row in before if run.like(row)), 0) for run in todo)
        known = f", which took {took / JOBS / 3600:.1f} hours before, {JOBS} at a time" if took else ""
        done = len(asked) - len(todo)
        print(f"reference: {done} rows are made by the present code; {len(todo)} are to be made{known}", flush=True)
        if args.plan:
            return
        if failed := Several(todo, 0, JOBS).run():
            raise ExperimentError(f"{len(failed)} rows of the reference failed: {'; '.join(failed)}")
        data = {run.job.data.name for run in asked}
        write(output, [row for row in read(output) if row["data"] not in data or any(run.like(row) for run in asked)])
    print(f"rows: {output}")


def runs(parts: Any, data: str, folder: Path, output: Path) -> list[Run]:
    """A run for each cell of each part; `data` is for those that name none."""
    found: list[Run] = []
    for schedule, own, methods, cells in parts:
        for method, (engine, harness) in itertools.product(methods, cells):
            row = folder / str(len(found)) / "row.json"
            row.parent.mkdir()
            flags = [*shlex.split(schedule), *(own or ("--data", data))]
            found.append(Run(engine, harness, method, flags, row, output))
    return found
