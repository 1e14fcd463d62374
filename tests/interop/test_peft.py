"""PEFT as the oracle: adapters made there load here and the reverse, and compute the same logits.

Logits may differ by 1e-5 of the largest, or of 1: both sides do the same float32 sums of at most 128 terms in different
orders (128 * 6e-8 = 8e-6).
"""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import LoraConfig, inject, load_adapter, merge_adapter, merge_and_unload, save_adapter, unmerge_adapter
from lora_core.deploy.convert import convert_adapter
from lora_core.deploy.updates import read_updates
from lora_core.errors import ConfigError, FileFormatError, StateError
from lora_core.files.adapter import read_adapter
from lora_core.files.storage import adapter_tensors
from lora_core.layers import LoraLayer
from lora_core.spec.peft_fields import NOT_HERE, OF_A_START, WITHOUT_MEANING
from tests.support import tiny

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
    "regular expression": {
        "target_modules": r".*\.1\..*\.?(query|value|q_lin|v_lin|c_attn|q_proj|v_proj|attn.q|attn.v|SelfAttention.q|conv..)"
    },
    "one layer": {"layers_to_transform": [1]},
    "exclusion": {"exclude_modules": r".*\.0\..*"},
    "two modules saved": {"modules_to_save": []},  # filled in for each architecture
    "dora": {"use_dora": True},
    "dora, rslora, patterns": {
        "use_dora": True,
        "use_rslora": True,
        "lora_alpha": 7,
        "rank_pattern": {r"1\..*": 3},
        "alpha_pattern": {r".*\.0\..*": 5},
    },
    "dora, all biases": {"use_dora": True, "bias": "all"},
    "dora, one layer": {"use_dora": True, "layers_to_transform": [1], "bias": "lora_only"},
    "bias of B": {"lora_bias": True},
    "bias of B, rslora, patterns": {"lora_bias": True, "use_rslora": True, "rank_pattern": {r"1\..*": 3}},
    "embeddings": {},  # the target too
    "embeddings, dora, rslora": {"use_dora": True, "use_rslora": True},
}
NORMS = {
    "bert": "embeddings.LayerNorm",
    "distilbert": "sa_layer_norm",
    "roberta": "output.LayerNorm",
    "mpnet": "embeddings.LayerNorm",
    "gpt2": "ln_f",
    "llama": "norm",
    "t5": "final_layer_norm",
    "vit": "layernorm",
    "convnet": "norm",
}
CASES = [
    (architecture, setting)
    for architecture in tiny.ARCHITECTURES
    for setting in SETTINGS
    if architecture in tiny.EMBEDDINGS or "embeddings" not in setting
]
EVERY_CASE = pytest.mark.parametrize(("architecture", "setting"), CASES)
#: Every setting once, and every architecture with a variant: what a direction or a file could get wrong alone.
SOME_CASES = pytest.mark.parametrize(
    ("architecture", "setting"),
    [(a, s) for i, (a, s) in enumerate(CASES) if s in ("plain", "embeddings", "dora, rslora, patterns") or i % 3 == 0],
)
TIED = ("gpt2", "t5")  # their embeddings are tied to their output layer
WITHOUT_BIAS = ("llama", "t5")  # some of their adapted layers have none


def settings_for(architecture, setting):
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": tiny.projections(architecture),
        "task_type": tiny.task_type(architecture),
        **SETTINGS[setting],
    }
    if architecture in ("vit", "convnet"):
        settings["modules_to_save"] = ["classifier"]
    if setting == "two modules saved":
        settings["modules_to_save"] = [NORMS[architecture], *settings["modules_to_save"]]
    if "embeddings" in setting:
        settings["target_modules"] = list({*tiny.projections(architecture), tiny.EMBEDDINGS[architecture]})
    if "bias of B" in setting and architecture == "convnet":
        settings["target_modules"].remove("embedding")  # which has none, here and in peft
    if setting == "all linear" and architecture == "distilbert":
        settings["exclude_modules"] = ["pre_classifier"]  # peft fails on its own choice otherwise
    return settings


def refused_merge(architecture, setting):
    """Why this adapter can't be merged for good: part of a message, or None."""
    return "none to fold it into" if "bias of B" in setting and architecture in WITHOUT_BIAS else None


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


@pytest.mark.filterwarnings("ignore:.*match no module of this base:UserWarning")  # PEFT lists heads that this base lacks
@EVERY_CASE
def test_an_adapter_made_by_peft_loads_here(architecture, setting, tmp_path):
    theirs = made_by_peft(architecture, **settings_for(architecture, setting))
    theirs.save_pretrained(tmp_path)
    ours = tiny.build(architecture)
    plain = tiny.logits(ours)
    load_adapter(ours, tmp_path)
    same_logits(ours, theirs)
    loaded = tiny.logits(ours)
    assert not torch.allclose(loaded, plain, atol=1e-4)  # it does something
    refusal = refused_merge(architecture, setting)
    if refusal != "none to fold it into":
        merge_adapter(ours)
        same_logits(ours, theirs)
        unmerge_adapter(ours)
        assert torch.equal(tiny.logits(ours), loaded)
    if refusal:
        with pytest.raises(StateError, match=refusal):
            merge_and_unload(ours)
        assert torch.equal(tiny.logits(ours), loaded)
    else:
        merge_and_unload(ours)
        same_logits(ours, theirs)


@SOME_CASES
def test_an_adapter_made_here_loads_in_peft(architecture, setting, tmp_path):
    ours = made_here(architecture, **settings_for(architecture, setting))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path).eval()
    same_logits(theirs, ours)
    assert not torch.allclose(tiny.logits(ours), tiny.logits(tiny.build(architecture)), atol=1e-4)
    if refused_merge(architecture, setting) or ("embeddings" in setting and architecture in TIED):
        return  # peft fails, or merges into the tied output layer as well
    merged = theirs.merge_and_unload()
    merge_and_unload(ours)
    same_logits(merged, ours)
    for (name, a), (_, b) in zip(sorted(ours.state_dict().items()), sorted(merged.state_dict().items()), strict=True):
        # A float32 sum of 4 terms; DoRA's norm is one of 64 squares, whose errors its root halves.
        torch.testing.assert_close(a, b, rtol=4e-6, atol=1e-6, msg=name)


@SOME_CASES
def test_the_files_hold_the_same_tensors_as_pefts(architecture, setting, tmp_path):
    settings = settings_for(architecture, setting)
    theirs = made_by_peft(architecture, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(made_here(architecture, **settings), tmp_path / "ours")
    (their_config, their_tensors, _), (our_config, our_tensors, _) = (read_adapter(tmp_path / d) for d in ("theirs", "ours"))
    copies = {k for k in their_tensors if k.endswith("embed_tokens.base_layer.weight")}  # of the base, which ours leave out
    assert bool(copies) == ("embeddings" in setting and architecture == "llama")
    assert {k: t.shape for k, t in our_tensors.items()} == {k: t.shape for k, t in their_tensors.items() if k not in copies}
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "bias", "task_type"):
        assert getattr(our_config, field) == getattr(their_config, field), field
    assert (our_config.rank_pattern, our_config.alpha_pattern) == (their_config.rank_pattern, their_config.alpha_pattern)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_there_and_back_is_exact(architecture, tmp_path):
    ours = made_here(architecture, **settings_for(architecture, "plain"))
    save_adapter(ours, tmp_path / "ours")
    peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = tiny.build(architecture)
    load_adapter(back, tmp_path / "theirs")
    first, last = adapter_tensors(ours), adapter_tensors(back)
    assert first.keys() == last.keys() and all(torch.equal(t, last[key]) for key, t in first.items())


def test_the_first_pattern_that_hits_decides_in_a_file_too(tmp_path):
    """In the order of the alphabet the other one would be the first. peft sorts them, and can't read its own file."""
    ours = made_here("bert", r=4, target_modules=["query", "value"], rank_pattern={"value": 2, r".*\.1\..*": 3})
    save_adapter(ours, tmp_path)
    same_logits(peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path).eval(), ours)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_peft_finds_the_layers_of_all_linear_by_their_names(architecture, tmp_path):
    model = tiny.build(architecture)
    report = inject(model, LoraConfig(**settings_for(architecture, "all linear")))
    tiny.randomize(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path)
    assert set(theirs.base_model.targeted_module_names) == set(report.targets)
    assert len(theirs.peft_config["default"].target_modules) < len(report.targets)
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(model), rtol=1e-4, atol=1e-5)


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


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "convnet"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_16_bit_files_keep_their_dtype_and_compute_the_same(architecture, variant, dtype, tmp_path):
    """On a float32 base the stored values, which float32 holds exactly, are computed with in float32: here and in peft."""
    targets = tiny.projections(architecture)
    targets += [] if variant.get("lora_bias") else [tiny.EMBEDDINGS[architecture]]
    settings = {"r": 4, "target_modules": [t for t in targets if t != "embedding" or not variant.get("lora_bias")], **variant}
    theirs = made_by_peft(architecture, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    stored = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    save_file(stored, path, metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(tiny.build(architecture), tmp_path / "theirs").eval()
    ours = tiny.build(architecture)
    load_adapter(ours, tmp_path / "theirs")
    same_logits(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    again = read_adapter(tmp_path / "ours").tensors
    assert again.keys() == stored.keys()
    assert all(tensor.dtype == dtype and torch.equal(tensor, stored[key]) for key, tensor in again.items())


REFUSED = {
    "megatron_config": {"tensor_model_parallel_size": 2},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"scale": 1.0},
    "monteclora_config": {"num_samples": 4},
    "kasa_config": {"beta": 0.1},
    "use_qalora": True,
}


def test_every_field_of_peft_is_known_or_refused_by_name():
    """A field that a newer peft brings must be looked at, not skipped."""
    fields = set(peft.LoraConfig().to_dict())
    known = {f.name for f in dataclasses.fields(LoraConfig)} | {"peft_type"}
    assert fields <= known | WITHOUT_MEANING | OF_A_START.keys() | NOT_HERE.keys()
    assert NOT_HERE.keys() - {"enable_lora"} <= {name.split(" ")[0] for name in REFUSED}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case, tmp_path):
    made_by_peft("bert", r=2, target_modules=["query"]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    field = case.split(" ")[0]
    assert field in fields
    config.write_text(json.dumps(fields | {field: REFUSED[case]}))
    ours = tiny.build("bert")
    before = tiny.snapshot(ours)
    with pytest.raises(FileFormatError, match=field) as caught:
        load_adapter(ours, tmp_path)
    assert "\n" not in str(caught.value) and str(REFUSED[case]) in str(caught.value)
    assert tiny.snapshot(ours) == before


LEFT_OVER = {
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 2.0},
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {"scale": "stable"},
    "merge_weights": True,
    "enable_lora": [True, False, True],
    "revision": "main",
}


@pytest.mark.parametrize("field", LEFT_OVER)
def test_what_is_left_over_in_a_file_and_says_nothing_any_more_is_passed_over(field, tmp_path):
    made_by_peft("bert", r=2, target_modules=["query"]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: LEFT_OVER[field]}))
    theirs = peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path).eval()
    ours = tiny.build("bert")
    load_adapter(ours, tmp_path)
    same_logits(ours, theirs)


@pytest.mark.parametrize("left_out", [("r", "lora_alpha"), ("target_modules",)], ids=str)
def test_what_a_file_leaves_out_has_pefts_default(left_out, tmp_path):
    made_by_peft("bert", r=8, lora_alpha=8, target_modules=["query", "value"]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in fields.items() if name not in left_out}))
    theirs = peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path).eval()
    ours = tiny.build("bert")
    report = load_adapter(ours, tmp_path)
    assert report.architecture == ("bert" if "target_modules" in left_out else None)
    same_logits(ours, theirs)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5"])
def test_an_object_of_pefts_means_the_same_here(architecture):
    """Also where it leaves the layers to the architecture."""
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, task_type=peft.TaskType.FEATURE_EXTRACTION, revision="main")
    ours = tiny.build(architecture)
    report = inject(ours, config)
    theirs = peft.get_peft_model(tiny.build(architecture), config)
    adapted = {name.rpartition(".lora_A")[0] for name, _ in theirs.base_model.model.named_parameters() if ".lora_A." in name}
    assert set(report.targets) == adapted and report.architecture == architecture
    assert report.trainable_parameters == theirs.get_nb_trainable_parameters()[0]
    assert f"as usual for {architecture}" in str(report)


def test_an_object_of_pefts_in_inference_mode_is_not_trained():
    config = peft.LoraConfig(target_modules=["query"], inference_mode=True)
    ours, theirs = tiny.build("bert"), peft.get_peft_model(tiny.build("bert"), config)
    inject(ours, config)
    assert not any(p.requires_grad for p in theirs.parameters()) and not any(p.requires_grad for p in ours.parameters())


def test_other_objects_of_pefts_are_refused_by_their_kind():
    with pytest.raises(ConfigError, match="of the kind 'IA3'; only 'LORA' and 'VERA'"):
        inject(tiny.build("bert"), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "beside-a-merged-one"])
def test_the_copy_of_the_base_in_a_file_of_pefts_is_recognised(target, dtype, merged, tmp_path):
    """Also where the base is in a narrower dtype by now, or an adapter is folded into it."""
    made_by_peft("llama", r=2, target_modules=["q_proj", target]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith(f"{target}.base_layer.weight") for key in tensors) == 1
    ours = tiny.build("llama").to(dtype)
    if merged:
        inject(ours, LoraConfig(r=2, target_modules=[target], init_lora_weights=False), "first")
        merge_adapter(ours)
    load_adapter(ours, tmp_path)
    assert len(adapter_tensors(ours)) == len(tensors) - 1


def test_the_copy_of_an_embedding_in_a_file_must_be_this_bases(tmp_path):
    """peft adds the weight of a targeted "embed_tokens" itself to the file, and would put it in the place of the base's."""
    made_by_peft("llama", r=2, target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path)
    ours = tiny.build("llama")
    with torch.no_grad():
        ours.model.embed_tokens.weight[3, 4] += 1e-3
    before = tiny.snapshot(ours)
    with pytest.raises(FileFormatError, match=r"without a home.*embed_tokens\.base_layer\.weight"):
        load_adapter(ours, tmp_path)
    assert tiny.snapshot(ours) == before


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
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


@pytest.mark.parametrize(
    "variant", [{}, {"use_dora": True, "use_rslora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"]
)
def test_a_quantised_base_computes_what_pefts_does(variant, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from lora_core import quantize_nf4

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    theirs = nn.Sequential(*(m if isinstance(m, nn.Tanh) else as_4bit(bnb, m) for m in dense))
    theirs = randomize(peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["0", "2"], **variant)))
    theirs.save_pretrained(tmp_path)
    quantize_nf4(dense)
    base = dense(torch.ones(64))
    load_adapter(dense, tmp_path)
    assert (dense(torch.ones(64)) - base).abs().max() > 1e-2
    x = torch.randn(5, 64)
    expected = theirs.train()(x)  # train: eval mode repacks there
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-5)
    merge_adapter(dense)
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-5)


def as_4bit(bnb, linear):
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


# --- what peft computes otherwise than it merges ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_dilation_and_padding_modes_follow_the_merged_layer(make, options, variant, tmp_path):
    """peft's A forgets both, so its merged layer is the oracle: the only one that W + s B A means."""
    torch.manual_seed(0)
    theirs = nn.Sequential(make(3, 6, 3, **options))
    ours = copy.deepcopy(theirs)
    theirs = randomize(peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["0"], **variant)))
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    x = torch.randn(2, 3, *(7,) * (ours[0].weight.dim() - 2))
    with torch.no_grad():
        expected = theirs.merge_and_unload()(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
        merge_and_unload(ours)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", TIED)
def test_a_tied_embedding_stays_tied_and_its_output_layer_the_bases(architecture):
    model = tiny.build(architecture)
    name = tiny.EMBEDDINGS[architecture]
    inject(model, LoraConfig(r=4, target_modules=[name], use_dora=True))
    tiny.randomize(model)
    embedding = next(m for path, m in model.named_modules() if path.endswith(name))
    weight, before = model.lm_head.weight, model.lm_head.weight.detach().clone()
    assert embedding.weight is weight
    merge_adapter(model)
    assert torch.equal(model.lm_head.weight, before) and not torch.equal(embedding.weight, before)
    unmerge_adapter(model)
    assert embedding.weight is model.lm_head.weight is weight and torch.equal(weight, before)
    output = tiny.logits(model)
    assert all(name in path for path in merge_and_unload(model).untied)
    torch.testing.assert_close(tiny.logits(model), output, rtol=0, atol=1e-5)
    assert torch.equal(model.lm_head.weight, before) and not torch.equal(embedding.weight, before)


# --- starts from the weight -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}], ids=str)
def test_an_adapter_that_peft_converted_is_loaded(init, variant, tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": init, **variant}
    theirs = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(**settings))
    theirs.peft_config["default"].init_lora_weights = True  # else peft would start anew when it reads this one back
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = tiny.logits(theirs.eval())
    theirs.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path / "trained")
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=0, atol=1e-5)
    assert (tiny.logits(tiny.build("llama")) - expected).abs().max() > 1e-3


STARTED = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "dora": {"init_lora_weights": "pissa", "use_dora": True},
    "head": {"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]},
}


def started(directory, **settings):
    """PEFT's files, which load there with the start taken off the base again, and its logits then."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}
    made_by_peft("llama", **settings).save_pretrained(directory)
    return tiny.logits(peft.PeftModel.from_pretrained(tiny.build("llama"), directory).eval())


@pytest.mark.filterwarnings("ignore:the base ties:UserWarning")
@pytest.mark.parametrize("case", STARTED)
def test_a_start_is_worked_out_again_from_the_base(case, tmp_path):
    expected = started(tmp_path / "theirs", **STARTED[case])
    ours = tiny.build("llama")
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=0, atol=1e-5)
    assert (tiny.logits(tiny.build("llama")) - expected).abs().max() > 1e-3
    if case != "dora":  # and is plain LoRA of twice the rank from then on
        save_adapter(ours, tmp_path / "ours")
        plain = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "ours").eval()
        torch.testing.assert_close(tiny.logits(plain), expected, rtol=0, atol=1e-5)


def test_a_start_that_was_drawn_is_drawn_again_and_that_is_told(tmp_path):
    """To within what it moves PEFT's own outputs from one reading to the next."""

    def read(seed):
        torch.manual_seed(seed)
        return tiny.logits(peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval())

    started(tmp_path, init_lora_weights="pissa_niter_4")
    theirs = torch.stack([read(seed) for seed in range(5)])
    spread = (theirs - theirs.mean(dim=0)).flatten(1).norm(dim=1).max()
    torch.manual_seed(5)
    ours = tiny.build("llama")
    with pytest.warns(UserWarning, match=r"its start \(pissa_niter_4\) was drawn at random, and is drawn again") as caught:
        load_adapter(ours, tmp_path)
    assert caught[0].filename == __file__
    assert (tiny.logits(ours) - theirs.mean(dim=0)).norm() <= 2 * spread
    assert (tiny.logits(tiny.build("llama")) - theirs.mean(dim=0)).norm() > 2 * spread


def test_in_a_merge_over_files_a_start_has_no_base_to_be_worked_out_from(tmp_path):
    started(tmp_path, init_lora_weights="pissa")
    with pytest.raises(FileFormatError, match=r"init_lora_weights='pissa' changed the base too.*convert --plain --base BASE"):
        read_updates(tmp_path)


@pytest.mark.parametrize("case", ["pissa", "olora", "patterns", "head"])
def test_a_start_is_made_plain_with_the_base(case, tmp_path):
    expected = started(tmp_path / "theirs", **STARTED[case])
    tiny.build("llama").save_pretrained(tmp_path / "base")
    convert_adapter(tmp_path / "theirs", tmp_path / "plain", plain=True, base=tmp_path / "base")
    fields = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert fields["r"] == 8 and fields["init_lora_weights"] is True
    plain = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "plain").eval()
    torch.testing.assert_close(tiny.logits(plain), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "init"),
    [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")],  # peft's OLoRA fails on Conv1D
)
def test_a_start_from_the_weight_is_pefts(architecture, init):
    """The same A and B, up to the sign of each pair: so an experiment that starts there here starts there in peft."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": tiny.projections(architecture)[:1], "init_lora_weights": init}
    theirs = peft.get_peft_model(tiny.build(architecture), peft.LoraConfig(**settings))
    ours = tiny.build(architecture)
    inject(ours, LoraConfig(**settings))
    layers = [(path, m) for path, m in ours.named_modules() if isinstance(m, LoraLayer)]
    assert len(layers) == 2
    for path, layer in layers:
        match = theirs.base_model.model.get_submodule(path)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        A_peft, B_peft = match.lora_A["default"].weight, match.lora_B["default"].weight
        torch.testing.assert_close(A.abs(), A_peft.abs(), rtol=0, atol=1e-5)
        torch.testing.assert_close(B @ A, B_peft @ A_peft, rtol=0, atol=1e-5)
