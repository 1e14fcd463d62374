"""How much memory does a whole QLoRA experiment take: MiniLM, all of SST-2, three epochs?

    python -m bench job

Nothing runs: the peaks are those of the study's runs (experiments/results), means over the seeds, and of peft's beside them
(bench/results/reference.json), in the same precision: the rows of README's table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments import measured, reference
from experiments.beginning import RESULTS
from experiments.documents import WHOLE, group

from .measure import Measure, Ratio
from .settings import Settings


def run(_settings: Settings) -> Iterator[Measure]:
    if found := peak(RESULTS):
        yield found


def peak(results: Path) -> Measure | None:
    """The peaks in bytes; None if `results` holds no such run."""
    found = group(measured.read(results), WHOLE)
    means = {row.label: row.mean("peak_rss_mb") * 2**20 for row in found.rows} if found else {}
    if "qlora" not in means:
        return None
    values, peft, precision = {"ours": means["qlora"]}, reference.read(), found.budget.precision
    for name, method in (("peft", "qlora"), ("peft's LoRA", "lora")):
        if row := reference.beside(peft, method, "SST-2", *WHOLE, precision):
            values[name] = row["peak_rss_mb"] * 2**20
    if "lora" in means:
        values["ours, LoRA"] = means["lora"]
    return Measure(
        key="job-qlora",
        title="Peak of the whole QLoRA job, SST-2, batch 32",
        unit="bytes",
        values=values,
        ratios={f"ours / {name}": Ratio(values["ours"] / values[name]) for name in ("peft", "ours, LoRA") if name in values},
        setting={"from": "experiments' metrics.json", "peft": "bench/results/reference.json", "precision": precision},
    )
