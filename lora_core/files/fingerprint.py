"""Which base an adapter belongs to: a fingerprint of the weights that it updates, small and fast to take.

    base.layer.0.attention.query    float32 384x384 1f0c6a52e4b8d937      dtype or 4-bit format, shape, hash of the values

The hash (BLAKE2b) is of 1,024 values spread evenly over the weight, of a 4-bit one the packed values and the block scales,
so it takes microseconds whatever the size. Another checkpoint of the same architecture, another dtype or another
quantisation has another fingerprint. The same is done for the settings that the adapter computes with, which stand in a
file of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import base_of
from ..bases.base import Format
from ..bases.dense import DenseFormat
from ..bases.forwards import stored_weight
from ..layers import LoraLayer, lora_class
from ..methods.registry import method_of
from ..model.sharding import values_at
from ..spec.config import LoraConfig
from ..spec.targets import LayerPlan

SAMPLES = 1024


def fingerprint(
    layers: Iterable[tuple[str, nn.Module]], config: LoraConfig, settings: Mapping[str, LayerPlan]
) -> dict[str, Any]:
    """The fingerprint, for JSON, of an adapter on these layers.

    Args:
        layers: (path, layer) of each, adopted or not.
        config: the adapter's settings.
        settings: {path: what they mean there}.
    """
    return {"base": {path: _describe(layer) for path, layer in layers}, "settings": settings_hash(config, settings)}


def settings_hash(config: LoraConfig, layers: Mapping[str, LayerPlan]) -> str:
    """The part of a fingerprint that is about an adapter's settings, which mean this on each of its layers."""
    settings = [[path, layer.r, f"{layer.scaling:.6g}"] for path, layer in sorted(layers.items())]
    settings += [*method_of(config).settings(config), config.bias]
    settings += [config.trainable_token_indices] if config.trainable_token_indices else []
    return hash_of([json.dumps(settings).encode()])


def is_weight_of(layer: nn.Module, tensor: Tensor) -> bool:
    """Whether `tensor` holds the values of the layer's own weight, in this dtype or a wider one."""
    return same_values(stored_weight(unfolded(layer)).detach(), tensor)


def same_values(weight: Tensor, tensor: Tensor) -> bool:
    """Whether `tensor` holds the values of `weight`, in this dtype or a wider one."""
    return weight.shape == tensor.shape and torch.equal(weight, tensor.to(weight))


def unfolded(layer: nn.Module, name: str = "weight") -> nn.Module | SimpleNamespace:
    """The layer, or what holds the base's own weight while adapters are folded in."""
    folded = isinstance(layer, LoraLayer) and layer.lora_folded
    return SimpleNamespace(**{name: layer.lora_unfolded[0]}) if folded else layer


def _describe(layer: nn.Module) -> str:
    name = getattr(lora_class(layer), "weight_name", "weight")  # deploy asks of what holds a weight alone
    return describe_layer(unfolded(layer, name), name)


def describe_layer(layer: nn.Module, name: str = "weight") -> str:
    """What the layer's weight is, in one line of format, shape and hash: "float32 384x384 1f0c6a52e4b8d937"."""
    base = base_of(layer)
    if not base.packed:
        return describe_dense(stored_weight(layer, name=name))
    return _line(base.format_of(layer), base.shape_of(layer.weight), base.parts(layer))


def describe_dense(weight: Tensor) -> str:
    """The same of a dense weight."""
    return _line(DenseFormat(weight.dtype), weight.shape, [weight])


def describe_parts(parts: Sequence[Callable[[], Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The same of one of this shape whose values stand, one after the other, in several tensors, each read by a call."""
    start, values, spread = 0, [], _spread(math.prod(shape))
    for read in parts:
        part = read().to(dtype).flatten()
        values.append(part[spread[(spread >= start) & (spread < start + len(part))] - start])
        start += len(part)
    return _line(DenseFormat(dtype), shape, [torch.cat(values)])


def _line(form: Format, shape: Iterable[int], parts: Iterable[Tensor]) -> str:
    return f"{form} {'x'.join(map(str, shape))} {hash_of(_sample(part) for part in parts)}"


def difference(stored: Any, found: dict[str, Any]) -> str | None:
    """What differs between the fingerprint of a file and that of the model at hand, in half a line; None: nothing.

    Raises:
        ValueError: `stored` is no fingerprint.
    """
    try:
        base = {path: (*line.split(" "),) for path, line in stored["base"].items()}
        settings = stored["settings"]
        if any(len(parts) != 3 for parts in base.values()):
            raise ValueError
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError("the fingerprint of the base is not as written here") from None
    now = {path: (*line.split(" "),) for path, line in found["base"].items()}
    differing = [path for path in now if base.get(path) != now[path]]
    if differing:
        path = differing[0]
        return f"{len(differing)} of {len(now)} weights differ: {path} {_compare(base.get(path), now[path])}"
    if settings != found["settings"]:
        return "the settings in its configuration (rank, alpha, variant) are not those that it was saved with"
    return None


def _compare(was: tuple[str, str, str] | None, now: tuple[str, str, str]) -> str:
    if was is None:
        return "carried no adapter when it was saved"
    if was[:2] != now[:2]:
        return f"was {was[0]} {was[1]}, is {now[0]} {now[1]}"
    return f"({now[0]} {now[1]}) has other values"


def _sample(tensor: Tensor) -> bytes:
    values = values_at(tensor.detach(), _spread(tensor.numel(), tensor.device))
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _spread(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The positions of the values that are sampled of `size`."""
    count = min(SAMPLES, size)
    return torch.arange(count, device=device) * size // max(count, 1)


def hash_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
