"""One thing that the bench measured: a value for each candidate, and the ratios that answer the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """`value`; `low` and `high` are the quartiles of the same ratio over the rounds, where there are rounds."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Attributes:
        key: its name in the goals and in the file, never shown.
        title: what was measured, for a reader.
        unit: of the values: "s" (seconds of one call, the median) or "bytes".
        values: {candidate: value}.
        ratios: {"a / b": of the values of a and b}.
        setting: shapes, dtype, dropout, rounds: what the values depend on.
    """

    key: str
    title: str
    unit: str
    values: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    setting: Mapping[str, Any] = field(default_factory=dict)


class Disagreement(RuntimeError):
    """Two candidates that should compute the same numbers do not: their times can't be compared."""
