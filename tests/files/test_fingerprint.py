"""The fingerprint of the base: what it notices, what it does not mind, and what loading says."""

import json

import pytest
import torch
from torch import nn

from lora_core import LoraConfig, inject, load_adapter, merge_adapter, quantize_nf4, save_adapter
from lora_core.errors import FileFormatError, WrongBaseError
from lora_core.files.disk import read_safetensors, to_safetensors
from lora_core.files.fingerprint import SAMPLES, describe_dense, difference, fingerprint
from lora_core.files.storage import FINGERPRINT, WEIGHTS_FILE
from tests.support import tiny

CONFIG = LoraConfig(r=4, target_modules=["q", "v"])


def save(directory, model=None, config=CONFIG):
    model = model or tiny.classifier()
    inject(model, config)
    save_adapter(tiny.randomize(model), directory)
    return directory


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "adapter")


def bases():
    """(what is different, another base, what the message says)."""
    other = tiny.classifier(seed=1)
    cast = tiny.classifier(torch.bfloat16)
    quantized = tiny.classifier()
    quantize_nf4(quantized)
    one = tiny.classifier()
    with torch.no_grad():
        one.layers[1].v.weight[0, 0] += 1e-6  # the first value is always sampled
    return {
        "other values": (other, r"4 of 4 weights differ: layers\.0\.q \(float32 64x64\) has other values"),
        "another dtype": (cast, r"layers\.0\.q was float32 64x64, is bfloat16 64x64"),
        "4 bits": (quantized, r"layers\.0\.q was float32 64x64, is nf4/64/double 64x64"),
        "one layer": (one, r"1 of 4 weights differ: layers\.1\.v"),
    }


@pytest.mark.parametrize("case", ["other values", "another dtype", "4 bits", "one layer"])
def test_another_base_is_refused_with_what_differs(saved, case):
    base, message = bases()[case]
    before = tiny.snapshot(base)
    with pytest.raises(WrongBaseError, match=message) as caught:
        load_adapter(base, saved)
    assert "\n" not in str(caught.value) and "strict=False" in str(caught.value)
    assert tiny.snapshot(base) == before
    with pytest.warns(UserWarning, match=message):
        load_adapter(base, saved, strict=False)
    assert base.layers[0].q.lora_active == ("default",)


def test_the_same_base_in_other_hands_is_the_same(saved, recwarn):
    base = tiny.classifier()
    base.requires_grad_(False).eval()
    base.classifier = nn.Linear(64, 5)  # not adapted: of no concern
    load_adapter(base, saved)
    assert not recwarn


def test_a_quantised_base_knows_itself_and_no_other(tmp_path):
    def base(**kwargs):
        model = tiny.classifier()
        quantize_nf4(model, **kwargs)
        return model

    directory = save(tmp_path / "adapter", base())
    load_adapter(base(), directory)
    with pytest.raises(WrongBaseError, match="was nf4/64/double 64x64, is nf4/128/double"):
        load_adapter(base(block_size=128), directory)
    with pytest.raises(WrongBaseError, match="is nf4/64 64x64"):
        load_adapter(base(double_quant=False), directory)
    with pytest.raises(WrongBaseError, match="is float32"):
        load_adapter(tiny.classifier(), directory)


def test_a_4_bit_weight_that_differs_in_scale_alone_is_another():
    weights = [nn.Sequential(nn.Linear(64, 64)) for _ in range(2)]
    weights[1][0].weight.data = weights[0][0].weight.data * 2  # the same packed values, other block scales
    marks = []
    for model in weights:
        quantize_nf4(model, double_quant=False)
        inject(model, LoraConfig(target_modules=["0"]))
        marks.append(fingerprint([("0", model[0])], CONFIG, {}))
    assert torch.equal(weights[0][0].weight.data, weights[1][0].weight.data)
    assert difference(*marks)


def test_saving_while_folded_marks_the_base_and_not_the_sum(tmp_path):
    model = tiny.classifier()
    inject(model, CONFIG)
    merge_adapter(tiny.randomize(model))
    save_adapter(model, tmp_path)
    load_adapter(tiny.classifier(), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("lora_alpha", 99), ("use_rslora", True), ("alpha_pattern", {"q": 3})], ids=lambda v: str(v)
)
def test_settings_that_were_edited_afterwards_are_noticed(saved, field, value):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {field: value}))
    with pytest.raises(WrongBaseError, match="rank, alpha, variant"):
        load_adapter(tiny.classifier(), saved)


def test_a_setting_that_changes_nothing_is_not_minded(saved):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere", "alpha_pattern": {"q": config["lora_alpha"]}}))
    load_adapter(tiny.classifier(), saved)


def rewrite(directory, metadata):
    tensors, _ = read_safetensors(directory / WEIGHTS_FILE)
    (directory / WEIGHTS_FILE).write_bytes(to_safetensors(tensors, metadata))


def test_a_file_without_a_fingerprint_loads(saved):
    rewrite(saved, {"format": "pt"})
    load_adapter(tiny.classifier(seed=1), saved)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"base": 1, "settings": ""}', '{"base": {"a": 1}, "settings": ""}', '{"base": {"a": "b"}}']
)
def test_a_broken_fingerprint_is_said_to_be_broken(saved, text):
    rewrite(saved, {"format": "pt", FINGERPRINT: text})
    with pytest.raises(FileFormatError, match="fingerprint"):
        load_adapter(tiny.classifier(), saved)


def test_the_sample_reaches_from_end_to_end_of_a_large_weight():
    """1,024 values of a larger weight: a change of every value, of a half and of a row of blocks is seen."""
    torch.manual_seed(0)
    weight = torch.randn(512, 768)
    mark = describe_dense(weight)
    assert mark == describe_dense(weight.clone()) and mark.startswith("float32 512x768 ")
    for part in (slice(None), slice(256, None), slice(510, None)):
        changed = weight.clone()
        changed[part] += 1e-3
        assert describe_dense(changed) != mark
    assert weight.numel() > SAMPLES


def test_files_of_the_same_adapter_have_the_same_bytes(tmp_path):
    contents = {(save(tmp_path / str(i)) / WEIGHTS_FILE).read_bytes() for i in range(8)}
    assert len(contents) == 1
