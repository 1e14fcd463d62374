"""How the bench times: candidates interleaved in one process, after a warm-up, medians.

    samples = interleave({"ours": f, "peft": g}, rounds=31)
    samples.median("ours")                # seconds of one call
    samples.ratio("ours", "peft")         # ratio of the medians, with the quartiles of the ratio within a round

One round calls every candidate once, in a new random order. So a machine that slows down for a while slows all of them,
and none always finds the caches as the same other one left them.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .measure import Ratio

#: A sample shorter than this is made of several calls, so that reading the clock and waiting for a GPU do not count.
MIN_SAMPLE = 2e-3


@dataclass(frozen=True)
class Candidate:
    """One thing to time. What changes its input gets a fresh one from `prepare`, before each call and off the clock."""

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Samples:
    """{candidate: seconds of one call, a value for each round}; round i of every candidate was timed side by side."""

    seconds: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def medians(self) -> dict[str, float]:
        return {name: self.median(name) for name in self.seconds}

    def ratio(self, above: str, below: str) -> Ratio:
        """Time of `above` over that of `below`."""
        within = self.ratio_within_rounds(above, below)
        return Ratio(self.median(above) / self.median(below), within.low, within.high)

    def ratio_within_rounds(self, above: str, below: str) -> Ratio:
        """The median of the ratios within a round, for work that differs from round to round.

        There the medians of two candidates may fall into different rounds, and compare different work.
        """
        each = [a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return Ratio(middle, low, high)


def interleave(
    candidates: Mapping[str, Candidate | Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Samples:
    """Times `candidates` round by round.

    Args:
        candidates: {name: function without arguments, or a `Candidate`}.
        rounds: samples of each.
        warmup: rounds before those; the last of them sets how many calls make a sample, the same for all candidates.
        synchronize: waits for the device; called before each look at the clock.
        clock: seconds.
        seed: of the order within the rounds.
    """
    candidates = {n: c if isinstance(c, Candidate) else Candidate(c) for n, c in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle, calls = list(candidates), random.Random(seed).shuffle, 1
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall into whichever candidate happens to run
    try:
        for i in range(-max(warmup, 1), rounds):
            shuffle(order)
            taken = {name: _sample(candidates[name], calls, synchronize, clock) for name in order}
            if i == -1 and not any(c.prepare for c in candidates.values()):
                calls = max(1, math.ceil(MIN_SAMPLE / max(min(taken.values()), 1e-9)))
            if i >= 0:
                for name, value in taken.items():
                    seconds[name].append(value)
    finally:
        if collecting:
            gc.enable()
    return Samples({name: tuple(values) for name, values in seconds.items()})


def _sample(candidate: Candidate, calls: int, synchronize: Callable[[], None], clock: Callable[[], float]) -> float:
    arguments = (candidate.prepare(),) if candidate.prepare else ()
    synchronize()
    start = clock()
    for _ in range(calls):
        result = candidate.run(*arguments)
    synchronize()
    end = clock()
    del result, arguments  # freeing them is not what is timed
    return (end - start) / calls
