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
from collections.abc import Sequence

from lora_core.cli.command_line import Parser

from .quiet import quieten

STEPS = 3


def parser() -> Parser:
    """The command line; `memory.py` writes it."""
    p = Parser(prog="python -m bench.peak", description=__doc__)
    p.add_argument("candidate", help="one of models.py's: frozen, full, ours, peft")
    p.add_argument("quantize", type=int, choices=(0, 1), help="whether the base lies in NF4")
    p.add_argument("batch", type=int, help="sentences in a step")
    p.add_argument("length", type=int, help="tokens of each")
    p.add_argument("device", choices=("cpu", "cuda"))
    p.add_argument("threads", type=int, help="of torch")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    quieten()  # before the libraries are there
    import torch

    from .models import classifier, packaged, tokens
    from .training import Step

    torch.set_num_threads(given.threads)
    model = classifier(given.candidate, quantize=bool(given.quantize), device=given.device)
    step = Step(model, [tokens(given.batch, given.length, given.device)])
    packaged.cache_clear()  # the copy that `classifier` copied
    gc.collect()
    on_gpu = given.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else status("VmRSS") or high_water()
    # Loading a model may take more than a step does: the high-water mark starts again from here.
    torch.cuda.reset_peak_memory_stats() if on_gpu else forget_peak()
    for _ in range(STEPS):
        step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM") or high_water()
    print(json.dumps({"before": before, "peak": peak}))
    return 0


def forget_peak() -> None:
    """Sets the process's high-water mark to what it holds now, where that is allowed."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def status(field: str) -> int | None:
    """A size from Linux's record of this process, in bytes; None elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None


def high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
