"""`inject`: the right layers, everything else frozen, nothing changed until training, and no half-done injection."""

import pytest
import torch
import transformers
from torch import nn

from lora_core import LoraConfig, count_parameters, inject, quantize_nf4, trainable_parameters, unload
from lora_core.errors import AdapterNameError, ConfigError, LoraError, TargetError
from lora_core.layers import LoraLayer
from tests.support import tiny

Q_V = ["q", "v"]


def injected(model, **settings):
    inject(model, LoraConfig(**{"r": 4, "target_modules": Q_V, **settings}))
    return model


# --- what it adapts, trains and reports -------------------------------------------------------------------------------


def test_the_report_says_what_was_done():
    model = tiny.classifier()
    report = inject(model, LoraConfig(r=4, target_modules=Q_V, modules_to_save=["norm"]), "mine")
    assert report.adapter_name == "mine"
    assert report.targets == ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
    assert report.hits == {"q": 2, "v": 2}
    assert report.modules_to_save == ("norm",)
    assert report.trainable_parameters == 4 * 4 * (64 + 64) + 2 * 64 == count_parameters(model).trainable
    assert f"{report.trainable_parameters:,}" in str(report) and "'mine'" in str(report)


def test_only_the_adapter_and_saved_modules_are_trained():
    model = injected(tiny.classifier(), modules_to_save=["classifier"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    lora = {f"layers.{i}.{layer}.lora_{part}.default" for i in (0, 1) for layer in Q_V for part in "AB"}
    assert trained == lora | {"classifier.weight", "classifier.bias"}
    assert {id(p) for p in trainable_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("tokens", [5, 300])
def test_a_fresh_adapter_changes_no_bit_of_the_output(dtype, quantized, tokens):
    model, x = tiny.classifier(dtype), tiny.batch(dtype, tokens)
    if quantized:
        quantize_nf4(model)
    before = model(x)
    injected(model, target_modules="all-linear", lora_dropout=0.3, modules_to_save=["classifier"], bias="all")
    assert torch.equal(model.train()(x), before)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_fresh_adapter_changes_no_bit_of_a_transformer(architecture):
    model = tiny.build(architecture).requires_grad_(False)  # for frozen weights torch has other kernels of convolutions
    before = tiny.logits(model)
    injected(model, target_modules=tiny.projections(architecture), task_type=tiny.task_type(architecture))
    assert torch.equal(tiny.logits(model), before)


def test_training_moves_only_the_adapter():
    model = injected(tiny.classifier(), modules_to_save=["classifier"], bias="lora_only")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    for _ in range(2):  # B is zero at first, so A moves from the second step on
        optimizer.zero_grad()
        model(tiny.batch()).square().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_random_b_changes_the_model_from_the_start():
    model = tiny.classifier()
    before = model(tiny.batch())
    assert not torch.allclose(injected(model, init_lora_weights=False)(tiny.batch()), before)


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", set()),
        ("lora_only", {f"layers.{i}.{n}.bias" for i in (0, 1) for n in "qv"}),
        ("all", {f"layers.{i}.{n}.bias" for i in (0, 1) for n in ("q", "v", "out")} | {"norm.bias", "classifier.bias"}),
    ],
)
def test_bias_modes(bias, trained):
    model = injected(tiny.classifier(), bias=bias)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name} == trained


def test_bias_of_only_adapted_layers_skips_those_without():
    model = injected(tiny.classifier(), target_modules=["q", "k"], bias="lora_only")
    assert {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name} == {
        "layers.0.q.bias",
        "layers.1.q.bias",
    }


def test_rank_and_alpha_patterns_and_rslora_reach_the_layers():
    model = injected(
        tiny.classifier(), lora_alpha=8, use_rslora=True, rank_pattern={r"layers\.1\..*": 16}, alpha_pattern={"v": 4}
    )
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert {path: m.lora_A["default"].shape[0] for path, m in layers.items()} == {
        "layers.0.q": 4,
        "layers.0.v": 4,
        "layers.1.q": 16,
        "layers.1.v": 16,
    }
    assert [m.lora_scaling["default"] for m in layers.values()] == [8 / 2, 4 / 2, 8 / 4, 4 / 4]


@pytest.mark.parametrize("targets", ["all-linear", ["0"], r"0|2"])
def test_one_layer_in_two_places_is_refused(targets):
    """PEFT adapts the first place alone; an adapter on the layer itself would change both."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match="'0' and '2' are one module"):
        inject(model, LoraConfig(r=2, target_modules=targets))
    assert tiny.snapshot(model) == before


def test_a_model_under_two_names_is_one_place():
    """What a wrapper keeps beside the model, its backbone, say, is no second place of a layer."""
    model = nn.Module()
    model.model = tiny.build("bert")
    model.backbone = model.model.bert
    report = inject(model, LoraConfig(r=2, target_modules=["query"]))
    assert len(report.targets) == 2 and unload(model) is model


@pytest.mark.parametrize("first", ["part", "whole"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["out"]}])
def test_a_part_and_the_whole_do_not_overwrite_each_other(first, settings):
    model = tiny.classifier()
    order = (model.layers, model) if first == "part" else (model, model.layers)
    inject(order[0], LoraConfig(r=2, target_modules=["q"], **settings))
    tiny.randomize(order[0])
    before, output = tiny.snapshot(model), model(tiny.batch())
    for verb in (
        lambda: inject(order[1], LoraConfig(r=2, target_modules=["q"])),
        lambda: inject(order[1], LoraConfig(r=2, target_modules=["v"]), "other"),
    ):
        with pytest.raises(TargetError, match="carries an adapter that was injected through another module"):
            verb()
    assert tiny.snapshot(model) == before and torch.equal(model(tiny.batch()), output)
    unload(order[0])
    assert torch.equal(model(tiny.batch()), tiny.classifier()(tiny.batch()))


def test_two_models_that_share_layers_do_not_overwrite_each_others_adapters():
    one, two = tiny.classifier(), tiny.classifier()
    two.layers = one.layers
    inject(one, LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(TargetError, match="injected through another module"):
        inject(two, LoraConfig(r=2, target_modules=["q"]))


# --- trained parameters, as many as peft's ----------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "expected"), [(32, 1_771_778), (16, 1_181_954)])
def test_distilbert_trains_exactly_this_many_parameters(r, expected):
    with torch.device("meta"):
        model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig())
    injected(model, r=r, target_modules=["q_lin", "k_lin", "v_lin", "out_lin"], task_type="SEQ_CLS")
    assert count_parameters(model).trainable == expected


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": "all-linear"}, {"bias": "all"}, {"bias": "lora_only"}, {"layers_to_transform": [1]}]
    + [{"use_dora": True}, {"use_dora": True, "target_modules": "all-linear", "bias": "all"}, {"lora_bias": True}]
    + [{"use_dora": True, "rank_pattern": {r".*1\..*": 2}, "embeddings": True}],
    ids=lambda s: ",".join(f"{key}={value}" for key, value in s.items()) or "projections",
)
def test_counts_are_pefts(architecture, settings):
    peft = pytest.importorskip("peft")
    settings = {
        "r": 4,
        "target_modules": tiny.projections(architecture),
        "task_type": tiny.task_type(architecture),
        **settings,
    }
    if architecture == "distilbert":  # peft wants to adapt its pre_classifier and to train it whole, and fails
        settings["exclude_modules"] = ["pre_classifier"]
    if architecture in ("vit", "convnet"):  # whose head no task type names
        settings["modules_to_save"] = ["classifier"]
    if architecture == "convnet" and settings.get("lora_bias"):
        settings["target_modules"].remove("embedding")
    if settings.pop("embeddings", False) and architecture in tiny.EMBEDDINGS:
        settings["target_modules"] = {*settings["target_modules"], tiny.EMBEDDINGS[architecture]}
    ours = injected(tiny.build(architecture), **settings)
    theirs = peft.get_peft_model(tiny.build(architecture), peft.LoraConfig(**settings))
    counted, (trainable, _) = count_parameters(ours), theirs.get_nb_trainable_parameters()
    assert counted.trainable == trainable == sum(p.numel() for p in trainable_parameters(ours))
    assert counted.adapter == sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)
    carriers = [name for name, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert [name for name, m in ours.named_modules() if isinstance(m, LoraLayer)] == carriers


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_a_start_subtracts_is_not_trained(init):
    model = injected(tiny.classifier(), init_lora_weights=init)
    assert count_parameters(model).trainable == 4 * 4 * (64 + 64)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"layers.{i}.{layer}.lora_{part}.default" for i in (0, 1) for layer in Q_V for part in "AB"}


@pytest.mark.parametrize(
    "model_class", [transformers.BertForMaskedLM, transformers.RobertaForMaskedLM, transformers.BertLMHeadModel]
)
def test_all_linear_leaves_out_a_head_that_is_tied_to_the_embeddings(model_class):
    config = (transformers.RobertaConfig if "Roberta" in model_class.__name__ else transformers.BertConfig)(**tiny.SMALL)
    config.is_decoder = model_class is transformers.BertLMHeadModel
    model = model_class(config)
    head = model.get_output_embeddings()
    injected(model, target_modules="all-linear")
    assert not isinstance(head, LoraLayer)


# --- refusals, which leave the model as it was ------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def own_forward():
    model = tiny.classifier()
    model.layers[0].q = OwnForward(64, 64)
    return model


def quantized():
    model = tiny.classifier()
    quantize_nf4(model)
    return model


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))


def embedded():
    return nn.Sequential(nn.Embedding(20, 8))


REFUSALS = {
    "misspelt target": (tiny.classifier, {"target_modules": ["qq"]}, TargetError, "matched no module"),
    "one of two misspelt": (tiny.classifier, {"target_modules": ["q", "vv"]}, TargetError, "'vv' matched no module"),
    "no target": (tiny.classifier, {"target_modules": None}, TargetError, "target_modules is not set"),
    "not a layer that can": (tiny.classifier, {"target_modules": ["norm"]}, TargetError, "LayerNorm.*can't carry"),
    "a container": (tiny.classifier, {"target_modules": ["layers"]}, TargetError, "ModuleList.*can't carry"),
    "a subclass": (own_forward, {}, TargetError, "'layers.0.q' is a OwnForward"),
    "misspelt module to save": (tiny.classifier, {"modules_to_save": ["head"]}, TargetError, "modules_to_save: 'head'"),
    "misspelt exclusion": (tiny.classifier, {"exclude_modules": ["w"]}, TargetError, "exclude_modules: 'w'"),
    "misspelt rank pattern": (tiny.classifier, {"rank_pattern": {"k": 2}}, TargetError, "rank_pattern: 'k'"),
    "no head": (lambda: tiny.classifier().layers[0], {"task_type": "SEQ_CLS"}, TargetError, "no head called 'classifier'"),
    "a grouped convolution": (grouped, {"target_modules": ["0"], "r": 3}, TargetError, "2 groups, and the rank 3"),
    "a bias of an embedding": (embedded, {"target_modules": ["0"], "lora_bias": True}, TargetError, "'0' is an embedding"),
    "PiSSA of too high a rank": (
        tiny.classifier,
        {"rank_pattern": {r"layers\.1\.v": 65}, "init_lora_weights": "pissa"},
        ConfigError,
        r"'pissa' needs a rank of at most 64 on layers\.1\.v, not 65",
    ),
    "randomised PiSSA of too high a rank": (
        tiny.classifier,
        {"r": 65, "init_lora_weights": "pissa_niter_2"},
        ConfigError,
        "at most 64",
    ),
    "OLoRA of too high a rank": (
        embedded,
        {"target_modules": ["0"], "r": 9, "init_lora_weights": "olora"},
        ConfigError,
        "at most 8",
    ),
    "orthogonal of an odd rank": (
        tiny.classifier,
        {"rank_pattern": {"v": 3}, "init_lora_weights": "orthogonal"},
        ConfigError,
        r"even rank, not 3 \(layers\.0\.v\)",
    ),
    "4-bit module to save": (quantized, {"modules_to_save": ["layers.0.out"]}, TargetError, "quantised and can't be trained"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_injection_leaves_the_model_as_it_was(case):
    build, settings, error, message = REFUSALS[case]
    model = build()
    before = tiny.snapshot(model)
    with pytest.raises(error, match=message) as caught:
        injected(model, **settings)
    assert "\n" not in str(caught.value)
    assert tiny.snapshot(model) == before


def test_the_same_name_twice_is_an_error():
    model = injected(tiny.classifier())
    before = tiny.snapshot(model)
    with pytest.raises(AdapterNameError, match="'default' already"):
        injected(model)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a\\b", "a.b", "../up", "/root", "a b", "a\0", "a\n", None, 3]
    + ["keys", "pop", "training", "_parameters", "_modules", "_keys", "__class__", "forward", "-x"],
    ids=repr,
)
def test_a_name_that_can_not_be_a_directory_or_a_key_is_refused(name):
    model = tiny.classifier()
    before = tiny.snapshot(model)
    with pytest.raises(ConfigError, match="adapter_name"):
        inject(model, LoraConfig(target_modules=Q_V), name)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("name", ["a", "A-1", "0", "my_adapter", "über"])
def test_names_that_are_fine(name):
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=Q_V), name)
    assert f"layers.0.q.lora_A.{name}" in model.state_dict()
    unload(model)


def test_something_else_than_a_config_is_refused():
    with pytest.raises(ConfigError, match="dict"):
        inject(tiny.classifier(), {"r": 4})


def test_training_biases_beside_another_adapter_is_refused():
    model = injected(tiny.classifier())
    before = tiny.snapshot(model)
    with pytest.raises(ConfigError, match="bias='all'"):
        inject(model, LoraConfig(target_modules=Q_V, bias="all"), "other")
    assert tiny.snapshot(model) == before


def test_a_saved_module_may_not_carry_an_adapter_or_the_reverse():
    model = injected(tiny.classifier())
    with pytest.raises(TargetError, match="carries an adapter"):
        inject(model, LoraConfig(target_modules=["k"], modules_to_save=["layers.0"]), "other")
    model = injected(tiny.classifier(), modules_to_save=["classifier"])
    model(tiny.batch())
    with pytest.raises(LoraError):
        inject(model, LoraConfig(target_modules=["classifier"]), "other")


@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_an_adapter_is_never_skipped_by_a_fused_inference_path(target):
    """nn.TransformerEncoderLayer computes eval-mode outputs from its layers' weights without calling them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)).eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model(x)
    try:
        injected(model, target_modules=[target], init_lora_weights=False)
    except TargetError as refusal:
        assert "set_fastpath_enabled" in str(refusal)
        return
    with torch.no_grad():
        assert not torch.allclose(model(x), before)


def test_with_the_fused_path_switched_off_it_is_a_layer_like_others():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            before = model(x)
            injected(model, target_modules=["linear1"], init_lora_weights=False)
            assert not torch.allclose(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- wrappers, compilers, checkpointing -------------------------------------------------------------------------------


def gradients(model, x, loss=lambda y: y.square().sum()):
    model.zero_grad()
    loss(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_compiled_model_gives_the_same_gradients():
    torch._dynamo.reset()
    model = tiny.randomize(injected(tiny.classifier(), target_modules=["q", "k", "v"]))
    eager = gradients(model, tiny.batch())
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(tiny.batch()).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            # Other order of the same float32 operations through two blocks; see the scale of each gradient.
            torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-4 * eager[name].abs().max().item())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_gradient_checkpointing_of_a_transformer_changes_no_gradient(reentrant, quantized):
    model = tiny.build("bert")
    if quantized:
        quantize_nf4(model)
    injected(model, target_modules=tiny.projections("bert"), task_type="SEQ_CLS", lora_dropout=0.2)
    tiny.randomize(model).train()
    model.enable_input_require_grads()  # the reentrant kind needs an input that requires gradients

    def run():
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=tiny.TOKENS).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = run()
    assert all(g.any() for g in plain.values())
    assert all(torch.equal(again[name], g) for name, g in plain.items())


def test_autocast_training_gives_float32_gradients():
    model = tiny.randomize(injected(tiny.classifier(), lora_dropout=0.1)).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(tiny.batch())
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trainable_parameters(model))


def test_a_model_with_lazy_layers_is_to_be_run_first():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LazyLinear(2)})
    with pytest.raises(TargetError, match=r"'b\.weight' has no shape yet \(a lazy layer\); run the model once"):
        inject(model, LoraConfig(r=2, target_modules=["a"]))
    model["b"](torch.ones(1, 4))
    assert inject(model, LoraConfig(r=2, target_modules=["a"])).targets == ("a",)
