"""How fast does a whole training step go, against peft, full fine-tuning and the frozen base?

    python -m bench training

MiniLM learns real sentences: batches of 32 padded to their longest, r=16 on query, key, value and attention.output.dense,
dropout 0.1, AdamW in one kernel (transformers' default), clipping at 1. A step is forward, backward, clipping, optimiser,
zeroing; every candidate takes the same batches in the same order, and is compared with the others on each (sentences of 66
tokens cost eight times as much as sentences of 8). The base is untouched, and every LoRA layer draws a dropout mask of its
own. With "ours, shared masks" the layers that read one tensor share one. "Ours, as experiments" has what the experiments
change besides: a cheaper draw for the base's own dropout layers and for the dropout in its attention, and on AMD's processors
oneDNN for the products with its frozen weights.

On the CPU the same is asked under bfloat16 autocast. The experiments then hold the frozen weights in it too (`--precision
bf16`), and peft is there in float32 besides: what a plain loop with it takes. A language model is asked too: see `language.py`.

The frozen base is the floor: its head is trained, and gradients flow down to where the lowest adapter would stand (see
`peers.freeze`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from experiments.attention import use_fast_attention
from experiments.precision import cast_frozen
from lora_core import share_dropout_masks, use_fast_dropout, use_fast_linear

from . import language
from .measure import Measure
from .models import DROPOUT, R, classification_loss, classifier, packaged, sentences
from .peers import check_models, trained
from .settings import Settings
from .timing import Samples, interleave

BATCH = 32
BATCHES = 24
ROUNDS = 2 * BATCHES  # each batch twice


class Step:
    """One candidate's training: each call takes the next batch and updates what the candidate trains."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], bf16: bool = False) -> None:
        self.model, self.batches, self.bf16 = model, itertools.cycle(batches), bf16
        self.parameters = trained(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.01, fused=True)

    def __call__(self) -> None:
        classification_loss(self.model, next(self.batches), self.bf16).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def run(settings: Settings) -> Iterator[Measure]:
    batches = sentences(4 if settings.quick else BATCH, 3 if settings.quick else BATCHES, settings.device)
    yield lora(settings, batches)
    yield qlora(settings, batches)
    if settings.device == "cpu":
        yield lora_bfloat16(settings, batches)
    yield from language.steps(settings)


def lora(settings: Settings, batches: Sequence[Mapping[str, Tensor]]) -> Measure:
    build = functools.partial(classifier, device=settings.device)
    models = {name: build(name) for name in ("frozen", "full", "ours")}
    models["peft"] = build("peft", like=models["ours"])
    models |= _variants(build)
    adapted = {name: model for name, model in models.items() if name not in ("frozen", "full")}
    difference = _check(adapted, batches[0], settings)
    samples = _time(models, batches, settings)
    pairs = [
        ("peft", "ours"),
        ("full", "ours"),
        ("frozen", "ours"),
        ("peft", "ours, shared masks"),
        ("frozen", "ours, shared masks"),
        ("peft", "ours, as experiments"),
        ("full", "ours, as experiments"),
        ("frozen", "peft"),
    ]
    title = "MiniLM training step, LoRA r=16 on q, k, v, out"
    return _measure("train-lora", title, samples, pairs, batches, settings, difference)


def qlora(settings: Settings, batches: Sequence[Mapping[str, Tensor]]) -> Measure:
    build = functools.partial(classifier, quantize=True, device=settings.device)
    models = {"ours": build("ours")}
    models["peft"] = build("peft", like=models["ours"])
    models |= _variants(build)
    difference = _check(models, batches[0], settings)
    samples = _time(models, batches, settings)
    pairs = [("peft", "ours"), ("peft", "ours, shared masks"), ("peft", "ours, as experiments")]
    title = "MiniLM training step, QLoRA r=16 on q, k, v, out"
    return _measure("train-qlora", title, samples, pairs, batches, settings, difference)


def lora_bfloat16(settings: Settings, batches: Sequence[Mapping[str, Tensor]]) -> Measure:
    """All but one candidate under autocast: "peft, float32" is what the others are measured against besides."""
    models = {name: classifier(name) for name in ("frozen", "full", "ours")}
    models["peft"] = classifier("peft", like=models["ours"])
    models["ours, as experiments"] = _variants(classifier)["ours, as experiments"]
    cast_frozen(models["ours, as experiments"], packaged().keep)
    adapted = {name: models[name] for name in ("ours", "peft", "ours, as experiments")}
    difference = check_models(
        adapted, lambda model: classification_loss(model, batches[0], bf16=True), language.TOLERANCES[torch.bfloat16]
    )
    steps = {name: Step(model, batches, bf16=True) for name, model in models.items()}
    steps["peft, float32"] = Step(classifier("peft", like=models["ours"]), batches)
    samples = interleave(steps, **settings.timing(ROUNDS))
    pairs = [
        ("peft", "ours"),
        ("full", "ours"),
        ("frozen", "ours"),
        ("peft", "ours, as experiments"),
        ("peft, float32", "ours, as experiments"),
        ("peft, float32", "ours"),
        ("frozen", "peft"),
    ]
    title = "MiniLM training step, LoRA r=16 on q, k, v, out, bfloat16 autocast"
    return _measure("train-lora-bfloat16", title, samples, pairs, batches, settings, difference, bf16=True)


def _variants(build: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    """Our model with masks shared, and with all that the experiments change besides."""
    shared, changed = build("ours"), build("ours", prepare=use_fast_linear)
    use_fast_dropout(changed)
    use_fast_attention(changed)
    for model in (shared, changed):
        share_dropout_masks(model)
    return {"ours, shared masks": shared, "ours, as experiments": changed}


def _check(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor], settings: Settings) -> float:
    tolerance = 1e-3 if settings.device == "cpu" else 5e-2
    return check_models(models, lambda model: classification_loss(model, batch), tolerance)


def _time(models: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]], settings: Settings) -> Samples:
    steps = {name: Step(model, batches) for name, model in models.items()}
    return interleave(steps, **settings.timing(ROUNDS))


def _measure(
    key: str,
    title: str,
    samples: Samples,
    pairs: Sequence[tuple[str, str]],
    batches: Sequence[Mapping[str, Tensor]],
    settings: Settings,
    difference: float,
    bf16: bool = False,
) -> Measure:
    return Measure(
        key=key,
        title=title,
        unit="s",
        values=samples.medians(),
        ratios={f"{above} / {below}": samples.ratio_within_rounds(above, below) for above, below in pairs},
        setting={
            "batch": [list(batch["input_ids"].shape) for batch in batches],
            "r": R,
            "dropout": DROPOUT,
            "dtype": "bfloat16 autocast" if bf16 or settings.device == "cuda" else "float32",
            "rounds": samples.rounds,
            "difference": difference,
        },
    )
