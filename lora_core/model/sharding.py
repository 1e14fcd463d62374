"""Models whose parameters are spread over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    inject(model, config)
    for block in model.layers:
        fully_shard(block, ignored_params=packed_parameters(model))
    fully_shard(model, ignored_params=packed_parameters(model))
    ...
    save_adapter(model, "out/")       # in every process; process 0 writes

First inject or load, then shard: FSDP2 puts other parameter objects in the place of the model's. 4-bit weights can't be
cut, since their scales stand beside the parameter; every process holds them whole. Of the frozen base nothing
is gathered to save, but for the few values that its fingerprint samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..bases import base_of_weight
from ..errors import StateError
from ..layers.holder import SharedTable
from .wrappers import check_model


def packed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What `fully_shard` must be given as `ignored_params`: the packed weights of `model`, and what all layers of an adapter
    share (VeRA's A and B). Empty where there are none."""
    check_model(model)
    packed = {parameter for parameter in model.parameters() if base_of_weight(parameter).packed}
    return packed.union(*(module.values() for module in model.modules() if isinstance(module, SharedTable)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over processes: a DTensor, which is not imported for those who have none."""
    return hasattr(tensor, "full_tensor")


def is_spread(model: nn.Module) -> bool:
    """Whether `model` went through `fully_shard`; between a forward and a backward some of its parameters are whole."""
    return any(hasattr(type(m), "unshard") for m in model.modules()) or any(map(is_sharded, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered if it is sharded: then every process must call this, and gets all of it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def writes_files(model: nn.Module) -> bool:
    """Whether this process is the one that writes what was gathered: number 0 for a sharded model, else any."""
    return not is_spread(model) or torch.distributed.get_rank() == 0


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raises a StateError if `model` is sharded."""
    if is_spread(model):
        raise StateError(f"this model is sharded (fully_shard), and {what} needs it whole; do it before sharding")


def values_at(tensor: Tensor, positions: Tensor) -> Tensor:
    """The values at `positions` of a flattened tensor; of a sharded one only these travel between processes."""
    if not is_sharded(tensor):
        return tensor.reshape(-1)[positions]
    local = tensor.to_local()
    values = torch.zeros(len(positions), dtype=local.dtype, device=local.device)
    for chunk in tensor.__create_chunk_list__():
        place = [c - start for c, start in zip(torch.unravel_index(positions, tensor.shape), chunk.offsets, strict=True)]
        inside = ((p >= 0) & (p < size) for p, size in zip(place, chunk.sizes, strict=True))
        here = math.prod(inside, start=torch.tensor(True, device="cpu"))
        values[here] = local[tuple(p[here] for p in place)]
    # One process has each value and the others zeros, so the sum of the bytes is exact whatever the dtype.
    data = values.view(torch.uint8)
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(data, group=tensor.device_mesh.get_group(dim))
    return values
