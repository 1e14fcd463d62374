"""What does a batch cost whose rows use different adapters, against peft's `adapter_names`?

    python -m bench mixing

MiniLM, 32 real sentences, cut to 12 tokens, and to 1 as when a model writes token by token; 8 adapters of r=16 on all
linear layers, each with a head of its own, four rows for each, in an order that mixes them; eval mode, without gradients.
Ours is timed with opening the context, which stacks the adapters, and in an open one, where batches of the same rows follow
each other. `one adapter` is the same batch with a single active one. Peft can't mix DoRA adapters, so those stand alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import peft
import torch
from torch import Tensor, nn

from lora_core import LoraConfig, inject, mixed_batch, set_adapter
from lora_core.files.storage import adapter_tensors
from lora_core.model.registry import adapter_parameters

from .measure import Measure
from .models import ALL_LINEAR, R, minilm, sentences
from .peers import agreed, relative_difference, same_base
from .settings import Settings
from .timing import interleave

ROWS, ADAPTERS, ROUNDS = 32, 8, 31


def run(settings: Settings) -> Iterator[Measure]:
    batch = max(sentences(ROWS, 20, settings.device), key=lambda b: b["input_ids"].shape[1])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    names = [f"adapter{i * 3 % ADAPTERS}" for i in range(ROWS)]
    ours, theirs = models(settings.device)
    dora, _ = models(settings.device, use_dora=True)
    for length in (inputs["input_ids"].shape[1], 12, 1):
        rows = {name: tensor[:, :length] for name, tensor in inputs.items()}
        yield measure(length, ours, theirs, dora, rows, names, settings)


def models(device: str, use_dora: bool = False) -> tuple[nn.Module, nn.Module | None]:
    """MiniLM with the same adapters, ours and peft's (None for DoRA), in eval mode."""
    common = {"r": R, "lora_alpha": 2 * R, "task_type": "SEQ_CLS", "use_dora": use_dora}
    ours, theirs = minilm().to(device), None
    for i in range(ADAPTERS):
        name = f"adapter{i}"
        inject(ours, LoraConfig(target_modules=ALL_LINEAR, **common), name)
        torch.manual_seed(i)
        for parameter in adapter_parameters(ours, name):
            nn.init.normal_(parameter, std=0.02)
        if use_dora:
            continue
        config = peft.LoraConfig(target_modules=ALL_LINEAR, **common)
        if theirs is None:
            theirs = peft.get_peft_model(minilm().to(device), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        outcome = peft.set_peft_model_state_dict(theirs, adapter_tensors(ours, name), adapter_name=name)
        agreed(float(len(outcome.unexpected_keys)), 0, "the layers that ours and peft adapt")
    return ours.eval(), theirs.eval() if theirs else None


@torch.no_grad()
def measure(
    tokens: int,
    ours: nn.Module,
    theirs: nn.Module,
    dora: nn.Module,
    rows: dict[str, Tensor],
    names: list[str],
    settings: Settings,
) -> Measure:
    set_adapter(ours, names[0])
    opened = same_base(ours)  # in a context of its own for the whole measure

    def mixed(model: nn.Module) -> Tensor:
        with mixed_batch(model, names):
            return model(**rows).logits

    def by_peft() -> Tensor:
        return theirs(**rows, adapter_names=names).logits

    difference = agreed(relative_difference(by_peft(), mixed(ours)), 1e-4, "logits of ours, peft")
    candidates = {
        "ours": lambda: mixed(ours),
        "ours, open": lambda: opened(**rows).logits,
        "peft": by_peft,
        "ours, one adapter": lambda: ours(**rows).logits,
        "ours, DoRA": lambda: mixed(dora),
    }
    with mixed_batch(opened, names):
        samples = interleave(candidates, **settings.timing(ROUNDS))
    pairs = (("peft", "ours"), ("peft", "ours, open"), ("ours, open", "ours, one adapter"))
    return Measure(
        key=f"mixed-{'sentences' if tokens > 12 else tokens}",
        title=f"{ROWS} rows of {tokens} token{'s' * (tokens > 1)} over {ADAPTERS} adapters",
        unit="s",
        values=samples.medians(),
        ratios={f"{a} / {b}": samples.ratio(a, b) for a, b in pairs},
        setting={
            "rows": ROWS,
            "tokens": tokens,
            "adapters": ADAPTERS,
            "r": R,
            "rounds": samples.rounds,
            "difference": difference,
        },
    )
