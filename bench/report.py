"""What the bench found, as text and as a file.

The file holds, for each question, the machine that answered it and its measures; running one question replaces its answer
and leaves the others. It is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.files.disk import write_whole

from .measure import Measure, Ratio

#: How the peers are set up (`peers.py`), for whoever reads the numbers.
PEERS = (
    "peft: LoraConfig defaults, layers called directly, bitsandbytes Linear4bit with float32 (on CUDA and in bfloat16 jobs "
    "bfloat16) compute dtype and double quantisation, prepare_model_for_kbit_training without gradient checkpointing, "
    "load_adapter with low_cpu_mem_usage. Beside a 16-bit base its adapters are float32, its default, or 16-bit, where a "
    "candidate's name says so and where one token is decoded. loralib: Linear with merge_weights=False. Same A, B and batches."
)


def show(measure: Measure) -> str:
    """A measure in a few lines: what it is, the value of each candidate, the ratios with their quartiles."""
    values = " | ".join(f"{name} {_value(value, measure.unit)}" for name, value in measure.values.items())
    ratios = " | ".join(f"{name} {_ratio(ratio)}" for name, ratio in measure.ratios.items())
    lines = [measure.title, values, ratios]
    if per_second := measure.setting.get("tokens a second"):
        lines.append("tokens a second: " + " | ".join(f"{name} {value:,}" for name, value in per_second.items()))
    return "\n    ".join(lines)


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _ratio(ratio: Ratio) -> str:
    spread = "" if ratio.low is None else f" ({ratio.low:.2f}-{ratio.high:.2f})"
    return f"{ratio.value:.2f}{spread}"


def goals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The goals as a Markdown table."""
    cells = [("measure", "peft before", "measured", "must reach", "aim", "verdict")]
    for row in rows:
        numbers = ("-" if row[name] is None else f"{row[name]:.2f}" for name in ("peft", "measured", "must", "aim"))
        cells.append((row["goal"], *numbers, row["verdict"]))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """The answers in a file: {question: {"machine": ..., "measures": [...]}}; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["questions"] if path.exists() else {}


def answer(machine: Mapping[str, Any], measures: Iterable[Measure]) -> dict[str, Any]:
    """One question's part of the file."""
    return {"machine": dict(machine), "measures": [dataclasses.asdict(measure) for measure in measures]}


def measures_of(questions: Mapping[str, Any]) -> list[Measure]:
    """The measures in what `read` returned."""
    return [_measure(fields) for part in questions.values() for fields in part["measures"]]


def _measure(fields: Mapping[str, Any]) -> Measure:
    return Measure(**{**fields, "ratios": {name: Ratio(**ratio) for name, ratio in fields["ratios"].items()}})


def write(path: Path, questions: Mapping[str, Any], goals: Sequence[Mapping[str, Any]]) -> None:
    """Writes the file, whole or not at all."""
    content = {"peers": PEERS, "goals": list(goals), "questions": dict(questions)}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
