"""Every method on the same data, base and budget, each in a process of its own; then the tables and figures of all.

    python -m experiments.compare                                      every method, one seed
    python -m experiments.compare --methods lora,qlora --seeds 0,1,2 --train-samples 12000 --epochs 2
    python -m experiments.compare --jobs 2                             two runs at a time, each with half the cores
    python -m experiments.compare --check                              trains nothing: are the expected numbers met?

What is done is skipped, so an interrupted comparison goes on where it stopped. Runs go to DIR/BUDGET/METHOD-seedN, the report
to DIR/report.md, figures to DIR/figures.

With --check the exit code is 1 when a run misses what is expected of it (`expected.py`), when it was made by other code than
the present one, or when there is nothing to check; of the committed results also when a recipe has changed since, or when one
of them is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .beginning import RESULTS
from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .flags import flag, listed, methods_of, names, positive, schedule_flags, schedule_of, source_flags
from .methods import NOTHING, Method, Schedule
from .recipes import METHODS

DEFAULT = Path("runs", "compare")


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
    what.add_argument("--refresh", action="store_true", help="do again what other code, settings or device made")
    what.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time, each with its share of the cores")
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
    source: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method.name}, seed {self.schedule.seed}"

    @property
    def examples(self) -> int:
        """Sentences that it trains on, each counted as often as it is seen."""
        if self.method.trains == NOTHING:
            return 0
        every = self.schedule.epochs * self.plan["data"]["train"]
        return min(every, (self.schedule.max_steps or every) * self.schedule.batch_size)

    @property
    def command(self) -> list[str]:
        """The command that does it; `source` are its flags of model, data, device and precision."""
        given = {field.name: getattr(self.schedule, field.name) for field in fields(Schedule)}
        settings = [text for name, value in given.items() if value is not None for text in (flag(name), str(value))]
        command = [sys.executable, "-m", "experiments.sst2", "--method", self.method.name, *self.source, *settings]
        return [*command, "--full", "--output-dir", str(self.output), "--overwrite"]

    def outcome(self) -> str:
        from . import record
        from .sst2 import summary

        return summary(record.finished(self.output, self.plan))

    def done(self, overwrite: bool = False, refresh: bool = False) -> bool:
        """Whether there is nothing to do. What other code, other settings or another device made is not done if it is to be
        refreshed.

        Raises:
            ExperimentError: another run is in its place, and stays there.
        """
        from . import provenance, record

        if overwrite:
            return False
        try:
            metrics = record.finished(self.output, self.plan)
        except ExperimentError:
            if not refresh:
                raise
            return False
        if metrics is None or not refresh:
            return metrics is not None
        device = dict(zip(self.source[::2], self.source[1::2], strict=True))["--device"]
        elsewhere = device != "auto" and (metrics["peak_cuda_mb"] is not None) != (device == "cuda")
        return not elsewhere and not provenance.differing(metrics)


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
    from .precision import choose_precision

    device, runs = choose_device(args.device), []
    precision = choose_precision(args.precision, device)  # once for all
    given = {name: getattr(args, name) for name in ("model", "data", "device")} | {"precision": precision}
    source = tuple(text for name, value in given.items() for text in (flag(name), str(value)))
    for method, schedule in schedules:
        plan = Job(method, schedule, base, sentences, device, precision).plan()
        output = directory / budget(plan) / f"{method.name}-seed{schedule.seed}"
        runs.append(Planned(method, schedule, plan, output, source))
    return runs


def budget(plan: dict[str, Any]) -> str:
    """DATA-MODEL-SENTENCESxEPOCHS, as the name of a directory."""
    data, base = plan["data"], Path(plan["base_model"]["name"]).name
    text = f"{data['name']}-{base}-{data['train']}x{plan['hyperparameters']['epochs']}"
    return re.sub(r"[^\w.-]+", "-", text).lower()


def compare(args: argparse.Namespace) -> int:
    """Do what is not done, show how far it is, then write and print the report."""
    from . import measured, reporting
    from .several import Several

    directory = args.output_dir or DEFAULT
    reporting.require_matplotlib()
    runs = planned(args, directory)
    done = [p for p in runs if p.done(args.overwrite, args.refresh)]
    todo = [p for p in runs if p not in done]
    if done:
        print(f"{len(done)} of {len(runs)} runs are done already")
    failed = Several(todo, sum(p.examples for p in done), args.jobs).run()
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


def check(directory: Path) -> int:
    """Print each expectation and its verdict, and which runs were made by other code; 0 when all is well, else 1."""
    from . import measured, reference
    from .expected import ITSELF, MET, NOT_MET, NOT_RUN, judge
    from .reporting import check_table, made_by, outdated

    runs = measured.read(directory)
    measured.grouped(runs)  # refuses two of one seed
    rows = judge(runs, reference.of(directory))
    verdicts = [row.verdict for row in rows]
    if NOT_MET not in verdicts and all(row.verdict == NOT_RUN or row.source == ITSELF for row in rows):
        print(
            f"error: --check: {len(runs)} runs are below {str(directory)!r}, and none is of those that a number is expected "
            "of; name the directory of a comparison with --output-dir",
            file=sys.stderr,
        )
        return 1
    print(check_table(rows))
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (MET, NOT_MET, NOT_RUN))
    print(f"\n{made_by(runs, directory)}\n\n{len(runs)} runs below {directory}: {counts}")
    return 1 if NOT_MET in verdicts or outdated(runs, directory) else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.check:
        return run(lambda: check(args.output_dir or RESULTS))
    return run(lambda: compare(args), interrupted="what is finished is kept; the same command goes on from there")


if __name__ == "__main__":
    leave_out_unused()
    sys.exit(main())
