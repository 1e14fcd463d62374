"""Every committed result again, with the present code: `make results`. On the CPU, where a GPU is there too.

    python -m experiments.remake --plan                 says what is to be done, and how long it will take
    python -m experiments.remake --data DIR --jobs 2    does it; GLUE's SST-2 lies in DIR

What the present code made already is left as it is, so that a command that was stopped goes on. The time is that of earlier
runs, from the seconds that they recorded. In order: the sweep, which says what `best` is, the runs of the study, peft's runs
beside them (`python -m bench reference`), the report with its figures, the tables of README.md and docs/study.md, the notebook,
what the bench says of the job's memory (`python -m bench job`).
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .beginning import RESULTS
from .command import Parser, leave_out_unused, run
from .compare import Planned, parser as comparison, planned
from .errors import ExperimentError
from .flags import positive
from .methods import BF16
from .recipes import METHODS
from .sweep import CSV, TRIALS, Setting, made_by_other_code, parser as sweeping, read_csv, wanted

if TYPE_CHECKING:
    from .measured import Run

#: 12,000 sentences of SST-2, twice: the table of every method.
STUDY = "--train-samples 12000 --epochs 2 --device cpu"
WHOLE = "--epochs 3 --device cpu"
LARGER = "--train-samples 12000 --epochs 1 --device cpu"
#: The flags of `experiments.compare`, of one part of the results each. Every method's first seed is first, so that a table is
#: soon there. Rows that claims are made of have five; what lies between `full` and `best` is known to a point with ten. They
#: compute in bfloat16, whatever the machine, but for two parts: one does in float32 what another does, which shows what that
#: costs, and the larger base computes in what every processor multiplies at its full speed.
PARTS = (
    f"{STUDY} --model packaged --seeds 0,1,2 --precision bf16",
    f"{STUDY} --model packaged --seeds 3,4 --methods lora,qlora --precision bf16",
    f"{STUDY} --model packaged --seeds 3,4,5,6,7,8,9 --methods full,best --precision bf16",
    f"{WHOLE} --model packaged --seeds 0,1,2 --methods lora,qlora,best --precision bf16",
    f"{WHOLE} --model packaged --seeds 0 --methods full --precision bf16",
    f"{WHOLE} --model packaged --data packaged --seeds 0,1,2 --methods lora,qlora --precision bf16",
    f"{STUDY} --model packaged --seeds 0,1,2 --methods lora,qlora --precision fp32",
    f"{LARGER} --model packaged-base --seeds 0 --methods lora,qlora,query-only,low-rank,high-rank --precision fp32",
)
#: Where the runs in float32 are: their names may be those of others.
FLOAT32 = "float32"
#: The flags of `experiments.sweep` that found the recipe `best`.
SWEEP = (
    "--model packaged --device cpu --precision bf16 --trials 14 --train-samples 12000 --held-out 4000 --ranks 16,32,64 "
    "--alphas 16,32 --dropouts 0.05,0.25 --learning-rates 3e-4,1e-3 --lora-plus 1,2,4 "
    "--target-modules query,key,value,attention.output.dense/all-linear"
)
SWEPT = Path("runs", "results-sweep")


def parser() -> Parser:
    """The command line."""
    p = Parser(__doc__, prog="python -m experiments.remake")
    p.add_argument("--data", default="auto", metavar="DIR", help="GLUE's SST-2; $SST2_DIR if it is set, else the Hub's")
    p.add_argument("--jobs", type=positive, default=2, metavar="N", help="runs at a time, each with its share of the cores")
    p.add_argument("--plan", action="store_true", help="only say what is to be done and how long it will take")
    p.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="where the results are")
    return p


def remake(args: argparse.Namespace) -> int:
    """Say how long it will take; unless only that was asked for, do it."""
    from . import documents, measured, reference, reporting
    from .data import SIZES
    from .precision import speed_of_bf16
    from .several import Several

    reporting.require_matplotlib()
    runs = [one for part in PARTS for one in _part(part, args)]
    if not any((one.plan["data"]["name"], one.plan["data"]["train"]) == ("SST-2", SIZES[0]) for one in runs):
        raise ExperimentError(
            f"--data: the study is of SST-2, all of it, and {runs[0].plan['data']['name']} was found; name a directory with "
            "GLUE's files, or set SST2_DIR"
        )
    done = [one for one in runs if one.done(refresh=True)]
    todo = [one for one in runs if one not in done]
    own = args.output_dir.resolve() == RESULTS
    rows = () if own else ("--output", str(args.output_dir / reference.FILE.name))
    recorded = measured.read(RESULTS) + (measured.read(args.output_dir) if args.output_dir.is_dir() and not own else [])
    hours, unknown = expected_hours(todo, recorded, args.jobs)
    print(f"{len(done)} of {len(runs)} runs are done by the present code")
    print(f"the others take about {hours:.1f} hours, {args.jobs} at a time, by what earlier runs recorded", end="")
    print(f"; nothing is recorded of {unknown} of them" if unknown else "")
    if any(one.plan["hyperparameters"]["precision"] == BF16 for one in todo) and (speed := speed_of_bf16()) < 1:
        print(f"note: that is of a processor with instructions for bfloat16; here a product in it takes {1 / speed:.1f} times")
        print("      as long as in float32, and the runs that compute in it take several times what was recorded")
    there = other_trials(args.output_dir / "sweep" / CSV) is None
    own_sweep = "is done by the present code" if there else f"takes about {swept_hours():.1f} hours"
    print(f"the sweep {own_sweep}", flush=True)
    _call("bench", "reference", "--data", args.data, "--plan", *rows)
    if args.plan:
        return 0
    _sweep(args)
    failed = Several(todo, sum(one.examples for one in done), args.jobs).run()
    if failed:
        raise ExperimentError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
    _call("bench", "reference", "--data", args.data, *rows)
    print(f"report: {reporting.write(args.output_dir)}")
    if own:
        print(f"tables: {', '.join(str(path) for path in documents.write(measured.read(args.output_dir)))}")
        _call("experiments.notebook")
        _call("bench", "job")
    return 0


def _part(flags: str, args: argparse.Namespace) -> list[Planned]:
    """The runs of a part; none, with a line, where its base is not installed."""
    source = [] if "--data" in flags else ["--data", args.data]
    directory = args.output_dir / FLOAT32 if "--precision fp32" in flags else args.output_dir
    try:
        return planned(comparison().parse_args([*shlex.split(flags), *source]), directory)
    except ExperimentError as error:
        if "packaged-base" not in flags:
            raise
        print(f"left out: {flags}: {error}")
        return []


def absent(runs: Sequence[Run]) -> list[str]:
    """What of `PARTS` is not among some runs, a line each. Needs neither data nor bases."""
    from .models import PACKAGED
    from .packaged_base import NAME

    made = {(run.budget, run["method"], run["seed"]) for run in runs}
    there = {(b.data, b.base, b.train, b.epochs, b.precision, method, seed) for b, method, seed in made if b.usual}
    found = []
    for part in PARTS:
        args = comparison().parse_args(shlex.split(part))
        data, every = ("Rotten Tomatoes", 7_677) if args.data == "packaged" else ("SST-2", 67_349)
        base = {"packaged": PACKAGED, "packaged-base": NAME}[args.model]
        for seed, name in itertools.product(args.seeds, args.methods or METHODS):
            run = data, base, args.train_samples or every, args.epochs, args.precision, name, seed
            where = f"{run[2]:,} of {data} x {args.epochs}, {base.rpartition('/')[2]}, {args.precision}"
            found += [] if run in there else [f"{name}, seed {seed}, {where}: missing"]
    return found


def expected_hours(todo: Sequence[Planned], recorded: Sequence[Run], jobs: int) -> tuple[float, int]:
    """Hours for `todo` by the seconds a sentence of earlier runs, and of how many nothing is known.

    A run is like one of the same method on the same base; a method that never ran there, like the others on average.
    """
    rates: dict[tuple[str, str], list[float]] = {}
    for one in recorded:
        seen = one.settings["epochs"] * one["data"]["train"]
        rates.setdefault((one["base_model"]["name"], one["method"]), []).append(one.seconds / seen)
    seconds, unknown = 0.0, 0
    for one in todo:
        base = one.plan["base_model"]["name"]
        like = rates.get((base, one.method.name)) or [r for (b, _), found in rates.items() if b == base for r in found]
        seen = one.schedule.epochs * one.plan["data"]["train"]
        seconds, unknown = (seconds + seen * sum(like) / len(like), unknown) if like else (seconds, unknown + 1)
    return seconds / jobs / 3600, unknown


def _sweep(args: argparse.Namespace) -> None:
    """What the sweep finds, put among the results; if it is not there.

    Raises:
        ExperimentError: the recipe `best` is not among what it finds.
    """
    if other_trials(args.output_dir / "sweep" / CSV) is None:
        return
    _call("experiments.sweep", *shlex.split(SWEEP), "--data", args.data, "--output-dir", str(SWEPT), "--refresh")
    check_recipe(SWEPT)
    (args.output_dir / "sweep").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SWEPT / CSV, args.output_dir / "sweep" / CSV)


def other_trials(table: Path) -> str | None:
    """What keeps a table from being that of this sweep by the present code, in words; None if nothing."""
    from .measured import margin

    if not table.exists():
        return "missing"
    if made_by_other_code(table):
        return "other code, or no trials"
    asked = sweeping().parse_args(shlex.split(SWEEP))
    found, own = {Setting.read(row): float(row["accuracy"]) for row in read_csv(table)}, Setting.of(METHODS["best"])
    if set(found) != set(wanted(asked)):
        return "other settings than those that are asked for"
    first = max(found.values())
    worse = own not in found or first - found[own] > margin(first, found[own], asked.held_out)
    return f"the recipe 'best', {own.name}, is none of its best" if worse else None


def check_recipe(directory: Path) -> None:
    """Whether the recipe `best` is the best row of a sweep, or can't be told apart from it: settings in the first places change
    them with the rounding of another processor.

    Raises:
        ExperimentError: it is no row, or worse than the best on the same sentences (`paired.py`).
    """
    from . import predictions
    from .paired import Difference, estimate

    found, own = {Setting.read(row): float(row["accuracy"]) for row in read_csv(directory / CSV)}, Setting.of(METHODS["best"])
    first = max(found, key=found.__getitem__)
    wrong = f"the sweep found {first.name}, and 'best' is {own.name}: change it in experiments/recipes.py"
    if own not in found:
        raise ExperimentError(wrong)
    if own == first:
        return
    (labels, theirs), (_, ours) = (predictions.read(directory / TRIALS / one.name) for one in (first, own))
    difference = Difference(*estimate(((theirs == labels).astype(int) - (ours == labels))[None]), (0,))
    if difference.low > 0:
        raise ExperimentError(wrong)
    print(f"note: {first.name} is first in the sweep, and 'best' within the interval: {difference}", flush=True)


def swept_hours() -> float:
    """Hours that the trials of the committed sweep took."""
    path = RESULTS / "sweep" / CSV
    return sum(float(row["seconds"]) for row in read_csv(path)) / 3600 if path.exists() else 0.0


def _call(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments])
    if done.returncode:
        raise ExperimentError(f"python -m {module} ended with {done.returncode}; what is finished is kept")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: remake(args), interrupted="what is finished is kept; the same command goes on from there")


if __name__ == "__main__":
    leave_out_unused()
    sys.exit(main())
