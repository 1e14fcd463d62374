"""Which precision a run computes in: float32, or bfloat16 where the machine multiplies that faster.

Under bfloat16 the products of the base and of the adapter are computed in it, by autocast; norms, losses and what is added up
along the layers are float32, and so are A, B, heads and the optimiser's state. On a GPU that has it bfloat16 always pays. On a
CPU it does where there are instructions for it (AVX512-BF16, AMX): "auto" looks what a product takes, once a process.
"""

from __future__ import annotations

import functools
import time

import torch

from lora_core.cpu.heap import keep_few_shapes
from lora_core.cpu.products import product

from .errors import ExperimentError

#: How much faster a product must be. With AVX512-BF16 it was 1.9 times on one core of an EPYC, beside oneDNN's float32.
WORTH = 1.5


def choose_precision(wanted: str, device: str) -> str:
    """The one that is asked for, "fp32" or "bf16"; for "auto", the faster one.

    Raises:
        ExperimentError: bfloat16 is asked for on a GPU that does not have it.
    """
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        if wanted == "bf16":
            raise ExperimentError("precision: bf16 was asked for, and this GPU does not have it; pass fp32 or auto")
        return "fp32"
    if wanted == "auto":
        return "bf16" if device == "cuda" or speed_of_bf16() > WORTH else "fp32"
    return wanted


@functools.cache
def speed_of_bf16() -> float:
    """How many products of 64 x 768 x 768 one core makes in bfloat16 in the time of one in float32."""
    keep_few_shapes()  # these are the first products of a run, and oneDNN looks only once how many it is to keep
    x, W = torch.ones(64, 768, device="cpu"), torch.ones(768, 768, device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another where something else runs too
    try:
        seconds = {dtype: _seconds(x.to(dtype), W.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _seconds(x: torch.Tensor, W: torch.Tensor) -> float:
    """The shortest of some calls: what else runs only ever makes one longer."""
    taken = []
    for _ in range(32):
        start = time.perf_counter()
        product(x, W)
        taken.append(time.perf_counter() - start)
    return min(taken)
