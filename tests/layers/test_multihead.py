"""`nn.MultiheadAttention` with adapters: the equation in float64, peft's files and outputs, and what is refused.

PEFT 0.21 adds the update of `out_proj` twice; so does the engine, and so does the oracle here.
"""

import io

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    combine_adapters,
    disable_adapters,
    inject,
    inspect_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    save_adapter,
    set_adapter,
    unload,
    unmerge_adapter,
)
from lora_core.errors import ConfigError, LoraError, StateError, TargetError
from tests.support import tiny

peft = pytest.importorskip("peft")

KINDS = {
    "batch first": {"batch_first": True},
    "batch second": {},
    "without bias": {"bias": False, "batch_first": True},
    "with more keys": {"add_bias_kv": True, "add_zero_attn": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
CONFIG = {"r": 2, "lora_alpha": 3, "target_modules": ["attention"]}


class Model(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention, self.after = nn.MultiheadAttention(8, 2, **settings), nn.Linear(8, 8)

    def forward(self, x, **masks):
        y, weights = self.attention(x, x.flip(0), x + 1, **masks)
        return self.after(y), weights


def build(kind="batch first"):
    torch.manual_seed(0)
    return Model(**KINDS[kind])


def adapted(kind="batch first", **settings):
    model = build(kind)
    inject(model, LoraConfig(**CONFIG | settings))
    return tiny.randomize(model).eval()


def read():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8)


@torch.no_grad()
def equation(model, s=1.5, kind="batch first", names=("default",)):
    plain = build(kind).double().eval()
    attention = model.attention
    for name in names:
        A, B = attention.lora_A[name].double(), attention.lora_B[name].double()
        plain.attention.in_proj_weight += s * B @ A
        A, B = attention.out_proj.lora_A[name].double(), attention.out_proj.lora_B[name].double()
        plain.attention.out_proj.weight += 2 * s * B @ A
    return plain


def near(found, expected, atol=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


@EVERY_KIND
@pytest.mark.parametrize("grad", [True, False])
def test_the_forward_is_the_equation(kind, grad):
    model, x = adapted(kind), read()
    n, t = (3, 4) if "second" not in kind and "more" not in kind else (4, 3)
    hidden = torch.zeros(n, t, dtype=torch.bool)
    hidden[0, -1] = True
    causal = torch.ones(t, t, dtype=torch.bool).triu(1)
    with torch.set_grad_enabled(grad):
        for masks in (
            {},
            {"need_weights": False},
            {"key_padding_mask": hidden, "average_attn_weights": False},
            {"attn_mask": causal},
        ):
            near(model(x, **masks), equation(model, kind=kind)(x.double(), **masks))
        near(model.attention(x[0], x[1], x[1]), equation(model, kind=kind).attention(*(v.double() for v in (x[0], x[1], x[1]))))
        model.double()
        near(model(x.double()), equation(model, kind=kind)(x.double()), 1e-12)


@EVERY_KIND
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"attention": 3}, "alpha_pattern": {"attention": 7}}], ids=str
)
def test_files_go_both_ways_with_peft(kind, settings, tmp_path):
    ours, x = adapted(kind, **settings), read()
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours").eval()
    near(ours(x), theirs(x))
    assert {view.rank for view in inspect_adapter(tmp_path / "ours").layers} == {len(ours.attention.lora_A["default"])}
    theirs.save_pretrained(tmp_path / "theirs")
    other = build(kind).eval()
    report = load_adapter(other, tmp_path / "theirs")
    assert report.targets == ("attention", "attention.out_proj")
    near(other(x), theirs(x))
    merge_and_unload(other)
    merged = theirs.merge_and_unload()
    assert other.state_dict().keys() == merged.state_dict().keys()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], tensor, rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_equation():
    model, x = adapted(init_lora_weights="pissa"), read().double()
    model.double()
    assert torch.autograd.gradcheck(
        lambda *_: model(x)[0], [p for p in model.attention.parameters() if p.requires_grad], atol=1e-6
    )


@EVERY_KIND
def test_merging_unmerging_and_unloading_give_every_byte_back(kind):
    model, x = build(kind).eval(), read()
    before, expected = tiny.snapshot(model), model(x)
    inject(model, LoraConfig(**CONFIG))
    near(model(x), expected)
    tiny.randomize(model)
    with disable_adapters(model):
        near(model(x), expected, 1e-6)  # by torch's fast path, now that nothing is trained
    injected, output = tiny.snapshot(model), equation(model, kind=kind)(x.double())
    merge_adapter(model)
    near(model(x), output)
    with torch.no_grad():  # torch's own fast path reads the folded weights
        near(model(x), output)
    unmerge_adapter(model)
    assert tiny.snapshot(model) == injected
    unload(model)
    assert tiny.snapshot(model) == before


def test_several_adapters_add_up_and_are_switched():
    model, x = adapted(), read()
    inject(model, LoraConfig(**CONFIG), "other")
    tiny.randomize(model, "other", seed=5)
    near(model(x), equation(model)(x.double()))
    set_adapter(model, ["default", "other"])
    near(model(x), equation(model, names=("default", "other"))(x.double()))


def test_it_can_be_pickled_and_copied():
    model, x, buffer = adapted(), read(), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    near(torch.load(buffer, weights_only=False)(x), model(x), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    model = build().to(dtype).eval()
    inject(model, LoraConfig(**CONFIG))
    tiny.randomize(model)
    y, _ = model(read().to(dtype))
    assert y.dtype == dtype and model.attention.lora_A["default"].dtype == torch.float32
    expected, _ = equation(model)(read().double())
    # Four products, each of rounded weights, inputs and sums: some twenty roundings of values of at most 2.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=40 * torch.finfo(dtype).eps)


def test_in_a_decoder_and_in_an_encoder_without_its_fast_path():
    x = read()
    for kind in (nn.TransformerDecoderLayer, nn.TransformerEncoderLayer):
        layer = kind(8, 2, 16, batch_first=True).eval()
        args = (x, x) if isinstance(layer, nn.TransformerDecoderLayer) else (x,)
        before = torch.backends.mha.get_fastpath_enabled()
        if len(args) == 1:
            with pytest.raises(TargetError, match="set_fastpath_enabled"):
                inject(layer, LoraConfig(r=2, target_modules=["self_attn"]))
            torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = layer(*args)
            inject(layer, LoraConfig(r=2, target_modules=["self_attn"]))
            tiny.randomize(layer)
            with torch.no_grad():
                adapted = layer(*args)
                assert not torch.allclose(adapted, plain)
                merge_and_unload(layer)
                torch.testing.assert_close(layer(*args), adapted, rtol=0, atol=1e-5)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ({"kdim": 4}, {}, "'attention' is a MultiheadAttention.*kdim=4, vdim=8"),
        ({}, {"use_dora": True}, "no place for use_dora=True"),
        ({}, {"lora_bias": True}, "no place for lora_bias=True"),
        ({}, {"target_modules": ["out_proj"]}, "name the attention itself, 'attention'"),
        ({}, {"exclude_modules": ["out_proj"]}, "'attention.out_proj' is excluded"),
    ],
)
def test_what_peft_does_not_do_there_is_refused(sizes, settings, message):
    model = Model(**sizes)
    with pytest.raises(TargetError, match=message):
        inject(model, LoraConfig(**CONFIG | settings))


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    own = type("Own", (nn.MultiheadAttention,), {"forward": lambda self, x: x})
    with pytest.raises(TargetError, match="may compute something else than that of nn.MultiheadAttention"):
        inject(nn.ModuleDict({"attention": own(8, 2)}), LoraConfig(**CONFIG))


def test_naming_both_is_naming_the_attention():
    report = inject(build(), LoraConfig(**CONFIG | {"target_modules": ["attention", "out_proj", "after"]}))
    assert report.targets == ("attention", "attention.out_proj", "after")


def test_dropout_is_said_not_to_apply():
    with pytest.warns(UserWarning, match="lora_dropout=0.1 does not apply to attention"):
        inject(build(), LoraConfig(**CONFIG, lora_dropout=0.1))


def test_rows_of_one_batch_and_combinations_are_refused():
    model, x = adapted(), read()
    inject(model, LoraConfig(r=2, target_modules=["after"]), "other")
    with pytest.raises(StateError, match="'default' is on attention"), mixed_batch(model, ["default", None, None]):
        pass
    expected = build().eval()(x)
    with mixed_batch(model, ["other", None, None]):
        near(model(x), expected)
    with pytest.raises(ConfigError, match="'default' is on attention"):
        combine_adapters(model, ["default", "other"], [1.0, 1.0], "sum")


def test_it_is_not_packed():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2)})
    with pytest.raises(LoraError, match="found no dense"):
        quantize_nf4(model)
