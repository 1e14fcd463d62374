"""PEFT as the oracle: adapters made there load here and the reverse, and compute the same logits.

Logits may differ by 1e-5: both sides do the same float32 sums of at most 128 terms in different orders, on logits of
size 1 (128 * 6e-8 = 8e-6).
"""

import json

import pytest
import tiny
import torch
import transformers
from torch import nn

from lora_core import LoraConfig, inject, load_adapter, merge_adapter, merge_and_unload, save_adapter, unmerge_adapter
from lora_core.errors import AdapterFormatError
from lora_core.storage import adapter_tensors, read_adapter

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"rank_pattern": {r"1\..*": 3}, "alpha_pattern": {r".*\.0\..*": 5}},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "all linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.1\..*\.(query|value|q_lin|v_lin|c_attn|q_proj|v_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "exclusion": {"exclude_modules": r".*\.0\..*"},
    "two modules saved": {"modules_to_save": None},  # filled in for each architecture
}
NORMS = {
    "bert": "embeddings.LayerNorm",
    "distilbert": "sa_layer_norm",
    "roberta": "output.LayerNorm",
    "gpt2": "ln_f",
    "llama": "norm",
}
EVERYWHERE = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)


def settings_for(architecture, setting):
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": tiny.projections(architecture),
        "task_type": "SEQ_CLS" if architecture in tiny.CLASSIFIERS else "CAUSAL_LM",
        **SETTINGS[setting],
    }
    if setting == "two modules saved":
        settings["modules_to_save"] = [NORMS[architecture]]
    if setting == "all linear" and architecture == "distilbert":
        settings["exclude_modules"] = ["pre_classifier"]  # peft fails on its own choice otherwise
    return settings


def randomize(model):
    """Random values for everything that a peft model trains."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def made_by_peft(architecture, **settings):
    return randomize(peft.get_peft_model(tiny.build(architecture), peft.LoraConfig(**settings)))


def made_here(architecture, **settings):
    model = tiny.build(architecture)
    inject(model, LoraConfig(**settings))
    return tiny.randomize(model)


def same_logits(a, b):
    expected = tiny.logits(b)
    torch.testing.assert_close(tiny.logits(a), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@EVERYWHERE
@EVERY_SETTING
def test_an_adapter_made_by_peft_loads_here(architecture, setting, tmp_path):
    theirs = made_by_peft(architecture, **settings_for(architecture, setting))
    theirs.save_pretrained(tmp_path)
    ours = tiny.build(architecture)
    plain = tiny.logits(ours)
    load_adapter(ours, tmp_path)
    same_logits(ours, theirs)
    assert not torch.allclose(tiny.logits(ours), plain, atol=1e-4)  # it does something
    merge_adapter(ours)
    same_logits(ours, theirs)
    unmerge_adapter(ours)
    merge_and_unload(ours)
    same_logits(ours, theirs)


@EVERYWHERE
@EVERY_SETTING
def test_an_adapter_made_here_loads_in_peft(architecture, setting, tmp_path):
    ours = made_here(architecture, **settings_for(architecture, setting))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path).eval()
    same_logits(theirs, ours)
    assert not torch.allclose(tiny.logits(ours), tiny.logits(tiny.build(architecture)), atol=1e-4)
    merged = theirs.merge_and_unload()
    merge_and_unload(ours)
    same_logits(merged, ours)
    for (name, a), (_, b) in zip(sorted(ours.state_dict().items()), sorted(merged.state_dict().items()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)  # one float32 sum of 4 terms, at most 1 in size


@EVERYWHERE
@EVERY_SETTING
def test_the_files_hold_the_same_tensors_as_pefts(architecture, setting, tmp_path):
    settings = settings_for(architecture, setting)
    theirs = made_by_peft(architecture, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(made_here(architecture, **settings), tmp_path / "ours")
    (their_config, their_tensors), (our_config, our_tensors) = (read_adapter(tmp_path / d) for d in ("theirs", "ours"))
    assert {k: t.shape for k, t in our_tensors.items()} == {k: t.shape for k, t in their_tensors.items()}
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "task_type"):
        assert getattr(our_config, field) == getattr(their_config, field), field


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_there_and_back_is_exact(architecture, tmp_path):
    ours = made_here(architecture, **settings_for(architecture, "plain"))
    save_adapter(ours, tmp_path / "ours")
    peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = tiny.build(architecture)
    load_adapter(back, tmp_path / "theirs")
    first, last = adapter_tensors(ours), adapter_tensors(back)
    assert first.keys() == last.keys() and all(torch.equal(t, last[key]) for key, t in first.items())


def test_a_named_adapter_is_in_a_directory_of_that_name(tmp_path):
    theirs = peft.get_peft_model(tiny.build("bert"), peft.LoraConfig(r=2, target_modules=["query"]), adapter_name="mine")
    randomize(theirs).save_pretrained(tmp_path)
    ours = tiny.build("bert")
    load_adapter(ours, tmp_path / "mine", "any_name")
    same_logits(ours, theirs)


@pytest.mark.parametrize("layers", [0, [0]], ids=["number", "list"])
def test_the_first_layer_alone(layers, tmp_path):
    """peft writes a lone index as it was given: 0 is not "unset"."""
    theirs = made_by_peft("bert", r=2, target_modules=["query"], layers_to_transform=layers)
    theirs.save_pretrained(tmp_path)
    ours = tiny.build("bert")
    assert len(load_adapter(ours, tmp_path).targets) == 1
    same_logits(ours, theirs)


def test_a_bare_model_without_a_head(tmp_path):
    """The layers of GPT2Model are at its top, where peft finds them only by `layers_pattern`."""
    config = tiny.ARCHITECTURES["gpt2"][0]
    torch.manual_seed(0)
    base = transformers.GPT2Model(config).eval()
    settings = {"r": 2, "target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}
    state = {k: t.clone() for k, t in base.state_dict().items()}
    theirs = randomize(peft.get_peft_model(base, peft.LoraConfig(**settings)))
    theirs.save_pretrained(tmp_path)
    ours = transformers.GPT2Model(config).eval()
    ours.load_state_dict(state)
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        a, b = (model(input_ids=tiny.TOKENS).last_hidden_state for model in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True, "bias": "none"}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
    ids=lambda v: str(v),
)
def test_what_is_not_supported_is_refused_by_name(settings, named, tmp_path):
    theirs = peft.get_peft_model(tiny.build("bert"), peft.LoraConfig(r=2, target_modules=["query"], **settings))
    theirs.save_pretrained(tmp_path)
    ours = tiny.build("bert")
    before = tiny.snapshot(ours)
    with pytest.raises(AdapterFormatError, match=named):
        load_adapter(ours, tmp_path)
    assert tiny.snapshot(ours) == before


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisers_that_leave_the_base_alone_load(init, tmp_path):
    theirs = made_by_peft("bert", r=2, target_modules=["query"], init_lora_weights=init)
    theirs.save_pretrained(tmp_path)
    ours = tiny.build("bert")
    load_adapter(ours, tmp_path)
    same_logits(ours, theirs)


def test_our_configuration_names_only_fields_that_peft_knows(tmp_path, recwarn):
    save_adapter(made_here("bert", **settings_for("bert", "patterns")), tmp_path)
    known = set(peft.LoraConfig().to_dict())
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= known
    peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path)
    assert not [w for w in recwarn if "keyword" in str(w.message) or "missing" in str(w.message).lower()]


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_one_training_step_is_pefts(architecture):
    """The same start, batch and optimiser: the same gradients and the same update."""
    settings = settings_for(architecture, "plain") | {"lora_dropout": 0.0}
    theirs, ours = made_by_peft(architecture, **settings), made_here(architecture, **settings)
    values = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = []
    for name, p in ours.named_parameters():
        if p.requires_grad:
            theirs_name = name.replace(".default", ".default.weight") if "lora" in name else None
            head, _, leaf = name.rpartition(".")
            match = values[theirs_name or f"{head}.modules_to_save.default.{leaf}"]
            p.data.copy_(match.data)
            pairs.append((name, p, match))
    assert len(pairs) == len(values)
    for model in (theirs, ours):
        model(input_ids=tiny.TOKENS).logits.square().sum().backward()
    for name, p, match in pairs:
        scale = match.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(p.grad, match.grad, rtol=0, atol=1e-4 * scale, msg=name)


def test_a_quantised_base_computes_what_pefts_does(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from lora_core import quantize_nf4

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    theirs = nn.Sequential(*(m if isinstance(m, nn.Tanh) else as_4bit(bnb, m) for m in dense))
    theirs = randomize(peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["0", "2"])))
    theirs.save_pretrained(tmp_path)
    quantize_nf4(dense)
    load_adapter(dense, tmp_path)
    x = torch.randn(5, 64)
    torch.testing.assert_close(dense(x), theirs.train()(x), rtol=0, atol=1e-5)  # train: eval mode repacks there


def as_4bit(bnb, linear):
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")
