"""Verbs that PEFT has too, and what it finds in our files, with PEFT as the oracle."""

import json

import pytest
import torch
import transformers

from lora_core import LoraConfig, inject, load_adapter, save_adapter, scale_adapter
from tests.support import tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def pair(tmp_path, **settings):
    """The same adapter in PEFT and here."""
    theirs = peft.get_peft_model(
        tiny.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path)
    return ours, theirs


@torch.no_grad()
def logits(model):
    return model(tiny.TOKENS).logits


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": False}], ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.3, 2.5])
def test_a_factor_does_what_pefts_does(settings, factor, tmp_path):
    from peft.helpers import rescale_adapter_scale

    ours, theirs = pair(tmp_path, **settings)
    if factor:
        with rescale_adapter_scale(theirs, factor), scale_adapter(ours, "default", factor):
            torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", factor)
    scale_adapter(ours, "default", factor)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_the_class_of_the_base_is_found_by_peft(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    found = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(found.get_base_model()) is transformers.LlamaForCausalLM
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    theirs = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["auto_mapping"] == fields["auto_mapping"]


def test_a_task_type_says_the_class_by_itself(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    save_adapter(model, tmp_path / "adapter")
    assert "auto_mapping" not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
