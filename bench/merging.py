"""How long does it take to fold an adapter into the base for good, against peft?

    python -m bench merging

On a model of DistilBERT's size, float32, and on layers of Llama 7B's shape, bfloat16; r=16 on the four attention
projections, random A and B. Each call gets a fresh copy of the adapted model, made off the clock. Ours sums in float32
and checks that every merged weight is finite; peft's default, which is its fastest, does not check.

And over files: a 1.1B-parameter Llama of random bfloat16 weights in five shards, with r=16 on every linear layer, each merge in
a process of its own, from files to files. Copying the files is the yardstick.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core import LoraConfig, inject, merge_and_unload

from .checkpoints import LLAMA_1B, LLAMA_TINY as TINY_FILES, adapter, copy_files, llama as llama_files
from .measure import Measure, Ratio
from .models import LLAMA_7B, LLAMA_TINY, R, distilbert, llama
from .peers import adapt_with_peft, agreed, randomize, relative_difference
from .settings import Settings
from .timing import Candidate, interleave

DISTILBERT_PROJECTIONS = ("q_lin", "k_lin", "v_lin", "out_lin")
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUNDS = 15
FILE_ROUNDS = 3
ROOT = Path(__file__).parents[1]


def run(settings: Settings) -> Iterator[Measure]:
    def small() -> nn.Module:
        return distilbert(settings.quick).to(settings.device)

    def large() -> nn.Module:
        shape = LLAMA_TINY if settings.quick else LLAMA_7B | {"num_hidden_layers": 2, "vocab_size": 1000}
        return llama(shape, settings.device)

    yield merge("merge-distilbert", "merge_and_unload, DistilBERT-sized", small, DISTILBERT_PROJECTIONS, settings)
    yield merge("merge-7b", "merge_and_unload, two layers of 7B shape, bfloat16", large, LLAMA_PROJECTIONS, settings)
    yield from over_files(settings)


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


def over_files(settings: Settings) -> Iterator[Measure]:
    """Seconds and peak memory from a base's files to merged ones: ours by streaming, peft by way of the model."""
    shape, rounds = (TINY_FILES, 1) if settings.quick else (LLAMA_1B, FILE_ROUNDS)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peft": []}
    copies = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        base, update = llama_files(root / "base", shape, shards=5), adapter(root / "adapter", shape, r=R)
        for i in range(rounds):
            start = time.perf_counter()
            copy_files(base, root / "copy")
            copies.append(time.perf_counter() - start)
            for name in found if i % 2 else reversed(found):
                found[name].append(_in_a_process(name, base, update, root / name))
            for path in ("copy", *found):
                for file in (root / path).iterdir():
                    file.unlink()
                (root / path).rmdir()
    title = f"from files to files, {'tiny' if settings.quick else '1.1B'} Llama, bfloat16"
    setting = {"r": R, "layers": "all linear", "shards": 5, "rounds": rounds, "threads": torch.get_num_threads()}
    for key, unit, what in (("seconds", "s", "merge"), ("peak", "bytes", "peak memory of a merge")):
        values = {name: statistics.median(run[key] for run in runs) for name, runs in found.items()}
        ratios = {"ours / peft": Ratio(values["ours"] / values["peft"])}
        if key == "seconds":
            values["copy"] = statistics.median(copies)
            ratios["ours / copy"] = Ratio(values["ours"] / values["copy"])
        yield Measure(f"merge-files-{key}", f"{what} {title}", unit, values, ratios, setting)


def _in_a_process(name: str, *paths: Path) -> dict[str, float]:
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    argv = [sys.executable, "-m", "bench.streaming", name, *map(str, paths)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=threads)
    if done.returncode:
        raise RuntimeError(f"bench.streaming {name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
