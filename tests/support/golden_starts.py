"""Facts of adapters that start from data, from a dense base or from a tuned model, for the golden files."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lora_core import (
    LoraConfig,
    disable_adapters,
    extract_adapter,
    initialize_eva,
    initialize_loftq,
    inject,
    merge_and_unload,
    quantize_nf4,
    trainable_parameters,
)
from tests.support import tiny
from tests.support.golden_facts import fill, fill_trained, numbers

CONFIG = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def base() -> nn.Module:
    model = tiny.build("llama")
    fill(dict(model.named_parameters()))
    return model


def eva() -> tuple[nn.Module, Any]:
    model = base()
    inject(model, CONFIG)
    return model, initialize_eva(model, [tiny.inputs(model)], rho=2.0)


def loftq() -> tuple[nn.Module, Any]:
    model = base()
    quantize_nf4(model)
    inject(model, CONFIG)
    return model, initialize_loftq(model, base())


def extracted() -> tuple[nn.Module, Any]:
    tuned, model = base(), base()
    inject(tuned, CONFIG)
    fill_trained(tuned)
    merge_and_unload(tuned)
    return model, extract_adapter(model, tuned, CONFIG)


def start_facts() -> dict[str, Any]:
    return {made.__name__: _facts(made) for made in (eva, loftq, extracted)}


def _facts(made: Callable[[], tuple[nn.Module, Any]]) -> dict[str, Any]:
    model, report = made()
    found = {"report": str(report), "fields": sorted(vars(report)), "logits": numbers(tiny.logits(model))}
    with disable_adapters(model):
        found["base"] = numbers(tiny.logits(model))
    norms = {path: numbers(p)[:1] for path, p in model.named_parameters() if p.requires_grad}  # signs may differ
    return found | {"norms": norms, "trainable": len(trainable_parameters(model))}
