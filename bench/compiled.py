"""What does torch.compile make of a model with adapters?

    python -m bench compiled        some minutes; asked only by name

A training step, and a forward without gradients, of SmolLM2's widths (6 layers, 4 x 128 tokens, as in `language.py`) and of
MiniLM (32 x 32 tokens), in float32 and under bfloat16 autocast: the plain model, which is trained whole, ours and peft's, each
as it is and compiled by inductor, which for a CPU needs a C++ compiler. `fullgraph=True` makes a break of the graph an error.
What the first call takes, which compiles, is in the setting; it is less where inductor finds what an earlier run has left.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import language, training
from .measure import Measure
from .models import LLAMA_TINY, SMOLLM, R, classification_loss, classifier, tokens
from .peers import agreed, relative_difference
from .settings import Settings
from .timing import interleave

ROUNDS = 15
NAMES = ("plain", "ours", "peft")
AFTER = ", compiled"
PAIRS = (
    *((name, name + AFTER) for name in NAMES),
    ("peft" + AFTER, "ours" + AFTER),
    ("plain" + AFTER, "ours" + AFTER),
    ("peft", "ours"),
)
Models = Mapping[str, nn.Module]


def run(settings: Settings) -> Iterator[Measure]:
    for bf16 in (False, True):
        yield from smollm(bf16, settings)
        yield from minilm(bf16, settings)


def smollm(bf16: bool, settings: Settings) -> Iterator[Measure]:
    shape, size = (LLAMA_TINY, (2, 16)) if settings.quick else (SMOLLM, language.SIZE)
    ids = torch.randint(shape["vocab_size"], size, generator=torch.Generator().manual_seed(0)).to(settings.device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    ours = language.build("ours", shape, settings.device)
    models = {
        "plain": language.build("full", shape, settings.device),
        "ours": ours,
        "peft": language.build("peft", shape, settings.device, ours),
    }
    loss = functools.partial(language.loss, ids=ids, dtype=dtype)
    step = functools.partial(language.Step, loss=loss)
    setting = {"model": "SmolLM2's widths", "layers": shape["num_hidden_layers"], "tokens": list(size)}
    yield from _measures("llm", models, step, loss, bf16, settings, setting)


def minilm(bf16: bool, settings: Settings) -> Iterator[Measure]:
    size = (2, 8) if settings.quick else (32, 32)
    batch = tokens(*size, settings.device)
    ours = classifier("ours", device=settings.device)
    models = {
        "plain": classifier("full", device=settings.device),
        "ours": ours,
        "peft": classifier("peft", device=settings.device, like=ours),
    }
    step = functools.partial(training.Step, batches=[batch], bf16=bf16)
    setting = {"model": "MiniLM", "tokens": list(size)}
    yield from _measures("minilm", models, step, lambda model: classification_loss(model, batch, bf16), bf16, settings, setting)


def _measures(
    key: str,
    models: Models,
    step: Callable[[nn.Module], Callable[[], None]],
    loss: Callable[[nn.Module], Tensor],
    bf16: bool,
    settings: Settings,
    setting: dict[str, Any],
) -> Iterator[Measure]:
    """The forward first: then every model still computes what the others do."""
    for model in models.values():
        model.eval()
    calls = {name: functools.partial(_forward, loss, model) for name, model in both(models).items()}
    results, first = _first_calls(calls)
    adapted = [value for name, value in results.items() if name.startswith(("ours", "peft"))]
    worst = max(relative_difference(results["ours"], value) for value in adapted)
    difference = agreed(worst, 0.05 if bf16 else 1e-4, "the losses of ours and peft, compiled or not")
    yield _measure(f"compiled-{key}-forward", "forward", calls, bf16, settings, setting | first | {"difference": difference})
    for model in models.values():
        model.train()
    calls = {name: step(model) for name, model in both(models).items()}
    _, first = _first_calls(calls)
    yield _measure(f"compiled-{key}-train", "training step", calls, bf16, settings, setting | first)


def _first_calls(calls: Mapping[str, Callable]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each gives, and the seconds that it takes where it may have to compile first."""
    results, seconds = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        results[name] = call()
        seconds[name] = round(time.perf_counter() - start, 2)
    return results, {"seconds of the first call": seconds}


def both(models: Models) -> dict[str, nn.Module]:
    """Each model as it is, and compiled."""
    torch._dynamo.reset()
    return dict(models) | {name + AFTER: torch.compile(model, fullgraph=True) for name, model in models.items()}


@torch.no_grad()
def _forward(loss: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    return loss(model)


def _measure(
    key: str, what: str, calls: Mapping[str, Callable], bf16: bool, settings: Settings, setting: dict[str, Any]
) -> Measure:
    samples = interleave(calls, **settings.timing(ROUNDS))
    kind = "bfloat16" if bf16 else "float32"
    return Measure(
        key=f"{key}-{kind}",
        title=f"{setting['model']}, LoRA r={R}: {what}, compiled or not, {kind}",
        unit="s",
        values=samples.medians(),
        ratios={f"{above} / {below}": samples.ratio(above, below) for above, below in PAIRS},
        setting=setting | {"r": R, "dtype": kind, "rounds": samples.rounds},
    )
