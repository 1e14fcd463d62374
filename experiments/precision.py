"""Which precision a run computes in: float32, or bfloat16 where the machine multiplies that faster.

Under bfloat16 the products of the base and of the adapter are computed in it, by autocast; norms, losses and what is added up
along the layers are float32, and so are A, B, heads and the optimiser's state. On a GPU that has it bfloat16 always pays. On a
CPU it does where there are instructions for it (AVX512-BF16, AMX): "auto" looks what a product takes, once a process.

Autocast casts a frozen weight anew for each product. Held in bfloat16 it takes half the memory, and no bit of a result changes.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.bases import is_packed
from lora_core.cpu.heap import keep_few_shapes
from lora_core.cpu.products import FastLinear, product
from lora_core.layers.linear import LinearLayer

from .errors import ExperimentError
from .methods import BF16, FP32, PRECISIONS
from .parallel import Processes

#: How much faster a product must be. With AVX512-BF16 it was 1.9 times on one core of an EPYC, beside oneDNN's float32.
WORTH = 1.5


def choose_precision(wanted: str, device: str) -> str:
    """The one that is asked for, "fp32" or "bf16"; for "auto", the faster one.

    Raises:
        ExperimentError: bfloat16 is asked for on a GPU that does not have it.
    """
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        if wanted == BF16:
            raise ExperimentError("precision: bf16 was asked for, and this GPU does not have it; pass fp32 or auto")
        return FP32
    if wanted == "auto":
        return BF16 if device == "cuda" or speed_of_bf16() > WORTH else FP32
    return wanted


def choose_together(wanted: str, device: str, processes: Processes) -> str:
    """What `choose_precision` says on process 0, for all of them: each might measure something else. They must have met."""
    return PRECISIONS[processes.first_decides(lambda: PRECISIONS.index(choose_precision(wanted, device)))]


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


def autocast(precision: str, device: str) -> torch.autocast:
    """The context in which a model computes as a run of this precision does."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == BF16)


def cast_frozen(model: nn.Module, keep: Sequence[str]) -> tuple[str, ...]:
    """Holds in bfloat16, in place, what autocast would cast to it in every product; returns the paths of these layers.

    That is the weights of dense linear layers. Left in float32: the modules in `keep`, but for a language model's head; what is
    trained; what several modules share; and what DoRA takes its norms of. A language model's head that shares the embedding's
    weight gets one of its own.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    head, cast = getattr(model, "get_output_embeddings", lambda: None)(), []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        kept = module is not head and any(path == name or path.startswith(f"{name}.") for name in keep)
        if kept or not _only_multiplies(module) or weight.requires_grad or weight.dtype != torch.float32:
            continue
        if owners[id(weight)] == 1:
            weight.data = weight.data.to(torch.bfloat16)
        elif module is head and not isinstance(module, LinearLayer):
            module.weight = nn.Parameter(weight.data.to(torch.bfloat16), requires_grad=False)
        else:
            continue
        cast.append(path)
    return tuple(cast)


def _only_multiplies(module: nn.Module) -> bool:
    """Whether all that is done with the dense weight of a module is one product, which autocast computes."""
    if is_packed(module) or "weight" not in module._parameters:
        return False
    if isinstance(module, LinearLayer):
        return all(method.is_product for method in module.lora_method.values())
    return type(module).forward in (nn.Linear.forward, FastLinear.forward, Conv1D.forward)


def restore_frozen(model: nn.Module, cast: Sequence[str], fresh: nn.Module) -> None:
    """Gives the layers that `cast_frozen` named their weights in float32 again: those of `fresh`, the base loaded anew.

    Raises:
        ExperimentError: they are not what was cast.
    """
    first: dict[int, str] = {}  # of the layers that share a weight
    for path, module in fresh.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            first.setdefault(id(weight), path)
    for path in cast:
        module, whole = model.get_submodule(path), fresh.get_submodule(path).weight
        held = module.weight.data
        if not torch.equal(whole.data.to(held), held):
            raise ExperimentError(f"model: {path!r} has other weights than when the run began; its files have changed since")
        if (owner := first[id(whole)]) == path:
            module.weight.data = whole.data.to(held.device)
        else:
            module.weight = model.get_submodule(owner).weight
