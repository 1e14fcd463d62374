"""A table of models and settings, each with PEFT both ways: what PEFT's own tests of LoRA cover, and what lies between.

Outputs may differ by 1e-5 of the largest, or of 1: both sides do the same float32 sums in other orders.
"""

import copy
import dataclasses
import itertools
import typing
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core import (
    LoraConfig,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.errors import ConfigError, LoraError, TargetError
from lora_core.spec.peft_fields import NOT_HERE, OF_A_START, WITHOUT_MEANING
from tests.support import ROOT, tiny

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*match no module of this base:UserWarning"),
]


class Stack(nn.Module):
    """Layers with names, one after the other."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x  # a GRU's, and attention's
        return x


class Matrix(nn.Module):
    """A product with a parameter, and no layer that knows it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)

    def forward(self, x):
        return x @ self.weight.T


class Attending(nn.Module):
    """Attention, and a layer on what it gives."""

    def __init__(self):
        super().__init__()
        self.mha, self.lin = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.lin(self.mha(x, x, x)[0])


class Deep(nn.Module):
    """Three blocks of two layers, and a head."""

    def __init__(self):
        super().__init__()
        self.model, self.out = nn.Module(), nn.Linear(6, 2)
        self.model.config = SimpleNamespace()
        self.model.layers = nn.ModuleList(Stack(up=nn.Linear(6, 8), down=nn.Linear(8, 6)) for _ in range(3))

    def forward(self, x):
        for layer in self.model.layers:
            x = x + torch.tanh(layer(x))
        return self.out(x)


class Words(nn.Module):
    """Embeddings whose model says that they are its own."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.embed_tokens_extra, self.lin = nn.Embedding(30, 5), nn.Embedding(30, 5), nn.Linear(5, 2)

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, ids):
        return self.lin(self.embed_tokens(ids) + self.embed_tokens_extra(ids))


def mlp(bias=True):
    return Stack(
        lin0=nn.Linear(6, 12, bias=bias),
        act=nn.ReLU(),
        drop=nn.Dropout(),
        norm=nn.LayerNorm(12),
        lin1=nn.Linear(12, 2, bias=bias),
    )


def convolution(kind, *sizes, flat, **options):
    return lambda: Stack(conv=kind(*sizes, **options), act=nn.Tanh(), flat=nn.Flatten(), lin=nn.Linear(flat, 2))


#: {model: (what makes it, shape of its input; None: token ids)}
MODELS = {
    "mlp": (mlp, (7, 6)),
    "mlp without bias": (lambda: mlp(bias=False), (7, 6)),
    "deep": (Deep, (7, 6)),
    "words": (Words, None),
    "embedding, Conv1D": (
        lambda: Stack(emb=nn.Embedding(30, 5), conv1d=Conv1D(3, 5), act=nn.ReLU(), flat=nn.Flatten(), lin=nn.Linear(18, 2)),
        None,
    ),
    "conv1d": (convolution(nn.Conv1d, 2, 4, 3, flat=32), (3, 2, 10)),
    "conv1d of 1": (convolution(nn.Conv1d, 3, 5, 1, flat=50), (3, 3, 10)),
    "conv1d in groups": (convolution(nn.Conv1d, 8, 8, 3, groups=2, flat=64), (3, 8, 10)),
    "conv2d": (convolution(nn.Conv2d, 5, 6, 3, flat=6), (3, 5, 3, 3)),
    "conv2d without bias": (convolution(nn.Conv2d, 5, 6, 3, bias=False, flat=6), (3, 5, 3, 3)),
    "conv2d of 1": (convolution(nn.Conv2d, 1, 6, 1, flat=54), (3, 1, 3, 3)),
    "conv2d with stride": (convolution(nn.Conv2d, 2, 6, (3, 2), stride=2, padding=1, flat=36), (3, 2, 4, 4)),
    "conv2d in 4 groups": (convolution(nn.Conv2d, 8, 12, 3, groups=4, flat=12), (3, 8, 3, 3)),
    "conv2d in 2 groups": (convolution(nn.Conv2d, 8, 12, 3, padding=1, groups=2, flat=108), (3, 8, 3, 3)),
    "conv3d": (convolution(nn.Conv3d, 5, 6, 3, flat=6), (3, 5, 3, 3, 3)),
    "conv3d of 1": (convolution(nn.Conv3d, 5, 6, 1, flat=162), (3, 5, 3, 3, 3)),
    "attention": (Attending, (4, 3, 8)),
    "parameters": (lambda: Stack(first=Matrix(6, 9), act=nn.ReLU(), second=Matrix(9, 2)), (7, 6)),
    "gru": (lambda: Stack(lin=nn.Linear(6, 6), gru=nn.GRU(6, 4, batch_first=True)), (3, 4, 6)),
}


def on(*targets, **settings):
    return {"target_modules": list(targets), "r": 4, **settings}


#: What the variants are on layers of each kind.
VARIANTS = (
    {},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "lora_alpha": 3},
    {"lora_bias": True, "lora_alpha": 32},
)
TABLE = {
    "mlp": [
        {"target_modules": "lin0"},
        on("lin0"),
        on("lin1", lora_alpha=32),
        on("lin0", "lin1"),
        {"target_modules": "all-linear"},
        on("lin0", lora_alpha=4, lora_dropout=0.1),
        on("lin0", r=32),
        on("lin0", modules_to_save=["lin1"]),
        on("lin0", modules_to_save=["lin1", "norm"]),
        on("lin0", "lin1", modules_to_save=["norm"], use_dora=True),
        {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32},
        on("lin0", "lin1", use_rslora=True, lora_alpha=3, rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 5}),
        on("lin0", "lin1", rank_pattern={"^lin0": 3}, alpha_pattern={"lin.": 2.5}, use_dora=True),
        on("lin0", "lin1", bias="all"),
        on("lin0", bias="lora_only"),
        on("lin0", bias="all", modules_to_save=["lin1"]),
        on("lin0", "lin1", exclude_modules=["lin1"]),
        {"target_modules": "lin.*", "exclude_modules": "lin1"},
        on("lin0", target_parameters=["lin1.weight"]),
        on(target_parameters=["lin0.weight", "lin1.weight"]),
        *(on("lin0", init_lora_weights=init) for init in (False, "gaussian", "orthogonal", "pissa", "olora")),
        on("lin0", ensure_weight_tying=True, modules_to_save=["lin1"]),
        *(on("lin0", "lin1", **variant) for variant in VARIANTS[1:]),
    ],
    "mlp without bias": [on("lin0", "lin1", **variant) for variant in VARIANTS] + [on("lin0", bias="all")],
    "deep": [
        on("up", "down", layers_to_transform=[0, 2]),
        on("up", layers_to_transform=1, layers_pattern="layers"),
        on("down", layers_to_transform=[1], layers_pattern=["layers"], rank_pattern={"layers.1.down": 2}),
        {"target_modules": r".*layers\.[02]\.up", "exclude_modules": r".*2.*"},
        on("layers.0.up", "layers.2.down", exclude_modules=["layers.2.down", "out"]),
        on("up", rank_pattern={r"layers\.0\..*": 2, r"layers\.\d\.up": 3}, alpha_pattern={r"2\.up": 1}),
        on("up", layer_replication=[[0, 2], [1, 3]]),
    ],
    "words": [
        on("lin", trainable_token_indices=[3, 7]),
        on("lin", trainable_token_indices={"embed_tokens": [0, 29], "embed_tokens_extra": [1]}),
        on("embed_tokens_extra", trainable_token_indices={"embed_tokens": [5]}),
        on("lin", modules_to_save=["embed_tokens"]),
        on("embed_tokens_extra", "lin"),
        on("lin", alora_invocation_tokens=[4, 5]),
    ],
    "embedding, Conv1D": [
        *(on(*t, **v) for t in (("conv1d",), ("emb",), ("emb", "conv1d"), ("emb", "conv1d", "lin")) for v in VARIANTS[:3]),
        on("conv1d", lora_bias=True, fan_in_fan_out=True),
        on("conv1d", trainable_token_indices={"emb": [0, 10]}),
        on("lin", trainable_token_indices={"emb": [0, 10]}, modules_to_save=["conv1d"]),
        on("conv1d", modules_to_save=["emb"]),
        on("conv1d", "lin", bias="lora_only"),
        on("conv1d", init_lora_weights="pissa", r=2),
    ],
    **{
        name: [on("conv", **variant) for variant in VARIANTS]
        + [on("conv", "lin", bias="lora_only"), on("lin", modules_to_save=["conv"])]
        for name in MODELS
        if name.startswith("conv")
    },
    "attention": [
        on("mha"),
        on("mha", "lin", lora_alpha=3),
        on("mha", bias="all"),
        on("mha", bias="lora_only"),
        on("lin", modules_to_save=["mha"]),
    ],
    "parameters": [
        on(target_parameters=["first.weight"]),
        {"target_parameters": ["first.weight", "second.weight"], "lora_alpha": 3, "rank_pattern": {"first.weight": 2}},
        on(target_parameters=["second.weight"], init_lora_weights="gaussian", use_rslora=True),
    ],
    "gru": [on("lin", modules_to_save=["gru"])],
}
CASES = [pytest.param(name, settings, id=f"{name} {settings}") for name, rows in TABLE.items() for settings in rows]
EVERY_CASE = pytest.mark.parametrize(("name", "settings"), CASES)


def why_not_merged(name, settings):
    """Why this adapter can't be folded in, in PEFT neither: a part of the message; None if it can."""
    if "groups" in name and "conv" in settings["target_modules"]:
        return "reaches across them"
    if "without bias" in name and settings.get("lora_bias"):
        return "the layer has none to fold it into"
    return "which no weight can hold" if "alora_invocation_tokens" in settings else None


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def inputs(name):
    shape, generator = MODELS[name][1], torch.Generator().manual_seed(2)
    return torch.arange(24).view(4, 6) % 30 if shape is None else torch.randn(shape, generator=generator)


def randomize(model, seed=11):
    """Random values for everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def run(model, x, settings=()):
    """The output; of activated LoRA PEFT must be told where the invocation is, on a model that is none of transformers'."""
    if isinstance(model, peft.PeftModel) and "alora_invocation_tokens" in settings:
        from peft.tuners.lora.variants import get_alora_offsets_for_forward

        return model(ids=x, **get_alora_offsets_for_forward(model, x))
    return model(x)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))


def theirs_of(name, settings, directory):
    """PEFT's model, with random values and its files written; where it started from the weight, as it reads them again."""
    model = randomize(peft.get_peft_model(build(name), peft.LoraConfig(**settings)))
    model.save_pretrained(directory)
    if settings.get("init_lora_weights") in ("pissa", "olora"):
        model = peft.PeftModel.from_pretrained(build(name), directory, is_trainable=True).eval()
    return model


@EVERY_CASE
def test_what_peft_made_computes_the_same_here(name, settings, tmp_path):
    theirs, ours, x = theirs_of(name, settings, tmp_path), build(name), inputs(name)
    plain = ours(x)
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        expected, loaded = run(theirs, x, settings), ours(x)
        close(loaded, expected)
        assert (loaded - plain).abs().max() > 1e-3
        if "layer_replication" not in settings:
            with disable_adapters(ours):
                close(ours(x), plain)  # a GRU that was copied rounds otherwise
        if reason := why_not_merged(name, settings):
            for verb in (merge_adapter, merge_and_unload):
                with pytest.raises(LoraError, match=reason):
                    verb(ours)
            with pytest.raises((NotImplementedError, RuntimeError)):
                theirs.merge_and_unload()
        else:
            merge_adapter(ours)
            close(ours(x), expected)
            unmerge_adapter(ours)
        assert torch.equal(ours(x), loaded)
        if reason:
            unload(ours)
            assert torch.equal(ours(x), plain)
        else:
            merge_and_unload(ours)
            close(ours(x), expected)
            if (
                name != "conv3d of 1" and "layer_replication" not in settings
            ):  # where PEFT 0.21 fails, and adds all to one weight
                close(theirs.merge_and_unload(safe_merge=True)(x), expected)


@pytest.mark.filterwarnings("ignore:ensure_weight_tying")
@EVERY_CASE
def test_what_is_made_here_computes_the_same_in_peft(name, settings, tmp_path):
    ours, x = build(name), inputs(name)
    inject(ours, LoraConfig(**settings))
    randomize(ours)
    save_adapter(ours, tmp_path)
    with torch.no_grad():
        expected = ours(x)
        assert (expected - build(name)(x)).abs().max() > 1e-3
        close(run(peft.PeftModel.from_pretrained(build(name), tmp_path).eval(), x, settings), expected)


@pytest.mark.parametrize(
    ("name", "settings"), [case for case in CASES if "mha" not in case.values[1].get("target_modules", ())]
)
def test_a_step_of_training_leads_to_the_same_place(name, settings, tmp_path):
    """So the same is trained, with the same gradients, in both."""
    theirs, ours, x = theirs_of(name, settings, tmp_path), build(name), inputs(name)
    load_adapter(ours, tmp_path, trainable=True)
    trained = (trainable_parameters(ours), [p for p in theirs.parameters() if p.requires_grad])
    assert sum(p.numel() for p in trained[0]) == sum(p.numel() for p in trained[1])
    for model, parameters in zip((ours, theirs), trained, strict=True):
        run(model, x, settings).square().sum().backward()
        torch.optim.SGD(parameters, lr=1e-3).step()
    with torch.no_grad():
        close(ours(x), run(theirs, x, settings))


def test_the_gradients_of_attention_are_those_of_its_output(tmp_path):
    """PEFT 0.21 adds the update of `out_proj` twice, and has half of its gradient."""
    theirs, ours, x = theirs_of("attention", on("mha"), tmp_path), build("attention"), inputs("attention")
    load_adapter(ours, tmp_path, trainable=True)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    layer = theirs.base_model.model.mha
    pairs = ((ours.mha, layer, 1), (ours.mha.out_proj, layer.base_layer.out_proj, 2))
    for mine, other, factor in pairs:
        for table in ("lora_A", "lora_B"):
            match = getattr(other, table)["default"].weight.grad
            close(getattr(mine, table)["default"].grad, factor * match)
    B, e = ours.mha.out_proj.lora_B["default"], 1e-3
    with torch.no_grad():
        sums = []
        for step in (e, -2 * e):
            B[0, 3] += step
            sums.append(ours(x).double().square().sum().item())
    assert abs((sums[0] - sums[1]) / (2 * e) - B.grad[0, 3].item()) < 1e-2 * abs(B.grad[0, 3].item())


# --- several adapters -------------------------------------------------------------------------------------------------

#: Two adapters of one model.
PAIRS = {
    "same": (on("lin0"), on("lin0")),
    "different": (on("lin0"), on("lin1")),
    "overlapping": (on("lin0", "lin1"), on("lin1", r=2, lora_alpha=5)),
    "other scaling": (on("lin0", use_rslora=True), on("lin0", lora_alpha=20)),
    "DoRA, DoRA": (on("lin0", use_dora=True), on("lin1", use_dora=True)),
    "DoRA, plain": (on("lin0", use_dora=True), on("lin1")),
    "bias of B": (on("lin0", lora_bias=True), on("lin0", lora_bias=True, r=2)),
    "heads": (on("lin0", modules_to_save=["lin1"]), on("lin0", modules_to_save=["lin1"], r=2)),
    "head, none": (on("lin0", modules_to_save=["lin1"]), on("lin0")),
    "parameters": (on(target_parameters=["lin0.weight"]), on(target_parameters=["lin0.weight"], r=2)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_adapters(pair, tmp_path):
    names, x = ("a", "b"), inputs("mlp")
    theirs = peft.get_peft_model(build("mlp"), peft.LoraConfig(**PAIRS[pair][0]), "a")
    theirs.add_adapter("b", peft.LoraConfig(**PAIRS[pair][1]))
    for seed, name in enumerate(names):
        theirs.set_adapter(name)
        randomize(theirs, seed)
    theirs.save_pretrained(tmp_path)
    ours = build("mlp")
    for name in names:
        load_adapter(ours, tmp_path / name, name)
    both = pair != "heads"  # of which one can be in place
    with torch.no_grad():
        plain = build("mlp")(x)
        for name in ("a", "b", "a"):
            theirs.set_adapter(name)
            set_adapter(ours, name)
            close(ours(x), theirs(x))
        if both:
            theirs.base_model.set_adapter(list(names))
            set_adapter(ours, names)
            close(ours(x), theirs(x))
            merge_adapter(ours)
            close(ours(x), theirs(x))
            unmerge_adapter(ours)
        rows = ["a", "b", "__base__", "b", "a", "a", "__base__"]
        if pair not in ("parameters", "head, none", "DoRA, DoRA", "DoRA, plain"):  # which PEFT 0.21 can't
            with mixed_batch(ours, [None if name == "__base__" else name for name in rows]):
                close(ours(x), theirs(x, adapter_names=rows))
        with disable_adapters(ours), theirs.disable_adapter():
            close(ours(x), theirs(x))
            assert torch.equal(ours(x), plain)
        delete_adapter(ours, "b")
        theirs.delete_adapter("b")
        set_adapter(ours, "a")
        theirs.set_adapter("a")
        close(ours(x), theirs(x))
        merge_and_unload(ours)
        close(ours(x), theirs.merge_and_unload()(x))


# --- values of fields -------------------------------------------------------------------------------------------------

#: Values of `init_lora_weights` that PEFT has, and what they are here: files of theirs load; are started here by a verb; or ask
#: for a conversion, which `tests/interop/test_peft.py` shows.
STARTS = {
    "gaussian": "both ways",
    "olora": "both ways",
    "pissa": "both ways",
    "orthogonal": "both ways",
    "pissa_niter_[number of iters]": "drawn again",
    "mica": "files load",
    "eva": "files load",
    "corda": "convert",
    "loftq": "convert",
}
#: Every field of PEFT's configuration is one of ours, or of one of these. What is refused is of research variants, but for
#: the layers of Megatron-LM.
REFUSED = {
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
}
NEUTRAL = {
    "auto_mapping",
    "fan_in_fan_out",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    *OF_A_START,
}
ELSEWHERE = {"base_model_name_or_path", "inference_mode", "task_type"}  # of which outputs say nothing
FIELDS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
OURS = {field.name for field in dataclasses.fields(LoraConfig)}


def test_every_field_of_peft_is_supported_or_neutral_or_refused_with_a_reason():
    assert not OURS & (NEUTRAL | REFUSED) and not NEUTRAL & REFUSED
    assert set(FIELDS) == OURS | NEUTRAL | REFUSED
    assert NEUTRAL - {"peft_type"} - set(OF_A_START) == WITHOUT_MEANING - {"merge_weights"}
    assert set(NOT_HERE) - {"enable_lora"} == REFUSED  # those two are of older files
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    assert [field for field in REFUSED if f"\n| `{field}` | " not in page] == []


def test_every_field_that_is_supported_is_in_a_row_of_the_table():
    used = {field for rows in TABLE.values() for row in rows for field, value in row.items() if value != FIELDS[field].default}
    assert OURS - ELSEWHERE - used == set()


@pytest.mark.parametrize("field", sorted(NEUTRAL - {"peft_type", "runtime_config"} - set(OF_A_START)))
def test_a_neutral_field_changes_nothing(field):
    assert LoraConfig(target_modules=["lin0"], **{field: "something"}) == LoraConfig(target_modules=["lin0"])


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_refused_field_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"{field}=.* asks for "):
        LoraConfig(target_modules=["lin0"], **{field: {"some": "thing"}})


def test_every_start_of_peft_is_known():
    literal = next(t for t in typing.get_args(typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]) if t is not bool)
    assert set(typing.get_args(literal)) == set(STARTS)
    both = {row["init_lora_weights"] for row in itertools.chain(*TABLE.values()) if "init_lora_weights" in row} - {False}
    assert both == {name for name, how in STARTS.items() if how == "both ways"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("attention", on("mha", use_dora=True), "is attention, whose forward in PEFT has no place for use_dora=True"),
        ("attention", on("mha", lora_bias=True), "is attention, whose forward in PEFT has no place for lora_bias=True"),
        ("attention", on("mha", alora_invocation_tokens=[1]), "is no linear layer, and activated LoRA is for those"),
        ("embedding, Conv1D", on("emb", lora_bias=True), "is an embedding, which has no bias"),
        ("parameters", on(target_parameters=["first.weight"], lora_dropout=0.1), "there is no input for lora_dropout"),
        ("parameters", on(target_parameters=["first.weight"], use_dora=True), "DoRA does not go with that, nor in PEFT"),
        ("conv2d in 4 groups", on("conv", r=6), "the rank 6 is no multiple of that"),
    ],
)
def test_what_no_layer_of_that_kind_can_do_is_refused(name, settings, message):
    model = build(name)
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=message):
        inject(model, LoraConfig(**settings))
    assert tiny.snapshot(model) == before


def test_a_copy_of_the_model_keeps_its_adapter():
    model, x = build("mlp"), inputs("mlp")
    inject(model, LoraConfig(**on("lin0")))
    randomize(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
