"""Where the published figures of the study do not add up: recounted from the architecture, in closed form."""

from __future__ import annotations

from collections.abc import Iterator

from .counts import counted
from .expected import architectures, known
from .measured import margin, percent
from .models import layer_names
from .recipes import METHODS


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
