"""One merge over a checkpoint's files, in a process that does nothing else; `merging.py` starts it.

    python -m bench.streaming ours BASE ADAPTER OUTPUT

Prints {"seconds": ..., "peak": bytes}: of the merge, files read and written, and the most memory that the process held,
less what it held before any library was there. peft loads the base with transformers, merges and saves it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from lora_core.cli.command_line import Parser


def parser() -> Parser:
    """The command line; `merging.py` writes it."""
    p = Parser(prog="python -m bench.streaming", description=__doc__)
    p.add_argument("candidate", choices=CANDIDATES)
    for name in ("base", "adapter", "output"):
        p.add_argument(name, metavar=name.upper(), help="a directory")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    before = _status("VmRSS")
    merge = CANDIDATES[given.candidate](given.base, given.adapter, given.output)
    start = time.perf_counter()
    merge()
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": _status("VmHWM") - before}))
    return 0


def _ours(base: str, adapter: str, output: str):
    from lora_core.cpu.heap import keep_freed_memory
    from lora_core.deploy.stream import merge_checkpoint

    keep_freed_memory()  # as the command does
    return lambda: merge_checkpoint(base, [adapter], output)


def _peft(base: str, adapter: str, output: str):
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def merge() -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)

    return merge


CANDIDATES = {"ours": _ours, "peft": _peft}


def _status(field: str) -> int:
    """A size from Linux's record of this process, in bytes; 0 elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    sys.exit(main())
