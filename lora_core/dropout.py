"""Dropout masks that cost little on a CPU, and `nn.Dropout` made of them.

    use_fast_dropout(model)      # the model's own nn.Dropout layers, in place: same meaning, a tenth of the time

Each element compares one random byte with a threshold, and eight bytes are drawn at a time, where `F.dropout` draws a
double for each element. So the probability is rounded to a multiple of 1/256 (0.1 to 26/256), and the rescaling uses the
rounded value. On a CPU torch's generator gives each mask a seed, from which numpy's PCG64DXSM makes the bytes, in less time
than torch would draw them; for the backward the seed is kept and the mask made again. So masks are reproducible under
torch's seed, and the same under gradient checkpointing.

LoRA layers that read the very same tensor one after another (query, key and value; gate and up) share its mask, as the merged
projections of loralib do: each still drops every element with probability p, independently of all others.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor, nn

from .errors import SecondDerivativeError


def first_derivative_only(backward: Callable) -> Callable:
    """Marks the backward of an autograd function that is not differentiable itself.

    torch's `once_differentiable` notices a second derivative only where the incoming gradient requires one, and is
    silently wrong where that is a constant; this refuses as soon as a graph of the backward is asked for.
    """

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise SecondDerivativeError(
                "LoRA layers and fast dropout have no second derivative; call backward() or grad() without create_graph"
            )
        return backward(ctx, *gradients)

    return checked


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element of x, (...), with probability p and scales the others by 1 / (1 - p); p rounded to n / 256."""
    if not p or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


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
        return _masked(dy, same_keep_mask(source, ctx.shape, ctx.p), ctx.scale), None


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


def use_fast_dropout(model: nn.Module) -> int:
    """Makes every `nn.Dropout` of `model` a `FastDropout`, in place; returns how many there were."""
    layers = [m for m in model.modules() if type(m) is nn.Dropout]
    for layer in layers:
        layer.__class__ = FastDropout
    return len(layers)


def draw_keep_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float, Tensor]:
    """A fresh dropout mask: uint8 of `shape`, 1 (keep) or 0 (drop); the probability of a 1; and what to keep of it.

    `p` is rounded to a multiple of 1/256, but not up to 1. `same_keep_mask` gives the mask again for what is kept: on a CPU
    a seed, (4,), int64; elsewhere the mask itself.
    """
    kept = 1 - _threshold(p) / 256
    if device.type == "cpu":
        seed = torch.empty(4, dtype=torch.int64).random_(-(2**63), None)
        return same_keep_mask(seed, shape, p), kept, seed
    # Without the bounds random_() leaves the sign bit of an int64 zero, and every eighth byte would be below 128.
    words = torch.empty((shape.numel() + 7) // 8, dtype=torch.int64, device=device).random_(-(2**63), None)
    drawn = words.view(torch.uint8)[: shape.numel()].view(shape)
    keep = torch.ge(drawn, _threshold(p), out=drawn)
    return keep, kept, keep


def same_keep_mask(source: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """The mask that `draw_keep_mask` gave for this shape and p with `source`."""
    if source.device.type != "cpu":
        return source
    size = math.prod(shape)
    drawn = np.random.PCG64DXSM(_Seed(source)).random_raw((size + 7) // 8).view(np.uint8)[:size]
    np.greater_equal(drawn, _threshold(p), out=drawn.view(np.bool_))  # here, where the bytes are in the core's cache
    return torch.from_numpy(drawn.reshape(shape))


class Dropped(NamedTuple):
    """A dropped-out input that is not rescaled yet.

    Attributes:
        x: keep * x, (T, d_in).
        p: probability of a zero, as it was asked for.
        kept: the probability of a one in the mask, by which x is to be divided.
        source: from which `same_keep_mask` makes the mask again.
    """

    x: Tensor
    p: float
    kept: float
    source: Tensor


def dropped_for(x: Tensor, p: float, dtype: torch.dtype, reader: int) -> Dropped:
    """x, (..., d_in), dropped out, as rows in `dtype`: by the mask of the layer before, if that read this very tensor.

    A layer that reads x again, in another pass, gets a fresh mask. So does one on the other side of a checkpoint's border:
    what is recomputed alone must find its mask in the generator.

    Args:
        x: the input.
        p: as for `draw_keep_mask`.
        dtype: that of the result.
        reader: what tells the layer from others.
    """
    last, now = _reading.last, _circumstances(x, p, dtype)
    if last and last.x() is x and last.circumstances == now and reader not in last.readers:
        last.readers.add(reader)
        return last.dropped
    x2 = x.detach().reshape(-1, x.shape[-1])  # T d_in
    keep, kept, source = draw_keep_mask(x2.shape, p, x.device)
    dropped = Dropped(keep.to(dtype).mul_(x2), p, kept, source)
    _reading.last = _Reading(_forgetting(x, _reading), now, {reader}, dropped)
    return dropped


def same_keep_mask_for(source: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """`same_keep_mask`, made once for the layers that read one tensor, whose backwards follow on one another."""
    if source.device.type != "cpu":  # the mask itself: remembered, it would not go
        return source
    last = _remade.last
    if last is None or last[0]() is not source:
        _remade.last = last = (_forgetting(source, _remade), same_keep_mask(source, shape, p))
    return last[1]


class _Reading(NamedTuple):
    """The tensor that was read last: a weak reference to it, its `_circumstances`, the readers so far, and what they got."""

    x: Callable[[], Tensor | None]
    circumstances: tuple
    readers: set[int]
    dropped: Dropped


class _Last(threading.local):
    last: Any = None


_reading, _remade = _Last(), _Last()


def _forgetting(tensor: Tensor, memory: _Last) -> weakref.ref:
    """A weak reference to `tensor` that empties this thread's `memory` when the tensor goes, if that still is about it."""
    slot = vars(memory)  # this thread's, whichever drops the tensor

    def forget(reference: weakref.ref) -> None:
        if slot.get("last") and slot["last"][0] is reference:
            slot["last"] = None

    return weakref.ref(tensor, forget)


def _circumstances(x: Tensor, p: float, dtype: torch.dtype) -> tuple:
    """What must be alike for two layers that read x to share its mask; never alike where that can't be known.

    The version of x, and what tells the inside of a checkpoint from the outside: a reentrant one switches gradients off, the
    other has hooks for the tensors saved inside, by which torch recognises them.
    """
    if x.is_inference() or _saved_tensors_hooks is None:
        return (object(),)
    hooks = _saved_tensors_hooks(True)
    return (p, dtype, x._version, torch.is_grad_enabled(), hooks and _reference(hooks[0]))


def _reference(hook: Callable) -> Any:
    """Something equal for the same hook only, which does not keep it: it may hold x."""
    try:
        return weakref.ref(hook)
    except TypeError:
        return object()


#: The innermost hooks on saved tensors; torch has no public way to ask for them. Without it nothing is shared.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Seed(ISeedSequence):
    """Torch's random words as the state that a generator of numpy starts from: they need no stirring, which takes longer."""

    def __init__(self, words: Tensor) -> None:
        self.words = words.numpy().view(np.uint64)

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return self.words[:n_words]


def _threshold(p: float) -> int:
    return min(round(p * 256), 255)
