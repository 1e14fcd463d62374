"""The peak of one candidate's training steps, in a process that does nothing else; `memory.py` starts it.

    python -m bench.peak ours 0 32 128 cpu 2        candidate, quantised or not, batch, length, device, threads

Prints {"before": bytes, "peak": bytes}: held before the first step, and at most during the steps. On the CPU this is the
resident size of the process, libraries included; on CUDA what torch has allocated.
"""

from __future__ import annotations

import gc
import json
import resource
import sys

import torch

from .quiet import quieten

STEPS = 3


def main(candidate: str, quantize: str, batch: str, length: str, device: str, threads: str) -> None:
    quieten()  # before the libraries are there
    from .models import classifier, packaged, tokens
    from .training import Step

    torch.set_num_threads(int(threads))
    model = classifier(candidate, quantize=bool(int(quantize)), device=device)
    step = Step(model, [tokens(int(batch), int(length), device)])
    packaged.cache_clear()  # the copy that `classifier` copied
    gc.collect()
    before = _now(device)
    _forget_peak(device)
    for _ in range(STEPS):
        step()
    print(json.dumps({"before": before, "peak": _peak(device)}))


def _now(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS") or _high_water()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM") or _high_water()


def _forget_peak(device: str) -> None:
    """Loading a model may take more than a step does: the high-water mark starts again from here, where that is allowed."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def _status(field: str) -> int | None:
    """A size from Linux's record of this process, in bytes; None elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None


def _high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
