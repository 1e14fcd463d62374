"""What `target_modules="all-linear"` passes over is in the report, and said once."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from lora_core import LoraConfig, inject, load_adapter, save_adapter
from tests.support import tiny

MOE = {**tiny.SMALL, "num_key_value_heads": 2}
ALL = LoraConfig(r=2, target_modules="all-linear")


class Sub(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.attention = Sub(8, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2)
        self.classifier = nn.Linear(8, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.convolution, self.embedding = nn.Conv2d(3, 3, 3, groups=3), nn.Embedding(5, 8)


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = call()
    return report, [w for w in caught if "all-linear" in str(w.message)]


def test_subclasses_attention_and_the_head():
    report, messages = said(lambda: inject(Mixed(), ALL))
    assert report.targets == ("b",)
    assert report.left_out == {
        "a": "a Sub: its forward may compute something else than that of nn.Linear",
        "attention": "attention, which is adapted where it is named itself",
        "classifier": "the head",
        "normed": "a ParametrizedLinear: its weight is computed from other tensors (parametrised, say)",
    }
    assert len(messages) == 1 and messages[0].filename == __file__
    assert str(messages[0].message).startswith('target_modules="all-linear" leaves out a (a Sub: its')
    assert "and 2 more" in str(messages[0].message) and "left out: 4 (a, " in str(report)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 1}),
    ],
)
def test_fused_experts(kind, settings):
    config = getattr(transformers, f"{kind}Config")(**MOE, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    report, messages = said(lambda: inject(model, ALL))
    fused = {path for path, p in model.named_parameters() if p.dim() == 3}
    assert fused and fused <= set(report.left_out) and report.left_out["lm_head"] == "the head"
    assert len(messages) == 1 and "several matrices in one parameter" in str(messages[0].message)


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "t5", "vit"])
def test_ordinary_models_leave_out_nothing_but_the_head(architecture):
    report, messages = said(lambda: inject(tiny.build(architecture), ALL))
    assert not messages and set(report.left_out.values()) <= {"the head"}


def test_nothing_is_said_where_names_were_given_or_a_file_says_which(tmp_path):
    model = Mixed()
    report, messages = said(lambda: inject(model, LoraConfig(r=2, target_modules=["b"])))
    assert not report.left_out and not messages
    save_adapter(model, tmp_path)
    other = Mixed()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    assert not said(lambda: load_adapter(other, tmp_path))[1]


def test_a_linear_layer_of_another_library():
    class QuantLinear(nn.Module):
        def forward(self, x):
            return x

    model = nn.ModuleDict({"a": QuantLinear(), "b": nn.Linear(2, 2)})
    report, messages = said(lambda: inject(model, ALL))
    assert report.left_out == {"a": "a QuantLinear, which is not known here"} and len(messages) == 1
    assert torch.equal(model["a"](torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize("sizes", [{"kdim": 4, "vdim": 6}, {"kdim": 4}])
def test_attention_that_keeps_its_projections_apart(sizes):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2, **sizes)})
    report, _ = said(lambda: inject(model, ALL))
    projections = {path for path, p in model.named_parameters() if path.endswith("proj_weight")}
    assert len(projections) == 3 and set(report.left_out) == {*projections, "attention.out_proj"}


def test_the_roots_own_parameters_and_its_attention():
    class Root(nn.MultiheadAttention):
        def __init__(self):
            super().__init__(8, 2)
            self.b, self.experts = nn.Linear(8, 8), nn.Parameter(torch.zeros(2, 8, 8))

    report, _ = said(lambda: inject(Root(), ALL))
    assert report.targets == ("b",) and set(report.left_out) == {"in_proj_weight", "out_proj", "experts"}
    assert report.left_out["out_proj"] == "attention reads its weight without calling it"


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["a", "attention", "classifier", "normed"]},
        {"exclude_modules": "a|attention|classifier|normed"},
        {"modules_to_save": ["a", "attention", "classifier", "normed"]},
    ],
    ids=["excluded", "excluded by an expression", "trained whole"],
)
def test_what_the_configuration_speaks_of_itself_is_not_left_out(settings):
    report, messages = said(lambda: inject(Mixed(), LoraConfig(r=2, target_modules="all-linear", **settings)))
    assert report.targets == ("b",) and not report.left_out and not messages
