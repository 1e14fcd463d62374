"""The study's tables in README.md and docs/, made from the same files as the report.

A table stands between two marks, <!-- results: NAME --> and <!-- end -->; `write` puts what the runs say in between.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_core.files.disk import write_whole

from . import packaged_base, provenance, reference
from .claims import spread
from .errors import ExperimentError
from .measured import Group, Row, Run, grouped, percent
from .methods import BF16, FP32, NOTHING
from .models import PACKAGED
from .recipes import METHODS
from .table import markdown

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "docs/study.md")
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
#: What a reader of a table alone must know.
NOTES = {"qlora": ", the base in 4 bits", "best": ", what a sweep found"}
#: (sentences of SST-2, epochs) of the tables; the last is of the larger base.
WHOLE, PART, LARGER = (67_349, 3), (12_000, 2), (12_000, 1)
IN_WORDS = {FP32: "float32", BF16: "bfloat16"}


def write(runs: Sequence[Run], root: Path = ROOT) -> list[Path]:
    """Writes the tables of every file; returns the files' paths.

    Raises:
        ExperimentError: a mark names no table.
    """
    found = tables(runs)
    for path in (paths := [root / name for name in FILES]):
        write_whole(path, filled(path.read_text(encoding="utf-8"), found).encode())
    return paths


def filled(text: str, found: dict[str, str]) -> str:
    """A document with its tables as they are now."""

    def put(match: re.Match) -> str:
        if match[2] not in found:
            raise ExperimentError(f"there is no table {match[2]!r} for the mark in a document; there are {', '.join(found)}")
        return f"{match[1]}{found[match[2]]}\n{match[3]}"

    return MARKED.sub(put, text)


def tables(runs: Sequence[Run]) -> dict[str, str]:
    """{name of a table: its text}, of the budgets that have runs."""
    made, peft = {}, reference.read()
    if whole := group(runs, WHOLE):
        made["whole"] = f"{_beside_peft(whole, peft)}\n\n{_made(whole)}{_whose(whole, peft)}"
    if part := group(runs, PART):
        made["part"] = f"{_methods(part)}\n\n{_made(part)}"
    if larger := group(runs, LARGER, packaged_base.NAME):
        made["larger"] = f"{_methods(larger)}\n\n{_made(larger)}"
    return made


def group(runs: Sequence[Run], budget: tuple[int, int], base: str = PACKAGED) -> Group | None:
    """The rows of a table: a base on so many sentences of SST-2, so many epochs; None if there are none."""
    wanted = ("SST-2", base, *budget)
    found = [group for group in grouped(runs) if group.budget.usual]
    return next((g for g in found if (g.budget.data, g.budget.base, g.budget.train, g.budget.epochs) == wanted), None)


def _beside_peft(group: Group, peft: Sequence[reference.Row]) -> str:
    header = ("all of SST-2, three epochs, MiniLM", "accuracy", "peak memory", "with peft", "peft's peak")
    lines = []
    for row in group.rows:
        theirs = reference.beside(peft, row.method, "SST-2", *WHOLE, group.budget.precision)
        shown = (percent(theirs["accuracy"]), f"{theirs['peak_rss_mb']:,.0f} MiB") if theirs else ("", "")
        lines.append((_name(row), _accuracy(row), f"{spread(row.all('peak_rss_mb'))} MiB", *shown))
    return markdown(header, lines)


def _whose(group: Group, peft: Sequence[reference.Row]) -> str:
    """How peft's rows were made, and which part of its memory is whose, if there are any."""
    part = [row for row in peft if row["train"] == PART[0]]
    found = {method: split for method in ("lora", "qlora") if (split := reference.two_by_two(part, method))}
    row = reference.beside(peft, "qlora", "SST-2", *WHOLE, group.budget.precision)
    if not found or not row:
        return ""
    shares = (f"{100 * split.engine / (split.engine + split.harness):.0f} % (`{method}`)" for method, split in found.items())
    held = ", with a base in bfloat16 as the experiments hold it," if group.budget.precision == BF16 else ""
    return (
        f"\npeft's are one seed, in {reference.HARNESS[row['harness']]}. Of what it takes more, {' and '.join(shares)} is the\n"
        f"engine's{held} and the rest the harness's, by runs of each engine in\n"
        f"each harness on {PART[0]:,} sentences, one seed."
    )


def _methods(group: Group) -> str:
    header = ("method", "accuracy", "trained, with head", "base weights", "peak memory")
    lines = []
    for row in group.rows:
        trained, total = row.mean("trainable_parameters"), row.mean("total_parameters")
        share = "-" if METHODS[row.method].trains == NOTHING else f"{trained:,.0f} ({100 * trained / total:.3g} %)"
        weights = f"{row.mean('base_weight_bytes') / 2**20:.1f} MiB"
        lines.append((_name(row), _accuracy(row), share, weights, f"{spread(row.all('peak_rss_mb'))} MiB"))
    return markdown(header, lines)


def _name(row: Row) -> str:
    return f"`{row.label}`{NOTES.get(row.label, '')}"


def _accuracy(row: Row) -> str:
    deviation = f" ± {100 * row.deviation:.1f}" if row.deviation is not None else ""
    return f"{100 * row.accuracy:.1f}{deviation} %"


def _made(group: Group) -> str:
    """Who made the rows, and in which precision, in a sentence."""
    precision = IN_WORDS[group.budget.precision]
    runs = [run for row in group.rows for run in row.runs]
    known = [run.metrics[provenance.KEY] for run in runs if run.metrics.get(provenance.KEY)]
    if len(known) < len(runs):
        return f"These were measured with an earlier version of the code, in {precision}, one seed each."
    seeds = sorted({len(row.runs) for row in group.rows})
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    processors = " and ".join(sorted({f"{one['processor']}, {_threads(one['threads'])} a run" for one in known}))
    rows = "One seed each" if seeds == [1] else f"Means of {number} seeds, ± one standard deviation"
    return f"{rows}; {precision}, version {known[0]['version']}, {processors}."


def _threads(number: int) -> str:
    return f"{number} thread" + ("s" if number != 1 else "")
