"""One dropout mask for the layers that read one tensor (query, key and value; gate and up): see `share_dropout_masks`.

By default each layer draws a mask of its own, as in the paper and in PEFT. Sharing saves the drawing, as the merged projections
of loralib do: each layer still drops every element with probability p, independently of all others, but siblings drop the same.

Who shares is decided narrowly. The layers are children of one module, and read the very same tensor in one forward of that
module, each once, with the same p; nothing was drawn from torch's generator in between, and no checkpoint lies between the
module and the layer: what is recomputed alone must find its mask in the generator, as it did at first. A reentrant checkpoint
inside of another leaves no mark in torch's state, so their frames are counted on Python's stack. Only the mask is shared: each
layer multiplies the values that it reads.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .dropout import KeepMask, default_generator, draw_keep_mask, same_keep_mask


@dataclass
class _Forward:
    """A forward of the parent that is under way in one thread.

    Attributes:
        depth: checkpoints that it is in.
        x: a weak reference to the tensor that was read last.
        alike: p and the tensor's version, which must be alike to share its mask.
        generator: the state that its mask left torch's generator in.
        readers: ids of the layers that have read it.
        mask: what they got.
    """

    depth: int
    x: Callable[[], Tensor | None] = lambda: None
    alike: tuple = ()
    generator: Tensor | None = None
    readers: set[int] = field(default_factory=set)
    mask: KeepMask | None = None


class MaskGroup:
    """Sibling layers that share masks, and the hooks on their parent that tell when its forward is under way."""

    def __init__(self, parent: nn.Module, layers: list[nn.Module]) -> None:
        self.layers = list(layers)
        self.forwards = _Forwards()
        self.handles: list[RemovableHandle] = [
            parent.register_forward_pre_hook(self.open),
            parent.register_forward_hook(self.close, always_call=True),
        ]

    def open(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.forwards[get_ident()] = _Forward(_checkpoints())

    def close(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.forwards.pop(get_ident(), None)

    def leave(self, layer: nn.Module) -> None:
        """Takes a layer out; one alone shares with nobody, so the hooks go with the last but one."""
        self.layers = [other for other in self.layers if other is not layer]
        if len(self.layers) < 2:
            for handle in self.handles:
                handle.remove()

    def draw(self, layer: nn.Module, x: Tensor, p: float) -> KeepMask:
        """A mask for x, (..., d_in), as rows: that of the sibling before, if all of the above holds."""
        shape, forward = (x.numel() // x.shape[-1], x.shape[-1]), self.forwards.get(get_ident())
        if forward is None or x.is_inference() or _checkpoints() != forward.depth:
            return draw_keep_mask(shape, p, x.device)
        generator = default_generator(x.device)
        alike = (p, x._version)
        again = forward.x() is x and forward.alike == alike and id(layer) not in forward.readers
        if not again or not torch.equal(generator.get_state(), forward.generator):
            forward.mask, forward.readers = draw_keep_mask(shape, p, x.device), set()
            forward.x, forward.alike, forward.generator = weakref.ref(x), alike, generator.get_state()
        forward.readers.add(id(layer))
        return forward.mask


class _Forwards(dict):
    """{thread: its forward}; a copy of it, and so of the model, has none."""

    def __reduce__(self) -> tuple:
        return _Forwards, ()


# --- checkpoints --------------------------------------------------------------------------------------------------------

_is_checkpoint: dict[str, bool] = {}


def _checkpoints() -> int:
    """How many functions of torch's, or another library's, module of checkpoints are being run by this thread."""
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _is_checkpoint:
            _is_checkpoint[file] = os.path.basename(file).startswith("checkpoint")
        count += _is_checkpoint[file]
        frame = frame.f_back
    return count


# --- in the backward ----------------------------------------------------------------------------------------------------


def same_shared_mask(source: Tensor, shape: tuple[int, int], p: float, device: torch.device) -> Tensor:
    """`same_keep_mask`, made once for the layers that share a mask, whose backwards follow on one another in one thread."""
    if device.type != "cpu":  # made in one call, for less than it takes to find it
        return same_keep_mask(source, shape, p, device)
    last = _remade.get(get_ident())
    if last is None or last[0]() is not source:
        thread = get_ident()

        def forget(reference: weakref.ref) -> None:
            if _remade.get(thread, (None,))[0] is reference:
                del _remade[thread]

        _remade[thread] = last = (weakref.ref(source, forget), same_keep_mask(source, shape, p, device))
    return last[1]


_remade: dict[int, tuple[weakref.ref, Tensor]] = {}
