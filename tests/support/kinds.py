"""Kinds of layer and variants of an adapter, and what the float64 oracle makes of a layer with some of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core import quantize_nf4
from lora_core.bases import dense_weight
from lora_core.layers import lora_class
from lora_core.methods.registry import DORA, LORA_BIAS
from tests.support import oracle


class Kind(NamedTuple):
    """How to build a layer of a kind, what it reads, and the matrix and the product that the oracle takes it for."""

    build: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    matrix: Callable[[nn.Module], torch.Tensor] = lambda layer: layer.weight.detach().flatten(1)
    apply: Callable[[nn.Module], Callable] = lambda layer: oracle.apply_linear


def conv1d_of_gpt2():
    layer = Conv1D(6, 10)
    nn.init.normal_(layer.bias)
    return layer


def packed():
    model = nn.Sequential(nn.Linear(64, 6))
    quantize_nf4(model)
    return model[0]


def channels_last():
    return nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)


def convolution(build, *size):
    return Kind(build, lambda: torch.randn(2, 3, *size), apply=oracle.convolution)


def embedding(**options):
    ids = torch.tensor([[0, 3, 3, 8], [2, 1, 0, 5]])
    return Kind(
        lambda: nn.Embedding(9, 6, **options),
        lambda: ids,
        lambda layer: layer.weight.detach().t(),
        lambda layer: oracle.apply_embedding,
    )


KINDS = {
    "linear": Kind(lambda: nn.Linear(10, 6), lambda: torch.randn(2, 3, 10)),
    "linear without bias": Kind(lambda: nn.Linear(10, 6, bias=False), lambda: torch.randn(5, 10)),
    "many rows": Kind(lambda: nn.Linear(10, 6), lambda: torch.randn(40, 10)),  # so that W + s B A is formed
    "Conv1D": Kind(conv1d_of_gpt2, lambda: torch.randn(5, 10), lambda layer: layer.weight.detach().t()),
    "nf4": Kind(packed, lambda: torch.randn(5, 64), dense_weight),
    "conv1d": convolution(lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), 9),
    "conv2d": convolution(lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), 5, 4),
    "conv2d circular": convolution(lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", bias=False), 4, 5),
    "conv2d same": convolution(lambda: nn.Conv2d(3, 6, 2, padding="same", padding_mode="reflect"), 4, 5),
    "conv2d of one pixel": convolution(lambda: nn.Conv2d(3, 6, 1), 4, 5),
    "channels last": convolution(channels_last, 4, 5),
    "conv3d": convolution(lambda: nn.Conv3d(3, 6, 2, stride=2), 3, 4, 5),
    "embedding": embedding(),
    "padded embedding": embedding(padding_idx=0),
}


D_OUT = 6

VARIANTS = {
    "plain": {"r": 2, "scaling": 0.5},
    "other": {"r": 3, "scaling": 1.5},
    "dora": {"r": 3, "scaling": 0.7, "method": DORA},
    "second": {"r": 1, "scaling": 2.0, "method": DORA},
    "start": {"r": 2, "scaling": 0.8, "init": "pissa"},
    "dora start": {"r": 2, "scaling": 0.8, "init": "olora", "method": DORA},
    "biased": {"r": 2, "scaling": 0.6, "method": LORA_BIAS},
}
ALONE = [("plain",), ("dora",), ("start",), ("dora start",), ("biased",)]
TOGETHER = [("plain", "other"), ("plain", "dora"), ("dora", "second"), ("dora", "other", "biased", "second", "start")]


def is_embedding(kind):
    return "embedding" in kind


def build(kind, names, random=True, dtype=torch.float32):
    """A layer with active adapters of these names; embeddings have none with a bias."""
    torch.manual_seed(0)
    names = [name for name in names if name != "biased" or not is_embedding(kind)]
    layer = KINDS[kind].build()
    layer = layer.requires_grad_(False) if kind == "nf4" else layer.requires_grad_(False).to(dtype)
    lora = lora_class(layer).adopt(layer)
    for name in names:
        lora.add_adapter(name, dropout=0.0, **VARIANTS[name])
    lora.activate(names)
    if random:
        randomize(lora, names)
    return lora


def randomize(lora, names):
    generator = torch.Generator().manual_seed(5)
    for name in names:
        for parameter in lora.trained(name):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data.copy_(0.4 * noise if not held(lora, "magnitude", name) or parameter.dim() > 1 else 1 + 0.4 * noise)


def held(lora, table, name):
    """Whether an adapter has a tensor there; a layer has the tables of the methods that it met."""
    return f"lora_{table}" in lora.lora_tables and name in getattr(lora, f"lora_{table}")


def oracle_of(kind, lora, names, dtype=torch.float64):
    """(apply, W, b, updates) of a layer, its tensors as leaves of `dtype`, and those leaves by (table, name)."""
    leaves, updates = {}, []

    def leaf(table, name):
        leaves[table, name] = getattr(lora, table)[name].detach().to(dtype).requires_grad_()
        return leaves[table, name]

    for name in names:
        if name not in lora.lora_scaling:
            continue
        update = {"A": leaf("lora_A", name), "B": leaf("lora_B", name), "s": lora.lora_scaling[name]}
        if name in lora.lora_A0:
            update |= {"A0": lora.lora_A0[name].detach().to(dtype), "B0": lora.lora_B0[name].detach().to(dtype)}
        if held(lora, "magnitude", name):
            update["m"] = leaf("lora_magnitude", name)
        if held(lora, "bias", name):
            update["bias"] = leaf("lora_bias", name)
        if kind == "padded embedding":  # a padding entry is not trained
            padding = torch.arange(update["A"].shape[1]) == lora.padding_idx
            update["A"] = torch.where(padding, update["A"].detach(), update["A"])
        updates.append(update)
    b = None if lora.bias is None else lora.bias.detach().to(dtype)
    return KINDS[kind].apply(lora), KINDS[kind].matrix(lora).to(dtype), b, updates, leaves


def expected_output(kind, lora, names, x):
    """The oracle's output, and the same sum with every term made positive: a rounding is eps of that at most."""
    apply, W, b, updates, _ = oracle_of(kind, lora, names)
    wide = x if is_embedding(kind) else x.double()
    y = oracle.adapted_layer(apply, wide, W, b, updates).detach()
    total, bias = W.abs(), torch.zeros(D_OUT).double() if b is None else b.abs()
    for update in updates:
        D = update["s"] * (update["B"].abs() @ update["A"].abs())
        D = D + update["s"] * (update["B0"].abs() @ update["A0"].abs()) if "A0" in update else D
        f = 1
        if "m" in update:
            f = (update["m"] / (W + part_of(update)).norm(dim=1)).abs()[:, None]
        total = total + f * (W.abs() + D)
        bias = bias + (update["s"] * update["bias"].abs() if "bias" in update else 0)
    bound = oracle.adapted_layer(apply, wide if is_embedding(kind) else wide.abs(), total, bias, [])
    return y, bound.detach()


def part_of(update):
    return oracle.update_matrices(update["A"][:0], [{key: t for key, t in update.items() if key != "m"}])[1][0]


def roundings(W):
    """Of a row's sum in the product, of one in the norm (which the root halves), and of a dozen single operations."""
    return 2 * W.shape[1] + 12
