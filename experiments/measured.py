"""What was measured: every metrics.json below a directory, as runs, rows (a method over its seeds) and groups (a budget).

Rows of one group can be compared: same data, base, schedule and precision, all on a GPU or none. Data and base are known by
their names, and by their hashes where the runs recorded them; runs that did not are a group apart. Only reads.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from . import provenance, record
from .beginning import TRIALS
from .errors import ExperimentError
from .methods import QUANTIZE, Method, Schedule
from .models import PROJECTIONS, layer_names
from .recipes import METHODS

#: 1.96 standard errors to each side: 95 %.
Z = statistics.NormalDist().inv_cdf(0.975)
#: Settings in which a run may differ from its method's recipe; a row's label names them. The targets and the base's form have
#: words of their own.
ADAPTER = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "bias": "bias", "lora_plus_ratio": "LoRA+ ratio",
    "use_rslora": "rsLoRA", "use_dora": "DoRA",
}  # fmt: skip
ANY = {"trains": "training", "learning_rate": "learning rate"}
#: Those of a schedule that a budget names where they are not the usual ones.
SCHEDULE = {
    "batch_size": "batch size", "weight_decay": "weight decay", "warmup": "warm-up", "max_grad_norm": "clipping at",
    "max_length": "max length",
}  # fmt: skip
USUAL = Schedule()
PLAIN = {field.name: field.default for field in fields(Method)}  # what a run that records nothing of a setting had
REQUIRED = (*record.IDENTITY, "accuracy", "f1", "trainable_parameters", "total_parameters", "adapter_parameters")
REQUIRED += ("base_weight_bytes", "peak_rss_mb", "peak_cuda_mb", "train_seconds", "accuracy_by_epoch", "loss_history")


@dataclass(frozen=True)
class Budget:
    """What runs must share to be compared. Where they ran counts too, since peaks do: on a GPU, or not. `others` is what of the
    schedule is not as usual, in words."""

    data: str
    validation: int
    base: str
    train: int
    epochs: int
    max_steps: int | None
    precision: str
    gpu: bool = False
    others: tuple[str, ...] = ()
    data_hash: str | None = None
    base_hash: str | None = None

    def __str__(self) -> str:
        times = "epoch" if self.epochs == 1 else "epochs"
        cut = f", cut after {self.max_steps:,} steps" if self.max_steps else ""
        known = (("data", self.data_hash), ("base", self.base_hash))
        hashes = "".join(f", {name} hash {digest[:8]}" for name, digest in known if digest)
        runs = f"{self.train:,} sentences, {self.epochs} {times}{cut}"
        where = " on a GPU" if self.gpu else ""
        others = "".join(f", {other}" for other in self.others)
        return f"{self.data}, {runs}, {Path(self.base).name}, {self.precision}{where}{others}{hashes}"

    @property
    def usual(self) -> bool:
        """Whether it is of the study: on the CPU, to the end, on the usual schedule."""
        return not (self.gpu or self.others or self.max_steps)


@dataclass(frozen=True)
class Run:
    """One metrics.json."""

    path: Path
    metrics: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.metrics[key]

    @property
    def settings(self) -> dict[str, Any]:
        return self["hyperparameters"]

    @property
    def name(self) -> str:
        """Its place, as the reports have it."""
        return "/".join(self.path.parent.parts[-2:])

    @property
    def seconds(self) -> float:
        """What the whole run took; of an older one, its training."""
        return (self.metrics.get(provenance.KEY) or {}).get("seconds", self["train_seconds"])

    @functools.cached_property
    def differing(self) -> tuple[str, ...]:
        """What of the code that made it has changed since."""
        return provenance.differing(self.metrics)

    @property
    def budget(self) -> Budget:
        data, base, s = self["data"], self["base_model"], self.settings
        hashes = data.get("sha256"), base.get("sha256")
        shared = data["name"], data["validation"], base["name"], data["train"], s["epochs"], s["max_steps"], s["precision"]
        others = [_named(SCHEDULE, name, s[name]) for name in SCHEDULE if s[name] != getattr(USUAL, name)]
        if self["base_model"].get("model_type") not in PROJECTIONS and s.get("target_modules"):
            others.append(f"on {' '.join(s['target_modules'])}")  # no recipe can name the layers of this architecture
        return Budget(*shared, self["peak_cuda_mb"] is not None, tuple(others), *hashes)

    @property
    def label(self) -> str:
        """The method's name, and in what the run differs from its recipe."""
        recipe = METHODS.get(self["method"])
        if recipe is None:
            return self["method"]
        settings = self.settings
        own = {name: settings.get(name, PLAIN[name]) for name in ADAPTER} if recipe.adapts else {}
        own |= {name: settings.get(name, getattr(recipe, name)) for name in ANY}
        other = [_named(ADAPTER | ANY, name, value) for name, value in own.items() if value != getattr(recipe, name)]
        held = settings.get("quantize", False)
        if held != recipe.quantize:
            other.append(f"base {next((name for name, value in QUANTIZE.items() if value == held), held)}")
        targets = settings.get("target_modules")
        if recipe.adapts and targets and tuple(targets) != self._targets(recipe):
            other.append(f"on {' '.join(targets)}")
        return recipe.name + (f" ({', '.join(other)})" if other else "")

    def _targets(self, recipe: Method) -> tuple[str, ...]:
        """The layers that the recipe names on this run's base; those of the run where the architecture is not known."""
        if recipe.target_modules:
            return recipe.target_modules
        architecture = self["base_model"].get("model_type")
        known = architecture in PROJECTIONS
        return layer_names(architecture, recipe.roles) if known else tuple(self.settings["target_modules"])


@dataclass(frozen=True)
class Row:
    """One method at one budget, over its seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return self.runs[0]["method"]

    @property
    def accuracy(self) -> float:
        return self.mean("accuracy")

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the accuracy over the seeds; None for one seed."""
        return statistics.stdev(run["accuracy"] for run in self.runs) if len(self.runs) > 1 else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy. The seeds share the validation sentences, so their number does not count."""
        return wilson(self.accuracy, self.runs[0].budget.validation)

    def all(self, key: str) -> list[float] | None:
        """The runs' values; None where one has none."""
        values = [run[key] for run in self.runs]
        return None if None in values else values

    def mean(self, key: str) -> float:
        return statistics.fmean(run[key] for run in self.runs)

    def most(self, key: str) -> float | None:
        """The largest of the runs' values; None where one has none."""
        values = self.all(key)
        return values and max(values)


@dataclass(frozen=True)
class Group:
    """Every method at one budget, in the order of `METHODS`."""

    budget: Budget
    rows: tuple[Row, ...]

    def row(self, method: str) -> Row | None:
        """The row of a method's own recipe."""
        return next((row for row in self.rows if row.label == method), None)


def _named(words: Mapping[str, str], name: str, value: Any) -> str:
    if isinstance(value, bool):
        return words[name] if value else f"no {words[name]}"
    return f"{words[name]} {value:g}" if isinstance(value, (int, float)) else f"{words[name]} {value}"


def read(directory: Path) -> list[Run]:
    """Every run below `directory`, sweeps' trials left out.

    Raises:
        ExperimentError: there is no such directory, or a metrics.json is broken.
    """
    if not directory.is_dir():
        raise ExperimentError(f"--output-dir: {str(directory)!r} is no directory; name one with runs in it")
    paths = sorted(p for p in directory.rglob(record.METRICS) if TRIALS not in p.relative_to(directory).parts)
    return [_run(path) for path in paths]


def _run(path: Path) -> Run:
    metrics = record.read_json(path)
    if missing := [key for key in REQUIRED if key not in metrics]:
        raise ExperimentError(f"{path} has no {', '.join(missing)}; run it again")
    try:
        run = Run(path, metrics)
        _, share = (run.budget, run.label), 0 <= run["accuracy"] <= 1
    except (KeyError, TypeError, AttributeError) as error:
        raise ExperimentError(f"{path} is not as written here ({error!r}); run it again") from None
    if not share:
        raise ExperimentError(f"{path}: the accuracy must be a share, between 0 and 1, not {run['accuracy']}; run it again")
    return run


def apart(runs: Sequence[Run]) -> list[str]:
    """Runs of other bytes of their data or of their base than most of the same name, a line each."""
    found = []
    for what, key in (("data", "data"), ("base", "base_model")):
        seen: dict[str, Counter] = {}
        for run in runs:
            seen.setdefault(run[key]["name"], Counter())[run[key].get("sha256")] += 1
        usual = {name: hashes.most_common(1)[0][0] for name, hashes in seen.items()}
        found += [f"{run.name}: other bytes of its {what}" for run in runs if run[key].get("sha256") != usual[run[key]["name"]]]
    return found


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The groups among the runs: the one of the most methods first, then the one of the most sentences.

    Raises:
        ExperimentError: two runs are of one seed.
    """
    order = {name: i for i, name in enumerate(METHODS)}
    groups = []
    for budget in dict.fromkeys(run.budget for run in runs):
        rows: dict[str, list[Run]] = {}
        for run in runs:
            if run.budget != budget:
                continue
            row = rows.setdefault(run.label, [])
            if twice := [one for one in row if one["seed"] == run["seed"]]:
                raise ExperimentError(
                    f"{twice[0].path.parent} and {run.path.parent} are the same run, {run.label}, seed {run['seed']}; name a "
                    "directory that holds one of them"
                )
            row.append(run)
        made = [Row(label, tuple(sorted(found, key=lambda run: run["seed"]))) for label, found in rows.items()]
        made.sort(key=lambda row: (order.get(row.method, len(order)), row.label))
        groups.append(Group(budget, tuple(made)))
    return sorted(groups, key=lambda group: (-len(group.rows), -group.budget.train * group.budget.epochs))


def wilson(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share of n (Wilson, JASA 1927): it stays inside [0, 1], unlike share +- z errors."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def percent(share: float) -> str:
    """A share as it is shown."""
    return f"{100 * share:.1f} %"


def margin(a: float, b: float, n: int, z: float = Z) -> float:
    """Half the interval of the difference of two binomial shares, each of n. On the same sentences it errs to the wide."""
    return z * math.sqrt((a * (1 - a) + b * (1 - b)) / n)
