"""Fused experts with peft as the oracle: files both ways, outputs, gradients, merged weights, and where it differs."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_core import LoraConfig, inject, load_adapter, merge_and_unload, save_adapter, set_adapter, trainable_parameters
from tests.support import experts, tiny
from tests.support.experts import MODELS, TOKENS, build, config, logits

peft = pytest.importorskip("peft")

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
#: Besides both parameters of the experts: other ranks for some, other targets, another scaling.
SETTINGS = {
    "both": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"experts.gate_up_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "and layers": {"target_modules": ["q_proj", "o_proj"]},
    "one": {"target_parameters": ["experts.down_proj"]},
    "the router too": {"target_parameters": ["experts.gate_up_proj", "gate.weight", "router.weight"]},
}


def near(found, expected, atol=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def settings_for(name, setting):
    settings = dict(SETTINGS[setting])
    if setting == "the router too":
        router = "router.weight" if name in ("gpt-oss", "llama4") else "mlp.gate.weight"
        settings["target_parameters"] = ["experts.gate_up_proj", router]
    return settings


def adapted(name, **settings):
    model = build(name)
    inject(model, config(name, **settings))
    return tiny.randomize(model)


@EVERY_MODEL
@pytest.mark.parametrize("setting", SETTINGS)
def test_files_go_both_ways(name, setting, tmp_path):
    ours = adapted(name, **settings_for(name, setting))
    expected = logits(ours)
    assert not torch.allclose(expected, logits(build(name)), atol=1e-3)
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no key without a home, none missing
        theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
    near(logits(theirs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert stored[0].keys() == stored[1].keys() and all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    other = build(name)
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(logits(other), expected)
    merge_and_unload(other)
    near(logits(other), logits(theirs.merge_and_unload()))


@EVERY_MODEL
def test_what_peft_made_is_read(name, tmp_path):
    experts_at = MODELS[name][2]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(
        build(name),
        peft.LoraConfig(
            r=3,
            target_modules=["q_proj"],
            target_parameters=[f"{experts_at}.down_proj", f"{experts_at}.gate_up_proj"],
            init_lora_weights=False,
        ),
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = build(name)
    report = load_adapter(ours, tmp_path)
    assert len(report.targets) == 2 * 3
    near(logits(ours), logits(theirs))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_gradients_are_peft_s(name, implementation, tmp_path):
    def step(model):
        model.train()
        model(TOKENS, labels=TOKENS).loss.backward()

    ours, base = adapted(name), build(name)
    save_adapter(ours, tmp_path)
    for model in (ours, base):
        model.config._experts_implementation = implementation
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    step(ours)
    step(theirs)
    # Put the gradients where the values are, and compare the files.
    for model in (ours, theirs):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.grad
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    stored = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert any(tensor.abs().max() > 1e-3 for tensor in stored[0].values())
    for key, gradient in stored[0].items():
        near(gradient, stored[1][key], 1e-6)
    assert len(trainable_parameters(ours)) == len(stored[0])


def test_several_adapters_at_once(tmp_path):
    names = ["one", "two"]
    for seed, name in enumerate(names):
        model = build()
        inject(model, config(r=2 + seed))
        save_adapter(tiny.randomize(model, seed=seed), tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "one", "one")
    theirs.load_adapter(tmp_path / "two", "two")
    ours = build()
    for name in names:
        load_adapter(ours, tmp_path / name, name)
    for active in (["one"], ["two"], names):
        set_adapter(ours, active)
        theirs.base_model.set_adapter(active)
        near(logits(ours), logits(theirs.eval()))


@EVERY_MODEL
@pytest.mark.parametrize("targets", [None, [], ["q_proj"]], ids=str)
def test_the_same_layers_are_meant_beside_them(name, targets, tmp_path):
    """No layer if none is named, and not the architecture's default; a file says so, or PEFT would take that."""
    ours = adapted(name, target_modules=targets)
    save_adapter(ours, tmp_path / "ours")
    parameters = list(config(name).target_parameters)
    settings = peft.LoraConfig(r=2, target_modules=targets, target_parameters=parameters, init_lora_weights=False)
    peft.get_peft_model(build(name), settings).save_pretrained(tmp_path / "theirs")
    keys = [load_file(tmp_path / who / "adapter_model.safetensors").keys() for who in ("ours", "theirs")]
    assert keys[0] == keys[1]
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert fields["target_modules"] == (targets or [])
    load_adapter(build(name), tmp_path / "theirs")


def test_a_file_without_parameters_does_not_speak_of_them(tmp_path):
    """PEFT before 0.17 does not know the field."""
    model = tiny.build("llama")
    inject(model, LoraConfig(target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    assert "target_parameters" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("ignore:.*was saved on another base")
def test_a_sixteen_bit_base_rounds_less_of_the_update_than_in_peft(tmp_path):
    """peft adds the update to the weight and rounds the sum; here the products are added, in float32."""
    ours = build("mixtral", "eager").bfloat16()
    inject(ours, config())
    tiny.randomize(ours)
    for parameter in trainable_parameters(ours):
        parameter.data *= 0.2  # an update of a fraction of the weight's last place
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("mixtral", "eager").bfloat16(), tmp_path, autocast_adapter_dtype=False).eval()
    exact = build("mixtral", "eager").bfloat16().double()
    load_adapter(exact, tmp_path, strict=False)
    torch.manual_seed(0)
    x, chosen = torch.randn(64, 16, dtype=torch.bfloat16), torch.tensor([[0, 1]]).expand(64, 2)
    weights = torch.full((64, 2), 0.5, dtype=torch.bfloat16)
    expected = exact.model.layers[0].mlp.experts(x.double(), chosen, weights.double())
    layers = [model.model.layers[0].mlp.experts for model in (ours, theirs.base_model.model)]
    mine, other = ((layer(x, chosen, weights).double() - expected).norm().item() for layer in layers)
    assert mine <= other


def test_deepseek_s_experts(tmp_path):
    settings = {"first_k_dense_replace": 1, "n_routed_experts": 4, "moe_intermediate_size": 12, "n_group": 1, "topk_group": 1}
    settings |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

    def deepseek():
        torch.manual_seed(0)
        small = {key: value for key, value in experts.SMALL.items() if key != "head_dim"}
        configuration = transformers.DeepseekV3Config(**small | settings | {"num_key_value_heads": 4})
        return transformers.DeepseekV3ForCausalLM(configuration).eval()

    ours = deepseek()
    report = inject(ours, config())
    assert report.targets == ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
    save_adapter(tiny.randomize(ours), tmp_path)
    near(logits(peft.PeftModel.from_pretrained(deepseek(), tmp_path).eval()), logits(ours))
