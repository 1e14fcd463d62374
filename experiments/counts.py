"""Closed forms: how many parameters a method trains on an encoder, and what a base weighs, from its sizes alone.

    adapters    layers * sum over targets of r (d_in + d_out)         and d_out more for DoRA's magnitudes
    NF4 weight  n / 2 bytes, n / 64 scales of a byte, a float32 for each 256 of them (rounded up) and one for their offset

Nothing here looks at a model: what a run has counted is held against it (`expected.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lora_core.spec.config import ALL_LINEAR

from .methods import BF16
from .models import PROJECTIONS

LABELS = 2
BLOCK, SCALES = 64, 256  # NF4's values to a scale, and scales to a scale of their own


@dataclass(frozen=True)
class Architecture:
    """The sizes of a BERT, a DistilBERT or an MPNet, as in its config.json. A BERT has segments and a pooler, the others
    neither, but a dense layer before their classifier. An MPNet has a bias for each of `buckets` and `heads`."""

    model_type: str
    layers: int
    width: int
    feed_forward: int
    vocabulary: int
    positions: int
    segments: int = 0
    buckets: int = 0
    heads: int = 0

    @property
    def linear(self) -> list[tuple[int, int, int]]:
        """(how many, d_in, d_out) of the linear layers below the head: those that NF4 takes."""
        w, ff, n = self.width, self.feed_forward, self.layers
        pooler = [(1, w, w)] if self.model_type == "bert" else []
        return [(4 * n, w, w), (n, w, ff), (n, ff, w), *pooler]

    @property
    def head(self) -> int:
        """Parameters of the classification head."""
        before = 0 if self.model_type == "bert" else self.width**2 + self.width
        return before + self.width * LABELS + LABELS

    @property
    def biases(self) -> int:
        """Biases below the head, those of the layer norms (one after the embeddings, two a layer) included."""
        return sum(n * d_out for n, _, d_out in self.linear) + self.width * (1 + 2 * self.layers)

    @property
    def body(self) -> int:
        """Parameters below the head: embeddings, weights, biases, and the norms' scales."""
        embeddings = (self.vocabulary + self.positions + self.segments) * self.width + self.buckets * self.heads
        weights = sum(n * d_in * d_out for n, d_in, d_out in self.linear)
        return embeddings + weights + self.biases + self.width * (1 + 2 * self.layers)

    @property
    def quantized(self) -> int:
        """Weights that NF4 takes."""
        return sum(n * d_in * d_out for n, d_in, d_out in self.linear)

    @property
    def quantized_bytes(self) -> int:
        """What those weigh in NF4 with double quantisation."""
        return sum(n * _nf4_bytes(d_in * d_out) for n, d_in, d_out in self.linear)

    @property
    def int8_bytes(self) -> int:
        """What they weigh in 8 bits, with a float32 for each row."""
        return sum(n * (d_in * d_out + 4 * d_out) for n, d_in, d_out in self.linear)

    def base_bytes(self, quantize: bool | str, halved: int = 0) -> int:
        """What the base with its head weighs: float32, but for what is quantised, as `Method.quantize` has it, and for `halved`
        weights in 16 bits."""
        dense, packed = 4 * (self.body + self.head) - 2 * halved, {True: self.quantized_bytes, "int8": self.int8_bytes}
        return dense - 4 * self.quantized + packed[quantize] if quantize else dense


def _nf4_bytes(weights: int) -> int:
    blocks = math.ceil(weights / BLOCK)
    return weights // 2 + blocks + 4 * math.ceil(blocks / SCALES) + 4


@dataclass(frozen=True)
class Counts:
    """Parameters: those in A and B (and DoRA's magnitudes), all that are trained, and all that the model then holds."""

    adapter: int
    trained: int
    total: int


def counted(architecture: Architecture, trains: str, settings: dict[str, Any]) -> Counts | None:
    """What a method must come to.

    Args:
        architecture: of the base.
        trains: "nothing", "head", "adapter" or "everything".
        settings: r, target_modules, bias and use_dora of the adapter; more is ignored.

    Returns:
        None where the targets are neither attention projections nor "all-linear".
    """
    a, dense = architecture, architecture.body + architecture.head
    if trains != "adapter":
        return Counts(0, {"nothing": 0, "head": a.head, "everything": dense}[trains], dense)
    adapted = _adapted(a, settings)
    if adapted is None:
        return None
    outputs = sum(n * d_out for n, _, d_out in adapted)
    adapter = sum(n * settings["r"] * (d_in + d_out) for n, d_in, d_out in adapted)
    adapter += outputs if settings.get("use_dora") else 0
    biases = {"none": 0, "lora_only": outputs, "all": a.biases}[settings.get("bias", "none")]
    # Head and biases are trained as copies; the base's own wait aside.
    trained = adapter + biases + a.head
    return Counts(adapter, trained, dense + trained)


def _adapted(a: Architecture, settings: dict[str, Any]) -> list[tuple[int, int, int]] | None:
    """The layers with adapters, as `Architecture.linear` has them; None if that is not known."""
    targets = list(settings["target_modules"])
    if targets == [ALL_LINEAR]:
        return a.linear
    known = set(targets) <= set(PROJECTIONS[a.model_type].values())
    return [(a.layers * len(targets), a.width, a.width)] if known else None


def halved(architecture: Architecture, trains: str, settings: dict[str, Any]) -> int | None:
    """How many weights a run holds in 16 bits: in bfloat16 those of linear layers that nothing trains, or takes norms of.

    The arguments are those of `counted`, and it is None where that is.
    """
    if settings["precision"] != BF16 or trains == "everything" or settings.get("quantize"):
        return 0
    apart = _adapted(architecture, settings) if settings.get("use_dora") else []
    return None if apart is None else architecture.quantized - sum(n * d_in * d_out for n, d_in, d_out in apart)
