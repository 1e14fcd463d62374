"""Look for settings: train with many of them on a part of the training set, and judge each on another part of it.

    python -m experiments.sweep                              12 random settings
    python -m experiments.sweep --search grid --ranks 4,16,32 --alphas 16,32,64 --dropouts 0.1 --learning-rates 3e-4
    python -m experiments.sweep --target-modules query,value/all-linear --lora-plus 1,4,16     these are searched over too

The validation set is left out: what is chosen on it can't be judged on it. Every trial starts from the same seed, head and
sentences, so that only its settings differ. Trials that the present code has done are skipped.

Leaves DIR/sweep.csv, a line for each trial, best first; DIR/sweep.png; and each trial's run in DIR/trials.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import provenance
from .beginning import TRIALS
from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .flags import listed, names, schedule_flags, schedule_of, source_flags
from .methods import Method
from .recipes import METHODS

if TYPE_CHECKING:
    from .job import Job

CSV, FIGURE = "sweep.csv", "sweep.png"
#: What is searched over, in the order of the columns.
SETTINGS = ("rank", "alpha", "dropout", "learning_rate", "lora_plus", "targets")
COLUMNS = (*SETTINGS, "accuracy", "f1", "loss", "trained", "seconds", *provenance.CODE)


@dataclass(frozen=True)
class Setting:
    """One point of the search. Without targets they are the method's own."""

    rank: int
    alpha: float
    dropout: float
    learning_rate: float
    lora_plus: float = 1.0
    targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, method: Method) -> Setting:
        """A method's own."""
        plus, targets = method.lora_plus_ratio, method.target_modules or ()
        return cls(method.r, method.lora_alpha, method.lora_dropout, method.learning_rate, plus, targets)

    @classmethod
    def read(cls, cells: Mapping[str, str]) -> Setting:
        """That of a line of the table."""
        rank, *numbers, targets = (cells[name] for name in SETTINGS)
        return cls(int(rank), *map(float, numbers), tuple(targets.split()))

    @property
    def name(self) -> str:
        numbers = f"r{self.rank}-alpha{self.alpha:g}-dropout{self.dropout:g}-lr{self.learning_rate:g}"
        return "-".join([numbers, *([f"plus{self.lora_plus:g}"] if self.lora_plus != 1 else []), *self.targets])

    def applied(self, method: Method) -> Method:
        """`method` with this setting."""
        changes = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "lora_plus_ratio": self.lora_plus}
        targets = self.targets or method.target_modules
        return dataclasses.replace(method, learning_rate=self.learning_rate, target_modules=targets, **changes)

    def cells(self) -> dict[str, Any]:
        """The settings as the table shows them."""
        return dict(zip(SETTINGS, (*dataclasses.astuple(self)[:-1], " ".join(self.targets)), strict=True))


@dataclass(frozen=True)
class Space:
    """The values to search over; a random search draws dropout and learning rate from between the outermost ones."""

    ranks: tuple[int, ...] = (4, 8, 16, 32)
    alphas: tuple[float, ...] = (16, 32, 64)
    dropouts: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 3e-4, 5e-4)
    lora_plus: tuple[float, ...] = (1,)
    targets: tuple[tuple[str, ...], ...] = ((),)

    def __post_init__(self) -> None:
        if min(self.learning_rates) <= 0:  # a random search takes their logarithms
            raise ExperimentError(f"--learning-rates: learning rates must be above 0, not {min(self.learning_rates):g}")

    def grid(self) -> list[Setting]:
        """Every combination."""
        return list(itertools.starmap(Setting, itertools.product(*dataclasses.astuple(self))))

    def sample(self, trials: int, seed: int) -> list[Setting]:
        """`trials` settings, no two the same; the first of them do not depend on how many are drawn.

        Raises:
            ExperimentError: the space does not hold so many.
        """
        rng, found = random.Random(seed), {}
        for _ in range(100 * trials):
            setting = Setting(
                rng.choice(self.ranks),
                rng.choice(self.alphas),
                round(rng.uniform(min(self.dropouts), max(self.dropouts)), 2),
                float(f"{math.exp(rng.uniform(*(math.log(f(self.learning_rates)) for f in (min, max)))):.2g}"),
                rng.choice(self.lora_plus),
                rng.choice(self.targets),
            )
            found[setting] = None
            if len(found) == trials:
                return list(found)
        raise ExperimentError(f"--trials: the ranges hold {len(found)} different settings at most; ask for fewer than {trials}")


def parser() -> Parser:
    """The command line of the sweep."""
    usual = Space()
    p = Parser(__doc__, prog="python -m experiments.sweep")
    search = p.add_argument_group("the search")
    search.add_argument("--search", choices=("random", "grid"), default="random", help="random settings, or every combination")
    search.add_argument("--trials", type=int, default=12, metavar="N", help="how many random settings")
    of = {"lora-plus": "ratios of B's learning rate to A's"}
    for name in ("ranks", "alphas", "dropouts", "learning-rates", "lora-plus"):
        values = getattr(usual, name.replace("-", "_"))
        text = f"{of.get(name, name.replace('-', ' '))} to search; {','.join(f'{value:g}' for value in values)} if not given"
        kind = int if name == "ranks" else float
        search.add_argument(f"--{name}", type=listed(kind), default=values, metavar="NUMBERS", help=text)
    search.add_argument("--method", choices=METHODS, metavar="METHOD", default="lora", help="whose settings they are")
    several = "layers to adapt, the method's if not given; sets to search, separated by slashes: query,value/all-linear"
    search.add_argument("--target-modules", type=sets, default=usual.targets, metavar="NAMES", help=several)
    what = p.add_argument_group("what to train on what")
    source_flags(what)
    what.add_argument("--held-out", type=int, default=1000, metavar="N", help="whole sentences of the training set to judge on")
    what.add_argument("--output-dir", type=Path, metavar="DIR", default=Path("runs", "sweep"), help="where the results go")
    what.add_argument("--overwrite", action="store_true", help="do again what is done")
    what.add_argument("--refresh", action="store_true", help="do again what is of other data, another base or other settings")
    schedule_flags(p.add_argument_group("the schedule"), without=("learning_rate",), train_samples=4000, epochs=2)
    return p


def sets(text: str) -> tuple[tuple[str, ...], ...]:
    """A type for argparse: "a,b/c" -> (("a", "b"), ("c",))."""
    return tuple(names(part) for part in text.split("/"))


def split(data: Any, train: int, held_out: int, seed: int) -> Any:
    """`data` with `held_out` sentences of its training set to judge on and `train` others to learn from.

    SST-2's training set holds sentences and phrases of them, its validation set sentences alone. So it is judged on whole
    sentences here too, none of which, nor any phrase of which, whatever its case, is learned from.

    Raises:
        ExperimentError: there are not so many sentences.
    """
    if held_out < 1:
        raise ExperimentError(f"--held-out must be at least 1, not {held_out}")
    order = data.train.sample(len(data.train), seed)
    words = [tuple(text.lower().split()) for text in order.texts]
    judged = whole(words)[:held_out]
    seen = {hash(phrase) for i in judged for phrase in phrases(words[i])}
    rest = [i for i, found in enumerate(words) if hash(found) not in seen]
    if len(judged) < held_out or len(rest) < train:
        raise ExperimentError(
            f"--train-samples {train:,} and --held-out {held_out:,} are more than the {len(order):,} training sentences give"
        )
    name = f"{data.name}'s training set"
    return dataclasses.replace(data, name=name, train=order.take(rest[:train]), validation=order.take(judged))


def whole(sentences: Sequence[tuple[str, ...]]) -> list[int]:
    """The places of those that are a phrase of no other, and of the first of those that are alike, in order."""
    inner: set[int] = set()
    found = []
    for i in sorted(range(len(sentences)), key=lambda i: -len(sentences[i])):
        if hash(sentences[i]) not in inner:
            found.append(i)
            inner.update(map(hash, phrases(sentences[i])))
    return sorted(found)


def phrases(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every run of words of a sentence, itself among them."""
    return (words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1))


def wanted(args: argparse.Namespace) -> list[Setting]:
    """The settings that a command line asks for."""
    space = Space(args.ranks, args.alphas, args.dropouts, args.learning_rates, args.lora_plus, args.target_modules)
    return space.grid() if args.search == "grid" else space.sample(args.trials, args.seed)


def sweep(args: argparse.Namespace) -> int:
    """Run what is not done, with one line for each trial; then write the table and the figure."""
    if args.trials < 1:
        raise ExperimentError(f"--trials must be at least 1, not {args.trials}")
    method = METHODS[args.method]
    if not method.adapts:
        raise ExperimentError(f"--method {method.name} has no adapter, so there is nothing to search")
    settings = wanted(args)
    schedules = [schedule_of(args, method, learning_rate=setting.learning_rate) for setting in settings]
    from . import data, models
    from .reporting import require_matplotlib

    require_matplotlib()
    sentences = split(data.load(args.data), args.train_samples, args.held_out, args.seed)
    base = models.resolve(args.model)
    print(f"base model: {base}; data: {sentences}", flush=True)

    from .job import Job, choose_device
    from .precision import choose_precision
    from .train import train

    device, rows = choose_device(args.device), []
    precision = choose_precision(args.precision, device)
    for number, (setting, schedule) in enumerate(zip(settings, schedules, strict=True), start=1):
        job = Job(setting.applied(method), schedule, base, sentences, device, precision)
        output = args.output_dir / TRIALS / setting.name
        metrics = None if args.overwrite else _done(output, job, args.refresh)
        print(f"trial {number} of {len(settings)}: {setting.name}{', done already' if metrics else ''}", flush=True)
        rows.append(row(setting, metrics or train(job, output)))
        rows.sort(key=lambda found: -found["accuracy"])
        write_csv(args.output_dir / CSV, rows)
    from .figures import draw_sweep

    draw_sweep(rows, args.output_dir / FIGURE)
    first = [(name, rows[0][name]) for name in SETTINGS if rows[0][name] != ""]
    best = ", ".join(f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in first)
    print(f"best: {best}: accuracy {rows[0]['accuracy']:.1%} of {args.held_out:,}")
    print(f"table: {args.output_dir / CSV}; figure: {args.output_dir / FIGURE}")
    return 0


def _done(output: Path, job: Job, refresh: bool) -> dict[str, Any] | None:
    """The metrics of a trial that the present code did on this device; None if there is none: trials are to differ in their
    settings alone.

    Raises:
        ExperimentError: another run is in its place, and is not to be done again.
    """
    from . import record

    try:
        metrics = record.finished(output, job.plan())
    except ExperimentError:
        if not refresh:
            raise
        return None
    same = metrics and (metrics["peak_cuda_mb"] is None) == (job.device == "cpu")
    return metrics if same and not provenance.differing(metrics) else None


def row(setting: Setting, metrics: dict[str, Any]) -> dict[str, Any]:
    """A trial's line in the table."""
    keys = ("accuracy", "f1", "loss", "trainable_parameters", "train_seconds")
    values = [*(metrics[key] for key in keys), *(metrics[provenance.KEY][name] for name in provenance.CODE)]
    return setting.cells() | dict(zip(COLUMNS[len(SETTINGS) :], values, strict=True))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a table, best first."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made_by_other_code(path: Path) -> bool:
    """Whether a line of a table was made by other code than the present one, or does not say; so of a table without lines."""
    return any(line.get(name) != code for line in read_csv(path) or [{}] for name, code in provenance.sources().items())


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the table, whole or not at all."""
    from lora_core.files.disk import write_whole

    table = csv.DictWriter(text := io.StringIO(), COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue().encode())


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: sweep(args), interrupted="the trials that are finished are kept; the same command goes on from there")


if __name__ == "__main__":
    leave_out_unused()
    sys.exit(main())
