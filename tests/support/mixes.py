"""Adapters for a mixed batch, and what each row of it must be."""

import torch

from lora_core import disable_adapters, set_adapter
from lora_core.model.registry import registry_of

#: Adapters that differ in all that a row can differ in: rank, scaling, layers, variant, start.
VARIANTS = {
    "dora": {"r": 3, "use_dora": True},
    "plain": {"r": 2},
    "rslora": {"r": 5, "use_rslora": True, "lora_alpha": 3},
    "pissa": {"r": 2, "init_lora_weights": "pissa"},
}
MIX = ["dora", "plain", None, "rslora", "dora", "pissa"]


def one_by_one(model, names, rows, run):
    """The outputs of each row alone, with its adapter active."""
    active, outputs = registry_of(model).active, []
    for name, row in zip(names, rows, strict=True):
        if name is None:
            with disable_adapters(model):
                outputs.append(run(model, row[None]))
        else:
            set_adapter(model, name)
            outputs.append(run(model, row[None]))
    set_adapter(model, active)
    return torch.cat(outputs)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits
