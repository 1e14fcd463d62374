"""What the engine must reach on two CPU cores, and aims at, beside what was measured.

Every goal names a measure and one of its ratios. `peft` is what peft itself reached on a quiet 2-core machine (torch 2.13,
float32, peft 0.21.2) when the goals were set; the bench measures peft again each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .measure import Measure, Ratio


@dataclass(frozen=True)
class Goal:
    """A ratio of a measure, what it must reach and what it aims at; `more` says that more is better."""

    text: str
    key: str
    ratio: str
    peft: float
    must: float
    aim: float
    more: bool = False

    def reached(self, value: float, target: float) -> bool:
        return value >= target if self.more else value <= target


LAYER, FROZEN = "r16-t1024-", "ours / frozen"
SHARED, AS_RUN = "peft / ours, shared masks", "peft / ours, as experiments"
F32_AS_RUN = "peft, float32 / ours, as experiments"

GOALS = (
    Goal("768x768, r=16, 1,024 tokens, no dropout: over frozen", f"dense-768x768-{LAYER}p0.0-both", FROZEN, 1.68, 1.22, 1.12),
    Goal("the same with dropout 0.1", f"dense-768x768-{LAYER}p0.1-both", FROZEN, 2.24, 1.35, 1.25),
    Goal("768x3072 with dropout 0.1", f"dense-768x3072-{LAYER}p0.1-both", FROZEN, 1.50, 1.20, 1.12),
    Goal("384x384 with dropout 0.1", f"dense-384x384-{LAYER}p0.1-both", FROZEN, 2.91, 1.85, 1.50),
    Goal("NF4 768x768, no dropout: time over dense frozen", f"nf4-768x768-{LAYER}p0.0-both", FROZEN, 1.42, 1.28, 1.15),
    Goal("NF4 768x768, dropout 0.1: time over peft's", f"nf4-768x768-{LAYER}p0.1-both", "ours / peft", 1, 0.72, 0.60),
    Goal("Merged: time over frozen", "merged", "ours merged / frozen", 1, 1.01, 1.00),
    Goal("MiniLM step, LoRA, independent masks: speed over peft", "train-lora", "peft / ours", 1, 1.20, 1.35, more=True),
    Goal("MiniLM step, LoRA, shared masks: speed over peft", "train-lora", SHARED, 1, 1.15, 1.32, more=True),
    Goal("MiniLM step, LoRA: speed over full fine-tuning", "train-lora", "full / ours", 0.99, 1.22, 1.32, more=True),
    Goal("MiniLM step, LoRA: speed over the frozen base", "train-lora", "frozen / ours", 0.70, 0.86, 0.93, more=True),
    Goal("MiniLM step as experiments run it: speed over peft", "train-lora", AS_RUN, 1, 1.35, 1.5, more=True),
    Goal("MiniLM step as experiments run it, bfloat16: over peft's", "train-lora-bfloat16", AS_RUN, 1, 1.5, 1.8, more=True),
    Goal("the same over peft's in float32", "train-lora-bfloat16", F32_AS_RUN, 1, 2.3, 2.8, more=True),
    Goal("MiniLM step, QLoRA: speed over peft", "train-qlora", "peft / ours", 1, 1.25, 1.4, more=True),
    Goal(
        "SmolLM2's step, float32: speed over the frozen base", "train-llm-float32", "frozen / ours", 0.83, 0.88, 0.95, more=True
    ),
    Goal(
        "SmolLM2's step, bfloat16: speed over the frozen base",
        "train-llm-bfloat16",
        "frozen / ours",
        0.77,
        0.84,
        0.95,
        more=True,
    ),
    Goal("SmolLM2's step as experiments run it: speed over peft", "train-llm-float32", AS_RUN, 1, 1.4, 1.55, more=True),
    Goal("the same in bfloat16: speed over peft's", "train-llm-bfloat16", AS_RUN, 1, 1.5, 1.75, more=True),
    Goal("One token, SmolLM2, not merged: time over the base", "decode-llm", "ours / base", 1.23, 1.15, 1.05),
    Goal("Kept for the backward, q, k, v, out: bytes over peft's", "saved-attention", "ours / peft", 1, 0.30, 0.28),
    Goal("Kept for the backward, all linear: bytes over peft's", "saved-all-linear", "ours / peft", 1, 0.44, 0.41),
    Goal("Peak of the whole QLoRA job: over peft's", "job-qlora", "ours / peft", 1, 0.75, 0.60),
    Goal("Peak of the whole QLoRA job: over our LoRA's", "job-qlora", "ours / ours, LoRA", 1.17, 1.0, 1.0),
    Goal("Peak of a QLoRA job on SmolLM2: over peft's", "peak-llm-qlora-fp32", "ours / peft", 1, 0.8, 0.6),
    Goal("Peak of that job in bfloat16: over peft's", "peak-llm-qlora-bf16", "ours / peft", 1, 0.8, 0.6),
    Goal("32 rows, 8 adapters, a token each, open: speed over peft", "mixed-1", "peft / ours, open", 1, 2.0, 2.0, more=True),
    Goal("Switching among 100 adapters: time over 3", "switch-growth", "many / few", 1, 1.2, 1.0),
    Goal("merge_and_unload, DistilBERT-sized: time over peft's", "merge-distilbert", "ours / peft", 1, 0.8, 0.5),
)


def judged(measures: Iterable[Measure], comparable: bool) -> list[dict[str, Any]]:
    """Every goal with the measured ratio and a verdict.

    Args:
        measures: what was measured.
        comparable: whether it was measured as the goals mean it: on a CPU, and not with --quick.
    """
    by_key = {measure.key: measure for measure in measures}
    rows = []
    for goal in GOALS:
        measure = by_key.get(goal.key)
        ratio = measure.ratios.get(goal.ratio) if measure else None
        row = {"goal": goal.text, "key": goal.key, "ratio": goal.ratio, "peft": goal.peft, "must": goal.must, "aim": goal.aim}
        rows.append(row | {"measured": ratio.value if ratio else None, "verdict": _verdict(goal, ratio, comparable)})
    return rows


def _verdict(goal: Goal, ratio: Ratio | None, comparable: bool) -> str:
    if ratio is None:
        return "not measured"
    if not comparable:
        return "no verdict"
    value = round(ratio.value, 2)  # as it is shown
    if goal.reached(value, goal.aim):
        return "met, and the aim"
    return "met" if goal.reached(value, goal.must) else "NOT MET"
