"""Facts of every kind of layer with every method on every base, for the golden files."""

import copy
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core import (
    LoraConfig,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
    unload,
    unmerge_adapter,
)
from tests.support.golden_facts import files, fill, fill_trained, gradients, layout, numbers, outcome, pattern


class Attention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"layer": 3}, "alpha_pattern": {"layer": 6}},
    "pattern of nothing": {"rank_pattern": {"other": 3}},
    "bias": {"bias": "lora_only"},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "dora pissa": {"init_lora_weights": "pissa", "use_dora": True},
    "dora lora_bias": {"use_dora": True, "lora_bias": True},
}
#: Enough for what differs from another kind in one respect.
FEW = ("plain", "dora", "lora_bias", "bias", "pissa")


class Kind(NamedTuple):
    """A layer, what it reads, with which methods, and which module of it carries the adapter."""

    build: Callable[[], nn.Module]
    x: Tensor
    methods: Collection[str] = METHODS
    target: str = "layer"


KINDS = {
    "linear": Kind(lambda: nn.Linear(16, 8), pattern((5, 16))),
    "linear without bias": Kind(lambda: nn.Linear(16, 8, bias=False), pattern((2, 3, 16)), FEW),
    "many rows": Kind(lambda: nn.Linear(16, 8), pattern((48, 16)), FEW),
    "Conv1D": Kind(lambda: Conv1D(8, 16), pattern((5, 16))),
    "conv1d": Kind(lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), pattern((2, 4, 9))),
    "conv2d": Kind(lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 2), dilation=(1, 2)), pattern((2, 4, 5, 4))),
    "conv3d": Kind(lambda: nn.Conv3d(4, 8, 2, stride=2), pattern((2, 4, 4, 4, 4))),
    "grouped conv2d": Kind(lambda: nn.Conv2d(4, 8, 3, groups=2), pattern((2, 4, 5, 4))),
    "embedding": Kind(lambda: nn.Embedding(9, 8, padding_idx=0), torch.tensor([[0, 3, 3, 8], [2, 1, 0, 5]])),
    "attention": Kind(Attention, pattern((2, 3, 8)), FEW, target="attention"),
}


class Base(NamedTuple):
    """What a layer's weights are: significant digits of its numbers, and how near (relatively) others must be."""

    dtype: torch.dtype
    packed: bool
    digits: int
    tolerance: float


BASES = {
    "float32": Base(torch.float32, False, 6, 1e-4),
    "bfloat16": Base(torch.bfloat16, False, 4, 2e-2),
    "float64": Base(torch.float64, False, 10, 1e-8),
    "nf4": Base(torch.float32, True, 5, 1e-3),
    "nf4 of bfloat16": Base(torch.bfloat16, True, 4, 2e-2),
}


def build(kind: str, base: str) -> nn.Module:
    """A model of one layer."""
    model = nn.Module()
    model.layer = KINDS[kind].build()
    fill(dict(model.named_parameters()))
    model.to(BASES[base].dtype).eval()
    if BASES[base].packed:
        quantize_nf4(model)
    return model


def layer_facts(kind: str) -> dict[str, Any]:
    """{base: {method: facts}}, or how a base is refused."""
    return {base: outcome(partial(_on_base, kind, base)) for base in BASES}


def _on_base(kind: str, base: str) -> dict[str, Any]:
    build(kind, base)
    return {method: outcome(partial(_facts, kind, method, base)) for method in KINDS[kind].methods}


def _facts(kind: str, method: str, base: str) -> dict[str, Any]:
    digits, model = BASES[base].digits, build(kind, base)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[KINDS[kind].target], **METHODS[method])
    torch.manual_seed(0)
    inject(model, config)
    start = {path: numbers(p, digits)[:1] for path, p in model.named_parameters() if p.requires_grad}  # signs may differ
    fill_trained(model)
    output = _forward(model.train(), kind, base)
    trained = {path: start[path] + gradient for path, gradient in gradients(model, output, digits).items()}
    found = {
        "state": layout(model.state_dict()),
        "output": numbers(output, digits),
        "trained": {path.removeprefix("layer.").removesuffix(".default"): values for path, values in trained.items()},
    }
    model.eval()
    for name, action in (("saved", _saved), ("merged", _merged), ("restored", _restored)):
        found[name] = outcome(partial(action, copy.deepcopy(model), kind, method, base))
    return found


def _forward(model: nn.Module, kind: str, base: str) -> Tensor:
    x = KINDS[kind].x
    torch.manual_seed(1)
    return model.layer(x.to(BASES[base].dtype) if x.is_floating_point() else x)


def _saved(model: nn.Module, kind: str, method: str, base: str) -> dict[str, Any]:
    exact = "pissa" not in method and "olora" not in method  # else what the adapter started from is in the file
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)
        found = files(Path(directory), exact)
        other = build(kind, base)
        load_adapter(other, directory)
    return found | _difference(_forward(other, kind, base), _forward(model, kind, base), base)


def _merged(model: nn.Module, kind: str, method: str, base: str) -> dict[str, Any]:
    expected = _forward(model, kind, base)
    report = str(merge_and_unload(model))
    values = torch.cat([p.flatten() for _, p in sorted(model.named_parameters())])
    found = {
        "report": report if method in ("plain", "lora_bias", "patterns") else report.split(":")[0],  # these round nothing
        "state": layout(model.state_dict()),
        "values": numbers(values, BASES[base].digits),
    }
    return found | _difference(_forward(model, kind, base), expected, base)


def _restored(model: nn.Module, kind: str, method: str, base: str) -> bool:
    """Whether unmerging and unloading bring back every byte."""
    before = {key: t.clone() for key, t in model.state_dict().items()}
    merge_adapter(model)
    unmerge_adapter(model)
    unmerged = _equal(before, model.state_dict())
    return unmerged and _equal(build(kind, base).state_dict(), unload(model).state_dict())


def _difference(found: Tensor, expected: Tensor, base: str) -> dict[str, bool]:
    """Nothing where both outputs are the same but for rounding."""
    off = (found - expected).double().norm() / expected.double().norm()
    return {} if off.item() <= BASES[base].tolerance else {"computes the same": False}


def _equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(t, others[key]) for key, t in some.items())
