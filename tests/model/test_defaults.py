"""`target_modules` left out: the usual layers of the model's architecture, and the report says so."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_core import LoraConfig, VeraConfig, extract_adapter, inject, load_adapter, save_adapter
from lora_core.errors import TargetError
from lora_core.model.registry import find_adapter
from tests.support import tiny


class Layered(nn.Module):
    """Linear layers of these names, and an architecture."""

    def __init__(self, architecture, *names):
        super().__init__()
        self.config = SimpleNamespace(model_type=architecture)
        self.block = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})


@pytest.mark.parametrize(
    ("architecture", "names"),
    [("bert", ["query", "value"]), ("gpt2", ["c_attn"]), ("llama", ["q_proj", "v_proj"]), ("distilbert", ["q_lin", "v_lin"])],
)
def test_the_usual_layers_are_those_that_would_have_been_named(architecture, names):
    usual, named = tiny.build(architecture), tiny.build(architecture)
    report, other = inject(usual, LoraConfig(r=2)), inject(named, LoraConfig(r=2, target_modules=names))
    assert report.targets == other.targets and report.hits == other.hits
    assert (report.architecture, other.architecture) == (architecture, None)
    assert f"target_modules: {', '.join(names)}, as usual for {architecture}" in str(report) and "usual" not in str(other)
    assert find_adapter(usual, "default").config.target_modules == tuple(names)


def test_other_settings_hold_for_them():
    model = tiny.build("llama")
    report = inject(model, LoraConfig(r=2, layers_to_transform=[1], rank_pattern={"v_proj": 1}))
    assert {path.split(".")[2] for path in report.targets} == {"1"}
    assert len(model.model.layers[1].self_attn.v_proj.lora_A["default"]) == 1


def test_of_the_usual_names_those_count_that_the_model_has():
    model = Layered("blip-2", "q_proj", "v_proj", "out")
    assert inject(model, LoraConfig(r=1)).targets == ("block.q_proj", "block.v_proj")


def test_an_expression_can_be_the_default():
    model = nn.ModuleDict({"language_model": Layered(None, "q_proj"), "vision": Layered(None, "q_proj")})
    model.config = SimpleNamespace(model_type="gemma4")
    assert inject(model, LoraConfig(r=1)).targets == ("language_model.block.q_proj",)


def test_vera_goes_on_the_usual_layers_too():
    assert inject(tiny.build("bert"), VeraConfig(r=2)).architecture == "bert"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "this model says no architecture"),
        (Layered("paint", "q"), "the architecture 'paint' has no default"),
        (Layered("llama", "q", "v"), r"none of the layers that are usual for 'llama' \(q_proj, v_proj\)"),
    ],
    ids=["none", "unknown", "other layers"],
)
def test_without_a_default_the_layers_must_be_named(model, says):
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=f"target_modules is not set.*{says}.*; name the layers to adapt, or pass"):
        inject(model, LoraConfig(r=1))
    assert tiny.snapshot(model) == before


def test_files_name_the_layers(tmp_path):
    model = tiny.build("bert")
    inject(model, LoraConfig(r=2))
    save_adapter(tiny.randomize(model), tmp_path)
    again = tiny.build("bert")
    assert load_adapter(again, tmp_path).architecture is None
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_an_adapter_is_extracted_on_the_usual_layers():
    model, tuned = tiny.build("bert"), tiny.build("bert")
    assert {path.rpartition(".")[2] for path in extract_adapter(model, tuned, LoraConfig(r=2)).energy} == {"query", "value"}
