"""How long do the other verbs take: inject, save, load and switch, against peft?

    python -m bench loading

On a model of DistilBERT's size and on one of Llama 7B's shape: on the meta device, which holds no weights, where only
the structure matters (inject, switch), and with two of its layers where tensors are written and read. r=16 on the four
attention projections. Saving with ours waits until the disk has the files (fsync), and with peft it does not. Switching
is timed with 3 and with 100 adapters on the smaller model: it should cost the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import peft
import torch
from torch import nn

from lora_core import LoraConfig, inject, load_adapter, save_adapter, set_adapter

from .measure import Measure
from .merging import DISTILBERT_PROJECTIONS, LLAMA_PROJECTIONS
from .models import LLAMA_7B, LLAMA_TINY, R, distilbert, llama
from .peers import adapt_with_peft, agreed, randomize, relative_difference, same_base, trained
from .settings import Settings
from .timing import Candidate, interleave

ROUNDS = 15
Build = Callable[[], nn.Module]


def run(settings: Settings) -> Iterator[Measure]:
    def small() -> nn.Module:
        return distilbert(settings.quick).to(settings.device)

    shape = LLAMA_TINY if settings.quick else LLAMA_7B
    few_layers = LLAMA_TINY if settings.quick else LLAMA_7B | {"num_hidden_layers": 2, "vocab_size": 1000}
    places = (
        ("distilbert", "DistilBERT-sized", DISTILBERT_PROJECTIONS, small, small),
        ("7b", "7B shape", LLAMA_PROJECTIONS, partial(llama, shape, "meta"), partial(llama, few_layers, settings.device)),
    )
    for key, name, targets, structure, weights in places:
        config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=targets)
        yield time_inject(f"inject-{key}", f"inject, {name}", structure(), config, settings)
        yield from time_files(key, name if structure is weights else f"two layers of {name}", weights(), config, settings)
        # Peft takes minutes to be given 100 adapters on the larger model, so there it is spared.
        for count in (3,) if key == "7b" else (3, 4 if settings.quick else 100):
            title = f"switch among {count} adapters, {name}"
            yield time_switch(f"switch-{key}-{count}", title, structure, config, count, settings)
    yield time_growth(small, LoraConfig(r=R, lora_alpha=2 * R, target_modules=DISTILBERT_PROJECTIONS), settings)


def time_inject(key: str, title: str, model: nn.Module, config: LoraConfig, settings: Settings) -> Measure:
    fresh = partial(same_base, model)
    candidates = {
        "ours": Candidate(lambda m: inject(m, config), prepare=fresh),
        "peft": Candidate(lambda m: peft.get_peft_model(m, _peft_config(config)), prepare=fresh),
    }
    return _measure(key, title, candidates, settings)


def time_files(key: str, name: str, model: nn.Module, config: LoraConfig, settings: Settings) -> Iterator[Measure]:
    """Save, then load onto a fresh base. Both sides write the same format, and each loads what ours wrote."""
    ours = same_base(model)
    inject(ours, config)
    randomize(ours)
    theirs = adapt_with_peft(same_base(model), config, like=ours)
    with tempfile.TemporaryDirectory() as directory:
        mine, other = Path(directory, "ours"), Path(directory, "peft")
        savers = {
            "ours": lambda: save_adapter(ours, mine),
            "peft": lambda: theirs.save_pretrained(other, save_embedding_layers=False),
        }
        yield _measure(f"save-{key}", f"save, {name}", savers, settings)
        fresh = partial(same_base, model)
        loaders = {
            "ours": Candidate(lambda m: load_adapter(m, mine, trainable=True), prepare=fresh),
            "peft": Candidate(partial(_load_with_peft, mine), prepare=fresh),
        }
        loaded = fresh()
        load_adapter(loaded, mine, trainable=True)
        pairs = zip(trained(loaded), trained(_load_with_peft(mine, fresh())), strict=True)
        # On a 16-bit base peft rounds the adapter to 16 bits as it loads it; ours keeps what the file holds.
        tolerance = 0.0 if model.dtype == torch.float32 else 5e-3
        agreed(max(relative_difference(a, b) for a, b in pairs), tolerance, "loaded adapters of ours, peft")
        yield _measure(f"load-{key}", f"load, {name}", loaders, settings)


def time_switch(key: str, title: str, build: Build, config: LoraConfig, count: int, settings: Settings) -> Measure:
    names = [f"adapter{i}" for i in range(count)]
    ours, theirs = build(), build()
    theirs = peft.get_peft_model(theirs, _peft_config(config), adapter_name=names[0])
    for name in names:
        inject(ours, config, name)
    for name in names[1:]:
        theirs.add_adapter(name, _peft_config(config))
    mine, other = cycle(names), cycle(names)
    candidates = {"ours": lambda: set_adapter(ours, next(mine)), "peft": lambda: theirs.set_adapter(next(other))}
    return _measure(key, title, candidates, settings)


def time_growth(build: Build, config: LoraConfig, settings: Settings) -> Measure:
    """Switching among many adapters and among few, side by side."""
    switches, counts = {}, {"few": 3, "many": 4 if settings.quick else 100}
    for which, count in counts.items():
        model, names = build(), [f"adapter{i}" for i in range(count)]
        for name in names:
            inject(model, config, name)
        turn = cycle(names)
        switches[which] = lambda model=model, turn=turn: set_adapter(model, next(turn))
    samples = interleave(switches, **settings.timing(ROUNDS * 3, warmup=2))
    return Measure(
        key="switch-growth",
        title=f"switch among few adapters ({counts['few']}) and many ({counts['many']}), DistilBERT-sized",
        unit="s",
        values=samples.medians(),
        ratios={"many / few": samples.ratio("many", "few")},
        setting={"r": R, "rounds": samples.rounds},
    )


def _peft_config(config: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=list(config.target_modules))


def _load_with_peft(directory: Path, model: nn.Module) -> nn.Module:
    # low_cpu_mem_usage: the adapter is not initialised before it is filled, which is peft's fastest way.
    return peft.PeftModel.from_pretrained(model, str(directory), is_trainable=True, low_cpu_mem_usage=True)


def _measure(key: str, title: str, candidates: dict, settings: Settings) -> Measure:
    samples = interleave(candidates, **settings.timing(ROUNDS, warmup=2))
    return Measure(
        key=key,
        title=title,
        unit="s",
        values=samples.medians(),
        ratios={"ours / peft": samples.ratio("ours", "peft")},
        setting={"r": R, "rounds": samples.rounds},
    )
