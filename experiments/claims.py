"""What the study claims and what this project aims at, held against the runs; and where the published figures disagree.

A difference of two accuracies is judged by its 95 % interval, that of two binomials: beyond it the runs support or contradict
the claim, within it they can't tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .counts import counted
from .expected import architectures, known
from .measured import Group, Row, margin, percent
from .methods import METHODS
from .models import layer_names

SUPPORTED, CONTRADICTED, UNDECIDED, NOT_RUN = "supported", "contradicted", "can't be told apart", "not run"
REACHED, MISSED = "reached", "missed"
#: How far an aim lets one accuracy lie below another.
POINT = 0.01


@dataclass(frozen=True)
class Claim:
    """A claim or an aim, the verdict, and the numbers behind it."""

    text: str
    verdict: str
    numbers: str = ""


def findings(group: Group) -> list[Claim]:
    """The study's four key findings, as the rows of one budget show them."""
    return [
        _raises(group, "LoRA lifts a base from chance (84 % up from 43 %) with few trained parameters", "base", "lora"),
        _memory(group, "QLoRA saves about 12 % of memory at little cost in accuracy"),
        _raises(group, "A higher rank helps marginally", "lora", "high-rank"),
        _raises(group, "Training biases too helps a little", "lora", "bias"),
    ]


def aims(group: Group) -> list[Claim]:
    """What this project wants to reach on one budget."""
    return [
        _within(group, "QLoRA within 1.0 point of LoRA", "lora", "qlora"),
        _within(group, "LoRA within 1.0 point of full fine-tuning", "full", "lora"),
        _lighter(group, "QLoRA's measured peak memory is below LoRA's"),
    ]


def _raises(group: Group, text: str, before: str, after: str) -> Claim:
    a, b = group.row(before), group.row(after)
    if not a or not b:
        return Claim(text, NOT_RUN)
    gain, half = b.accuracy - a.accuracy, margin(a.accuracy, b.accuracy, group.budget.validation)
    verdict = UNDECIDED if abs(gain) <= half else SUPPORTED if gain > 0 else CONTRADICTED
    share = 100 * b.mean("trainable_parameters") / b.mean("total_parameters")
    numbers = f"{after} {percent(b.accuracy)}, {before} {percent(a.accuracy)}: {_points(gain, half)}"
    return Claim(text, verdict, f"{numbers}; {share:.3g} % of the parameters trained")


def _within(group: Group, text: str, of: str, method: str) -> Claim:
    a, b = group.row(of), group.row(method)
    if not a or not b:
        return Claim(text, NOT_RUN)
    gain, half = b.accuracy - a.accuracy, margin(a.accuracy, b.accuracy, group.budget.validation)
    numbers = f"{method} {percent(b.accuracy)}, {of} {percent(a.accuracy)}: {_points(gain, half)}"
    return Claim(text, REACHED if gain >= -POINT else MISSED, numbers)


def _memory(group: Group, text: str) -> Claim:
    lora, qlora = group.row("lora"), group.row("qlora")
    if not lora or not qlora:
        return Claim(text, NOT_RUN)
    gain, half = qlora.accuracy - lora.accuracy, margin(lora.accuracy, qlora.accuracy, group.budget.validation)
    what, before, after = peaks(lora, qlora)
    saved, weights = 1 - after / before, 1 - qlora.mean("base_weight_bytes") / lora.mean("base_weight_bytes")
    verdict = SUPPORTED if saved > 0 and gain >= -POINT else UNDECIDED if saved > 0 and gain >= -half else CONTRADICTED
    numbers = f"{what} {_less(saved)}, base weights {_less(weights)}; {_points(gain, half)} of accuracy"
    return Claim(text, verdict, numbers)


def _lighter(group: Group, text: str) -> Claim:
    lora, qlora = group.row("lora"), group.row("qlora")
    if not lora or not qlora:
        return Claim(text, NOT_RUN)
    what, before, after = peaks(lora, qlora)
    return Claim(text, REACHED if after < before else MISSED, f"{what}: QLoRA {after:,.0f} MiB, LoRA {before:,.0f} MiB")


def peaks(a: Row, b: Row) -> tuple[str, float, float]:
    """What is compared, and its peak in MiB for each row: the GPU's memory if both ran on one, else the process's."""
    on_gpu = (a.most("peak_cuda_mb"), b.most("peak_cuda_mb"))
    if None not in on_gpu:
        return "peak GPU memory", *on_gpu
    return "peak memory", a.most("peak_rss_mb"), b.most("peak_rss_mb")


def _less(share: float) -> str:
    return f"{percent(abs(share))} {'lower' if share > 0 else 'higher'}"


def _points(gain: float, half: float) -> str:
    return f"{100 * gain:+.1f} points (± {100 * half:.1f})"


# --- the published figures ---------------------------------------------------------------------------------------------


def recounted() -> Iterator[tuple[str, ...]]:
    """A row for each published method: what was published, and what its recipe comes to on the study's base."""
    table = known()["published"]
    architecture = architectures()[table["base"]]
    for row in table["rows"]:
        if row["trained_percent"] is None:
            continue
        counts = counted(architecture, METHODS[row["method"]].trains, settings(row["method"]))
        yield (
            row["method"],
            f"{row['trained_percent']:.2f} %",
            f"{counts.adapter:,} ({100 * counts.adapter / counts.total:.2f} %)",
            f"{counts.trained:,} ({100 * counts.trained / counts.total:.2f} %)",
            f"{counts.total:,}",
        )


def settings(method: str) -> dict:
    """What `counts.counted` needs of a recipe on a DistilBERT, the study's base."""
    recipe = METHODS[method]
    return {"r": recipe.r, "target_modules": layer_names("distilbert", recipe.roles), "bias": recipe.bias}


def disagreements() -> list[str]:
    """Where the published figures do not add up, in a sentence or two each; every number is computed here."""
    table = known()["published"]
    rows = {row["method"]: row for row in table["rows"]}
    base, lora, qlora, high = (rows[name] for name in ("base", "lora", "qlora", "high-rank"))
    architecture = architectures()[table["base"]]
    r16, r32 = (counted(architecture, "adapter", settings(name)) for name in ("lora", "high-rank"))
    held, published = 4 * r16.trained / 2**20, lora["memory_mb"] - base["memory_mb"]
    saved = lora["memory_mb"] - qlora["memory_mb"]
    possible = (4 * architecture.quantized - architecture.quantized_bytes) / 2**20
    half = 100 * margin(lora["accuracy"], qlora["accuracy"], 872)
    cost, rank = (100 * (row["accuracy"] - lora["accuracy"]) for row in (qlora, high))
    return [
        f"Parameters: the text's 1.77 million is the count for rank 32 with the head, {r32.trained:,} of {r32.total:,}. That "
        f"is {100 * r32.trained / r32.total:.2f} %, or {100 * r32.adapter / r32.total:.2f} % without the head; the table says "
        f"{high['trained_percent']} %. No published percentage is that of its row, with the head or without.",
        f"Ratios: twice the rank is twice the adapter, but the table goes from {lora['trained_percent']} % to "
        f"{high['trained_percent']} %; LoRA and QLoRA train the same tensors, but the table halves QLoRA's share.",
        f"Memory: LoRA's {published:.2f} MB above the base are exactly its trained weights in float32 ({held:.2f} MiB). So "
        "gradients and AdamW's two moments, three times as much again, and activations seem not to be counted.",
        f"Memory: QLoRA is {saved:.0f} MB ({100 * saved / lora['memory_mb']:.1f} %) below LoRA, but holding the linear layers "
        f"of this base in NF4 instead of float32 saves {possible:.0f} MiB. The rest of the difference is not QLoRA's.",
        f"Accuracy: the text's 84 % is not LoRA's row ({percent(lora['accuracy'])}). A higher rank is said to help, and its "
        f"row is {-rank:.1f} points lower; QLoRA's cost is {-cost:.1f} points. With 872 sentences and one run, differences "
        f"within {half:.1f} points say nothing.",
    ]
