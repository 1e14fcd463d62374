"""The difference of two methods' accuracies, paired: the same sentences, and the same seeds.

    d[s, i] = (after is right about sentence i) - (before is), both trained with seed s;  -1, 0 or 1

The difference is the mean of d over its S seeds and N sentences. Both are samples, of the seeds that might have been drawn and
of the sentences that might have been asked, so that its variance has a part of each (crossed random effects: Cornfield and
Tukey, "Average values of mean squares in factorials", Annals of Mathematical Statistics 1956):

    between sentences    variance of the N means over the seeds / N
    between seeds        variance of the S means over the sentences / S, less what the sentences alone would make of it

For one seed the first part is all, and the test is McNemar's without its correction: it says nothing of other seeds. Two
binomials, which know nothing of the pairs, would be two to three times as wide. Two or three seeds say little of how far seeds
differ: so the interval is Student's, with the degrees of freedom that Satterthwaite gives such a sum ("An approximate
distribution of estimates of variance components", Biometrics Bulletin 1946).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .command import show_again
from .errors import ExperimentError
from .measured import Row
from .predictions import read

LEVEL = 0.95
#: {seed: (labels, predicted)}, each (N,) 0 or 1, of the runs of one row; None where a run kept none.
Kept = Mapping[int, tuple[np.ndarray, np.ndarray] | None]


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        gain: accuracy of the one row less that of the other, a share.
        error: its standard error.
        freedom: degrees of freedom of that.
        seeds: those that both rows have.
    """

    gain: float
    error: float
    freedom: float
    seeds: tuple[int, ...]

    @property
    def of_one_seed(self) -> bool:
        """Whether its interval is over sentences alone."""
        return len(self.seeds) == 1

    @property
    def half(self) -> float:
        """Half the 95 % interval."""
        return float(_student().ppf(0.5 + LEVEL / 2, self.freedom)) * self.error

    @property
    def low(self) -> float:
        return self.gain - self.half

    @property
    def high(self) -> float:
        return self.gain + self.half

    @property
    def p(self) -> float:
        """Two-sided: how often a difference as large would come of rows that are alike."""
        return 2 * float(_student().cdf(-abs(self.gain) / self.error, self.freedom)) if self.error else float(self.gain == 0)

    def __str__(self) -> str:
        number = "1 seed: over sentences alone" if self.of_one_seed else f"{len(self.seeds)} seeds"
        shown = f"p = {self.p:.2g}" if self.p >= 0.001 else "p < 0.001"
        return f"{round(100 * self.gain, 1) + 0.0:+.1f} points (± {100 * self.half:.1f}, {shown}, {number})"


def difference(before: Row, after: Row) -> Difference | None:
    """`after` against `before`, over the seeds that both have; None if no such pair kept what it predicted.

    Raises:
        ExperimentError: two runs of one budget were judged on different labels.
    """
    kept = ({run["seed"]: read(run.path.parent) for run in row.runs} for row in (before, after))
    return over_seeds(*kept, f"{before.label} and {after.label}")


def over_seeds(before: Kept, after: Kept, names: str) -> Difference | None:
    """`after` against `before`, as `difference`; `names` says in an error which they are."""
    seeds = [seed for seed in before if before[seed] and after.get(seed)]
    if not seeds:
        return None
    labels = before[seeds[0]][0]
    for seed in seeds:
        if not all(np.array_equal(labels, kept[seed][0]) for kept in (before, after)):
            raise ExperimentError(f"{names}, seed {seed}, were judged on different labels; run them again")
    a, b = (np.stack([kept[seed][1] == labels for seed in seeds]) for kept in (before, after))  # S N
    return Difference(*estimate(b.astype(int) - a), tuple(seeds))


def estimate(d: np.ndarray) -> tuple[float, float, float]:
    """The mean of paired differences (S, N), its standard error over seeds and sentences, and that one's degrees of freedom."""
    (seeds, sentences), mean = d.shape, d.mean()
    variance = d.mean(0).var(ddof=1) / sentences
    if seeds == 1:
        return float(mean), math.sqrt(variance), sentences - 1
    rest = d - d.mean(0) - d.mean(1, keepdims=True) + mean  # what neither the seed nor the sentence explains
    of_rest = (rest**2).sum() / ((seeds - 1) * (sentences - 1)) / (seeds * sentences)
    of_seeds = d.mean(1).var(ddof=1) / seeds
    uncertain = variance**2 / (sentences - 1) + of_seeds**2 / (seeds - 1) + of_rest**2 / ((seeds - 1) * (sentences - 1))
    variance += max(0.0, of_seeds - of_rest)
    return float(mean), math.sqrt(variance), float(variance**2 / uncertain) if uncertain else sentences - 1


def _student() -> Any:
    """Student's distribution."""
    show_again("scipy")
    from scipy.stats import t

    return t
