"""How long does it take to fold an adapter into the base for good, against peft?

    python -m bench merging

On a model of DistilBERT's size, float32, and on layers of Llama 7B's shape, bfloat16; r=16 on the four attention
projections, random A and B. Each call gets a fresh copy of the adapted model, made off the clock. Ours sums in float32
and checks that every merged weight is finite; peft's default, which is its fastest, does not check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_core import LoraConfig, inject, merge_and_unload

from .measure import Measure
from .models import LLAMA_7B, LLAMA_TINY, R, distilbert, llama
from .peers import adapt_with_peft, agreed, randomize, relative_difference
from .settings import Settings
from .timing import Candidate, interleave

DISTILBERT_PROJECTIONS = ("q_lin", "k_lin", "v_lin", "out_lin")
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUNDS = 15


def run(settings: Settings) -> Iterator[Measure]:
    def small() -> nn.Module:
        return distilbert(settings.quick).to(settings.device)

    def large() -> nn.Module:
        shape = LLAMA_TINY if settings.quick else LLAMA_7B | {"num_hidden_layers": 2, "vocab_size": 1000}
        return llama(shape, settings.device)

    yield merge("merge-distilbert", "merge_and_unload, DistilBERT-sized", small, DISTILBERT_PROJECTIONS, settings)
    yield merge("merge-7b", "merge_and_unload, two layers of 7B shape, bfloat16", large, LLAMA_PROJECTIONS, settings)


def merge(key: str, title: str, build: Callable[[], nn.Module], targets: tuple[str, ...], settings: Settings) -> Measure:
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=targets)
    ours, theirs = build(), build()
    dtype = theirs.dtype
    inject(ours, config)
    randomize(ours)
    theirs = adapt_with_peft(theirs, config, like=ours)
    difference = _check(ours, theirs, dtype)
    candidates = {
        "ours": Candidate(merge_and_unload, prepare=lambda: copy.deepcopy(ours)),
        "peft": Candidate(_merge_with_peft, prepare=lambda: copy.deepcopy(theirs)),
    }
    samples = interleave(candidates, **settings.timing(ROUNDS, warmup=2))
    return Measure(
        key=key,
        title=title,
        unit="s",
        values=samples.medians(),
        ratios={"ours / peft": samples.ratio("ours", "peft")},
        setting={
            "layers": sum(path.endswith(targets) for path, _ in ours.named_modules()),
            "r": R,
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": samples.rounds,
            "difference": difference,
        },
    )


def _merge_with_peft(model: Any) -> nn.Module:
    return model.merge_and_unload()


def _check(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> float:
    merged, other = copy.deepcopy(ours), _merge_with_peft(copy.deepcopy(theirs))
    merge_and_unload(merged)
    pairs = zip(merged.state_dict().items(), other.state_dict().items(), strict=True)
    worst = max(relative_difference(a, b) for (_, a), (_, b) in pairs if a.is_floating_point())
    return agreed(worst, 1e-5 if dtype == torch.float32 else 1e-2, "merged weights of ours, peft")
