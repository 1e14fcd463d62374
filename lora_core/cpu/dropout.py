"""Dropout masks that cost little on a CPU, and `nn.Dropout` made of them.

    use_fast_dropout(model)      # the model's own nn.Dropout layers, in place: same meaning, a tenth of the time

Each element compares random bits with a threshold, where `F.dropout` draws a double for each. Eight bits are enough for most
probabilities; they round 0.1 to 26/256, and the rescaling uses the rounded value. Where they would change the chance of a zero,
or of a one, by more than a 32nd of it (0.01 would become 0.0117, and 0.001 nothing), 16 or 32 bits are compared. On a CPU
torch's generator gives each mask a seed, from which numpy's PCG64DXSM makes the bits, in less time than torch would draw them;
for the backward the seed is kept and the mask made again. So masks are reproducible under torch's seed, and the same under
gradient checkpointing. On other devices torch draws the mask; on CUDA it is made again from the generator's state. In a graph
of torch.compile's one operator makes the mask, which is then kept for the backward.

Each LoRA layer draws a mask of its own; `share_dropout_masks` (`masks.py`) says when some may share one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor, nn

from ..errors import StateError
from .traced import is_compiled, is_traced


def first_derivative_only(backward: Callable) -> Callable:
    """Marks the backward of an autograd function that is not differentiable itself.

    torch's `once_differentiable` notices a second derivative only where the incoming gradient requires one, and is
    silently wrong where that is a constant; this refuses as soon as a graph of the backward is asked for.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise StateError(
                "LoRA layers and fast dropout have no second derivative here; call backward() or grad() without create_graph, "
                "or take it with torch.func"
            )
        return backward(ctx, *gradients)

    return checked


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element of x, (...), with probability p and scales the others by 1 / (1 - p); p is rounded as above."""
    if not p or is_traced():
        return plain_dropout(x, p)
    return _Dropout.apply(x, p)


def plain_dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout` in plain operations, and with a mask as above where torch.compile makes a graph for a CPU.

    There `F.dropout` becomes a random number for each element, which takes longer than the product by A. Not for a transform of
    torch.func, which would make each sample's mask by itself, nor for kinds of tensors that split one, such as DTensor.
    """
    ours = p and is_compiled() and type(x) is Tensor and x.device.type == "cpu"
    if not ours or torch._C._are_functorch_transforms_active():
        return F.dropout(x, p)
    seed = torch.randint(2**63 - 1, (4,), device="cpu")
    bits, threshold = rounded.__wrapped__(p)  # a compiler warns of a cache
    return x * keep_mask(seed, x.shape, p) * (1 / (1 - threshold / 2**bits))


@torch.library.custom_op("lora_core::keep_mask", mutates_args=(), schema="(Tensor seed, SymInt[] shape, float p) -> Tensor")
def keep_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """`same_keep_mask` on a CPU, as an operator that a compiler calls and does not look into."""
    return same_keep_mask(seed, shape, p, seed.device)


@keep_mask.register_fake
def _(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    return seed.new_empty(shape, dtype=torch.uint8)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep, kept, source = draw_keep_mask(x.shape, p, x.device)
        ctx.save_for_backward(source)
        ctx.shape, ctx.p, ctx.scale = x.shape, p, 1 / kept
        return _masked(x, keep, ctx.scale)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        (source,) = ctx.saved_tensors
        return _masked(dy, same_keep_mask(source, ctx.shape, ctx.p, dy.device), ctx.scale), None


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """scale * keep * x, a new tensor: what the mask becomes, in one pass over it and x."""
    mask = keep.to(x.dtype)
    return torch.addcmul(mask.new_zeros(()), mask, x, value=scale, out=mask)


class FastDropout(nn.Dropout):
    """`nn.Dropout` with the mask of this file. On a GPU, whose own dropout is one kernel, it is `nn.Dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.inplace or not self.training or self.p == 1:
            return super().forward(x)
        return dropout(x, self.p)


class KeepMask(NamedTuple):
    """A dropout mask.

    Attributes:
        keep: uint8, 1 (keep) or 0 (drop).
        kept: the probability of a 1.
        source: from which `same_keep_mask` makes it again: on a CPU a seed, (4,), int64; on CUDA the state of a generator;
            elsewhere, and in a graph of CUDA's that is being captured, the mask itself.
    """

    keep: Tensor
    kept: float
    source: Tensor


def draw_keep_mask(shape: tuple[int, ...], p: float, device: torch.device) -> KeepMask:
    """A fresh mask of `shape` for the probability p of a zero, which on a CPU is rounded as above, but not up to 1."""
    if device.type == "cpu":
        seed = torch.empty(4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
        bits, threshold = rounded(p)
        return KeepMask(same_keep_mask(seed, shape, p, device), 1 - threshold / 2**bits, seed)
    known = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    state = default_generator(device).get_state() if known else None
    keep = torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(1 - p)
    return KeepMask(keep, 1 - p, keep if state is None else state)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on a CPU or a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def same_keep_mask(source: Tensor, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """The mask that `draw_keep_mask` gave for this shape, p and device with `source`."""
    if source.device.type != "cpu":
        return source
    if device.type != "cpu":
        generator = torch.Generator(device)
        generator.set_state(source)
        return torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(1 - p, generator=generator)
    size, (bits, threshold) = math.prod(shape), rounded(p)
    words = np.random.PCG64DXSM(_Seed(source)).random_raw(-(-size * bits // 64))
    drawn = words.view(np.dtype(f"u{bits // 8}"))[:size]
    keep = drawn.view(np.bool_) if bits == 8 else np.empty(size, np.bool_)
    np.greater_equal(drawn, threshold, out=keep)  # of 8 bits in place, where they are in the core's cache
    return torch.from_numpy(keep.view(np.uint8).reshape(shape))


@functools.cache
def rounded(p: float) -> tuple[int, int]:
    """(b, t): a zero where b random bits are below t, so with probability t / 2^b, near enough to p."""
    for bits in (8, 16, 32):
        threshold = min(round(p * 2**bits), 2**bits - 1)
        if abs(threshold / 2**bits - p) <= min(p, 1 - p) / 32:
            break
    return bits, max(threshold, 1)


class _Seed(ISeedSequence):
    """Torch's random words as the state that a generator of numpy starts from: they need no stirring, which takes longer."""

    def __init__(self, words: Tensor) -> None:
        self.words = words.numpy().view(np.uint64)

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return self.words[:n_words]
