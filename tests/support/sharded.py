"""A worker of interop/test_distributed.py: python -m torch.distributed.run --nproc-per-node 2 -m tests.support.sharded DIR

Trains the same small model in one process and sharded over all of them, saves the second, loads it into a third.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from lora_core import (
    LoraConfig,
    LoraError,
    VeraConfig,
    inject,
    load_adapter,
    merge_adapter,
    packed_parameters,
    quantize_nf4,
    save_adapter,
    set_adapter,
    trainable_parameters,
)
from lora_core.files.storage import adapter_tensors
from tests.support import tiny

KINDS = {"dense": {}, "nf4": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}, "vera": {}}
TOLERANCE = 1e-5  # of weights about 0.1 large, in float32, after three steps of 1e-2


def base(kind):
    model = tiny.classifier()
    if kind == "nf4":
        quantize_nf4(model, skip=["classifier"])
    return model


def injected(kind):
    model = base(kind)
    torch.manual_seed(1)
    form = VeraConfig if kind == "vera" else LoraConfig
    inject(model, form(r=4, target_modules=["q", "v"], modules_to_save=["classifier"], **KINDS[kind]))
    return model


def shard(model, ignored):
    for block in model.layers:
        fully_shard(block, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)
    return model


def train(model, x, y):
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def check(kind, directory):
    rank, count = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(8, 64, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    alone, model = injected(kind), injected(kind)
    shard(model, packed_parameters(model))
    train(alone, x, y)
    train(model, x[rank::count], y[rank::count])
    save_adapter(model, directory / kind)
    dist.barrier()

    saved, expected = load_file(directory / kind / "adapter_model.safetensors"), adapter_tensors(alone)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=TOLERANCE)
    reloaded = base(kind)
    load_adapter(reloaded, directory / kind)  # strict: the fingerprint is that of the whole base
    torch.testing.assert_close(reloaded(x), alone(x), rtol=0, atol=10 * TOLERANCE)
    torch.testing.assert_close(model(x), alone(x), rtol=0, atol=10 * TOLERANCE)
    for name, tensor in adapter_tensors(model).items():  # again, now that the forward has left some parameters whole
        assert torch.equal(tensor, saved[name])

    whole_again = {
        "loading needs it whole": lambda: load_adapter(model, directory / kind),
        "merging needs it whole": lambda: merge_adapter(model),
        "a new adapter needs it whole": lambda: inject(model, LoraConfig(r=2, target_modules=["k"]), "other"),
        "do it before fully_shard": lambda: set_adapter(model, []),
    }
    for says, verb in whole_again.items():
        with pytest.raises(LoraError, match=says):
            verb()


def check_packed_weights_are_not_cut():
    with pytest.raises(LoraError, match="ignored_params=packed_parameters"):
        shard(injected("nf4"), set())(torch.randn(2, 64))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in KINDS:
        check(kind, Path(sys.argv[1]))
    check_packed_weights_are_not_cut()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo that is still ending would abort a process that tidies up
