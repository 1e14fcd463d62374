"""Cases of the contract: every kind of layer that the engine has."""

import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from tests.support import experts
from tests.support.contract import Case

IDS = torch.tensor([[0, 3, 3, 8], [2, 1, 0, 5]])


def upright(W):
    return W.t()


def case(layer, *shape, **settings):
    return Case(lambda: nn.Sequential(layer()), lambda: torch.randn(shape) if shape else IDS, **settings)


CASES = {
    "linear": case(lambda: nn.Linear(10, 6), 5, 10),
    "rslora": case(lambda: nn.Linear(10, 6, bias=False), 2, 3, 10, settings={"use_rslora": True}),
    "falcon": case(lambda: FalconLinear(10, 6), 5, 10),
    "Conv1D": case(lambda: Conv1D(6, 10), 5, 10, as_matrix={"0": upright}),
    "conv1d": case(lambda: nn.Conv1d(3, 6, 3, stride=2), 2, 3, 9),
    "conv2d": case(lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), 2, 3, 4, 5),
    "conv3d": case(lambda: nn.Conv3d(3, 6, 2), 2, 3, 3, 4, 5),
    "embedding": case(lambda: nn.Embedding(9, 6), as_matrix={"0": upright}),
    "scaled embedding": case(lambda: BartScaledWordEmbedding(9, 6, None, embed_scale=2.5), as_matrix={"0": upright}),
}

#: PEFT adds the update of `out_proj` twice.
CASES["attention"] = Case(
    lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}),
    lambda: torch.randn(3, 2, 8),
    targets=("attention",),
    weights={
        "attention": "attention.in_proj_weight",
        "attention.base_layer.out_proj": "attention.out_proj.weight",
    },
    factors={"attention.base_layer.out_proj": 2},
    run=lambda model, x: model["attention"](x, x, x)[0],
)

#: Parameters: the module around them is named once for each in the files, the last one without "base_layer".
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
WRAPPED = {"experts": "experts.down_proj", "experts.base_layer": "experts.gate_up_proj"}


def case_of_experts(as_matrix, *args):
    views = dict.fromkeys(WRAPPED, as_matrix)
    return Case(lambda: experts.layer(*args), lambda: torch.randn(5, 8), views, (), EXPERTS, WRAPPED, run=experts.run)


CASES["experts"] = case_of_experts(lambda W: W)
CASES["experts, gathered"] = case_of_experts(lambda W: W, experts.MixtralExperts, "batched_mm")
CASES["experts, transposed"] = case_of_experts(lambda W: W.mT, experts.TRANSPOSED)
CASES["experts, transposed and gathered"] = case_of_experts(lambda W: W.mT, experts.TRANSPOSED, "batched_mm")
CASES["parameter"] = Case(
    lambda: nn.ModuleDict({"linear": nn.Linear(10, 6)}),
    lambda: torch.randn(5, 10),
    targets=(),
    settings={"target_modules": [], "target_parameters": ["linear.weight"]},
    run=lambda model, x: model["linear"](x),
)
