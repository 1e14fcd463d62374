"""How much memory do adapters take: kept for the backward, and at the peak of a whole step?

    python -m bench memory

Kept for the backward: MiniLM runs forward on 32 x 32 tokens, and every tensor that autograd saves is counted by the
storage behind it, each storage once, the model's own parameters and buffers left out. What the frozen base keeps is
subtracted (it is the same for all candidates): what is left is what the adapters add.

The peak: three steps on 32 x 128 tokens, each candidate in a process of its own (`peak.py`); and a QLoRA job on SmolLM2, if it
is installed (`peak_tuning.py`), beside what its own arithmetic says that it must hold. That of a whole experiment: `job.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from experiments.errors import ExperimentError
from experiments.packaged_lm import directory

from .measure import Measure, Ratio
from .models import ALL_LINEAR, ATTENTION, DROPOUT, R, classification_loss, classifier, tokens
from .peak_tuning import CANDIDATES
from .settings import Settings

ROOT = Path(__file__).parents[1]
KEPT = {
    "saved-attention": ("Kept for the backward by adapters on q, k, v, out", ATTENTION),
    "saved-all-linear": ("Kept for the backward by adapters on all linear layers", ALL_LINEAR),
}


def run(settings: Settings) -> Iterator[Measure]:
    for key in KEPT:
        yield kept(key, settings)
    for quantize in (False,) if settings.quick else (False, True):
        yield peak(quantize, settings)
    if settings.device == "cpu":
        yield from peaks_of_tuning(settings)


def kept(key: str, settings: Settings) -> Measure:
    title, targets = KEPT[key]
    size = (2, 8) if settings.quick else (32, 32)
    batch = tokens(*size, settings.device)
    totals = {}
    for name in ("frozen", "ours", "peft"):
        model = classifier(name, targets, device=settings.device)
        totals[name] = saved_bytes(model, lambda model=model: classification_loss(model, batch))
    added = {name: totals[name] - totals["frozen"] for name in ("ours", "peft")}
    return Measure(
        key=key,
        title=f"{title}, {size[0]} x {size[1]} tokens",
        unit="bytes",
        values=added,
        ratios={"ours / peft": Ratio(added["ours"] / added["peft"])},
        setting={"model": "MiniLM", "r": R, "dropout": DROPOUT, "dtype": "float32", "frozen": totals["frozen"]},
    )


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps after `forward`; those of the model itself are not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept to the end: what it holds can't be freed, so no address comes twice
    total = sum(size for pointer, size in storages.items() if pointer not in own)
    del result
    return total


def peak(quantize: bool, settings: Settings) -> Measure:
    """The peak of training steps: the whole process, and beyond what it held before the first step."""
    candidates = ("ours", "peft") if quantize or settings.quick else ("frozen", "full", "ours", "peft")
    size = (2, 8) if settings.quick else (32, 128)
    shared = (str(int(quantize)), *map(str, size), settings.device, str(torch.get_num_threads()))
    with ThreadPoolExecutor(max_workers=2) as pool:  # what each of them holds does not depend on the others
        found = dict(zip(candidates, pool.map(lambda name: _in_a_process("peak", name, *shared), candidates), strict=True))
    method = "QLoRA" if quantize else "LoRA"
    return Measure(
        key=f"peak-{method.lower()}",
        title=f"Peak of a MiniLM training step, {method}, {size[0]} x {size[1]} tokens",
        unit="bytes",
        values={name: values["peak"] for name, values in found.items()},
        ratios={"ours / peft": Ratio(found["ours"]["peak"] / found["peft"]["peak"])},
        setting={
            "model": "MiniLM",
            "r": R,
            "dropout": DROPOUT,
            "of the step alone": {name: values["peak"] - values["before"] for name, values in found.items()},
        },
    )


def peaks_of_tuning(settings: Settings) -> Iterator[Measure]:
    """The peak of a QLoRA job on SmolLM2, in each precision; nothing, and a line that says so, where it is not installed."""
    try:
        directory()  # unpacks it before two processes want it
    except ExperimentError as missing:
        print(f"the peak of the QLoRA job on SmolLM2 is not measured: {missing}")
        return
    for precision in ("fp32",) if settings.quick else ("fp32", "bf16"):
        yield peak_of_tuning(precision, settings)


def peak_of_tuning(precision: str, settings: Settings) -> Measure:
    """The peak of the whole process; of what ours holds beyond its libraries, how much its arithmetic explains."""
    batch, steps = (2, 1) if settings.quick else (8, 8)
    threads = max(1, torch.get_num_threads() // 2)  # two at a time share the cores
    shared = (precision, str(batch), str(steps), str(threads))
    names = CANDIDATES[:2] if settings.quick else CANDIDATES
    with ThreadPoolExecutor(max_workers=2) as pool:
        run = pool.map(lambda name: _in_a_process("peak_tuning", name, *shared), names)
        found = dict(zip(names, run, strict=True))
    ours, parts = found["ours"], found["ours"]["parts"]
    held, most = ours["peak"] - ours["libraries"], {name: max(v["loading"], v["peak"]) for name, v in found.items()}
    return Measure(
        key=f"peak-llm-qlora-{precision}",
        title=f"Peak of a QLoRA job on SmolLM2, {precision}, {batch} rows in a step",
        unit="bytes",
        values=most,
        ratios={f"ours / {name}": Ratio(most["ours"] / value) for name, value in most.items() if name != "ours"},
        setting={
            "r": R,
            "dropout": 0.05,
            "steps": steps,
            **{part: {name: values[part] for name, values in found.items()} for part in ("libraries", "loading", "peak")},
            "parts": parts,
            "beyond the libraries": held,
            "beyond the parts": held - sum(parts.values()),
        },
    )


def _in_a_process(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", f"bench.{module}", *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        command = f"bench.{module} {' '.join(arguments)}"
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
