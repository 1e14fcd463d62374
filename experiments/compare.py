"""Every method on the same data, base and budget, each in a process of its own; then the tables and figures of all.

    python -m experiments.compare                                      every method, one seed
    python -m experiments.compare --methods lora,qlora --seeds 0,1,2 --train-samples 12000 --epochs 2
    python -m experiments.compare --check                              trains nothing: are the expected numbers met?

A process of its own makes a method's peak memory its own. What is done is skipped, so an interrupted comparison goes on
where it stopped. Runs go to DIR/BUDGET/METHOD-seedN, the report to DIR/report.md, figures to DIR/figures.

With --check the exit code is 1 when a run misses what is expected of it (`expected.py`), and 2 when there is no such run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .flags import flag, listed, methods_of, names, schedule_flags, schedule_of, source_flags
from .methods import METHODS, NOTHING, Method, Schedule

RESULTS = Path(__file__).parent / "results"
DEFAULT = Path("runs", "compare")
#: How far a run's own bar is: "lora:  50%|##   | 480/960 [...".
PROGRESS = re.compile(r"\| (\d+)/\d+ \[")


def parser() -> Parser:
    """The command line of the comparison."""
    p = Parser(__doc__, prog="python -m experiments.compare", usage="%(prog)s [--methods NAMES] [--seeds NUMBERS] [options]")
    p.add_argument("--methods", type=names, default=(), metavar="NAMES", help=f"of {', '.join(METHODS)}; all if not given")
    p.add_argument("--seeds", type=listed(int), default=(0,), metavar="NUMBERS", help="a run for each; 0 if not given")
    what = p.add_argument_group("what to train on what")
    source_flags(what)
    where = f"where the results go, {DEFAULT} if not given; with --check where they are, experiments/results if not given"
    what.add_argument("--output-dir", type=Path, metavar="DIR", help=where)
    what.add_argument("--overwrite", action="store_true", help="do again what is done")
    what.add_argument("--check", action="store_true", help="only hold the runs below DIR against the expected numbers")
    schedule_flags(p.add_argument_group("the schedule"), without=("seed",))
    return p


@dataclass(frozen=True)
class Planned:
    """One run to be done: its plan, as `train.Job` makes it, and where it goes."""

    method: Method
    schedule: Schedule
    plan: dict[str, Any]
    output: Path

    @property
    def examples(self) -> int:
        """Sentences that it trains on, each counted as often as it is seen."""
        if self.method.trains == NOTHING:
            return 0
        every = self.schedule.epochs * self.plan["data"]["train"]
        return min(every, (self.schedule.max_steps or every) * self.schedule.batch_size)

    def argv(self, args: argparse.Namespace) -> list[str]:
        """The command that does it."""
        given = {name: getattr(args, name) for name in ("model", "data", "device")}
        given |= {field.name: getattr(self.schedule, field.name) for field in fields(Schedule)}
        settings = [text for name, value in given.items() if value is not None for text in (flag(name), str(value))]
        command = [sys.executable, "-m", "experiments.sst2", "--method", self.method.name, *settings]
        return [*command, "--output-dir", str(self.output), "--overwrite"]


def planned(args: argparse.Namespace, directory: Path) -> list[Planned]:
    """Every run that was asked for, seed by seed, so that a comparison that is cut short has whole rounds.

    Raises:
        ExperimentError: a flag makes no sense, or data or base are not to be had.
    """
    methods = methods_of(args.methods or METHODS)
    schedules = [(method, schedule_of(args, method, seed=seed)) for seed in dict.fromkeys(args.seeds) for method in methods]
    from . import data, models

    sentences, base = data.load(args.data), models.resolve(args.model)
    print(f"base model: {base}; data: {sentences}", flush=True)

    from .job import Job, choose_device

    device = choose_device(args.device)
    runs = []
    for method, schedule in schedules:
        plan = Job(method, schedule, base, sentences, device).plan()
        runs.append(Planned(method, schedule, plan, directory / budget(plan) / f"{method.name}-seed{schedule.seed}"))
    return runs


def budget(plan: dict[str, Any]) -> str:
    """DATA-MODEL-SENTENCESxEPOCHS, as the name of a directory."""
    data, base = plan["data"], Path(plan["base_model"]["name"]).name
    text = f"{data['name']}-{base}-{data['train']}x{plan['hyperparameters']['epochs']}"
    return re.sub(r"[^\w.-]+", "-", text).lower()


def compare(args: argparse.Namespace) -> int:
    """Do what is not done, show how far it is, then write and print the report."""
    from . import measured, record, reporting

    directory = args.output_dir or DEFAULT
    reporting.require_matplotlib()
    runs = planned(args, directory)
    done = [p for p in runs if not args.overwrite and record.finished(p.output, p.plan)]
    todo = [p for p in runs if p not in done]
    if done:
        print(f"{len(done)} of {len(runs)} runs are done already")
    failed = _train(todo, args, sum(p.examples for p in done))
    failure = f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}"
    if len(failed) == len(runs):
        raise ExperimentError(failure)

    path = reporting.write(directory)
    found = [run for run in measured.read(directory) if run.path.parent in {p.output for p in runs}]
    print("\n".join(f"\n{group.budget}\n{reporting.table(group)}" for group in measured.grouped(found)))
    print(f"\nreport: {path}\ncheck it: python -m experiments.compare --check --output-dir {directory}")
    if failed:
        raise ExperimentError(failure)
    return 0


def _train(todo: Sequence[Planned], args: argparse.Namespace, before: int) -> list[str]:
    """Runs each; returns a line for each that failed."""
    failed: list[str] = []
    if not todo:
        return failed
    total = before + sum(p.examples for p in todo)
    interval = 0.2 if sys.stderr.isatty() else 30
    # The rate is that of the whole comparison, not of the last run: the methods differ in speed.
    with tqdm(total=total, initial=before, unit="ex", smoothing=0, mininterval=interval) as bar:
        for number, one in enumerate(todo, start=1):
            bar.set_description(f"{number}/{len(todo)} {one.method.name}, seed {one.schedule.seed}")
            start = bar.n
            error = _run(one, args, bar, start)
            bar.update(start + one.examples - bar.n)
            if error:
                failed.append(f"{one.method.name}, seed {one.schedule.seed} ({error})")
                bar.write(failed[-1], file=sys.stderr)
    return failed


def _run(one: Planned, args: argparse.Namespace, bar: tqdm, start: int) -> str | None:
    """Does one run in a process of its own, moving the bar along; returns what went wrong, or None."""
    from . import record
    from .sst2 import summary

    process = subprocess.Popen(one.argv(args), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        said = ""
        for line in process.stderr:  # a carriage return ends a line too, in text mode
            if place := PROGRESS.search(line):
                bar.update(start + min(int(place[1]), one.examples) - bar.n)
            elif line.strip():
                said = line.strip()
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code:
        return said.removeprefix("error: ") or f"exit code {code}"
    bar.write(summary(record.finished(one.output, one.plan)))
    return None


def check(directory: Path) -> int:
    """Print each expectation and its verdict; 1 when one is not met.

    Raises:
        ExperimentError: there is nothing to check: no run, or none that an expectation speaks of.
    """
    from . import measured
    from .expected import ITSELF, MET, NOT_MET, NOT_RUN, judge
    from .reporting import check_table

    runs = measured.read(directory)
    rows = judge(runs)
    verdicts = [row.verdict for row in rows]
    if NOT_MET not in verdicts and all(row.verdict == NOT_RUN or row.source == ITSELF for row in rows):
        raise ExperimentError(
            f"--check: {len(runs)} runs are below {str(directory)!r}, and none is of those that a number is expected of; name "
            "the directory of a comparison with --output-dir"
        )
    print(check_table(runs))
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (MET, NOT_MET, NOT_RUN))
    print(f"\n{len(runs)} runs below {directory}: {counts}")
    return 1 if NOT_MET in verdicts else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.check:
        return run(lambda: check(args.output_dir or RESULTS))
    return run(lambda: compare(args), interrupted="what is finished is kept; the same command goes on from there")


if __name__ == "__main__":
    leave_out_unused()
    sys.exit(main())
