"""`adapter_model.bin`: what PEFT has pickled is read to the bit, and what would need code to be run is not."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core import load_adapter
from lora_core.__main__ import main
from lora_core.deploy.convert import convert_adapter
from lora_core.deploy.inspection import inspect_adapter
from lora_core.errors import FileFormatError
from lora_core.files.adapter import CONFIG_FILE, LEGACY_WEIGHTS_FILE, WEIGHTS_FILE, read_adapter
from lora_core.files.pickled import read_pickled
from lora_core.files.storage import adapter_tensors


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


def of_peft(directory, dtype=torch.float32, pickled=True, **settings):
    """An adapter of PEFT's in a directory, with random values in all of it."""
    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], **settings))
    for name, parameter in model.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    model.save_pretrained(directory, safe_serialization=not pickled)
    return model


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_what_peft_pickled_is_read_to_the_bit(tmp_path, settings, dtype, zipped):
    of_peft(tmp_path, dtype, **settings)
    path = tmp_path / LEGACY_WEIGHTS_FILE
    expected = torch.load(path, weights_only=True)
    if not zipped:
        torch.save(expected, path, _use_new_zipfile_serialization=False)
    model = base()
    load_adapter(model, tmp_path)
    found = adapter_tensors(model)
    assert found.keys() == read_adapter(tmp_path).tensors.keys() <= expected.keys()
    assert all(torch.equal(tensor, expected[key].to(tensor.dtype)) for key, tensor in found.items())
    assert all(torch.equal(t, expected[k]) and t.dtype == expected[k].dtype for k, t in read_pickled(path).items())


def test_it_becomes_safetensors(tmp_path, capfd):
    of_peft(tmp_path / "old")
    (tmp_path / "old" / "README.md").write_text("mine")
    assert main(["convert", str(tmp_path / "old"), "--output", str(tmp_path / "new")]) == 0
    expected = torch.load(tmp_path / "old" / LEGACY_WEIGHTS_FILE, weights_only=True)
    found = load_file(tmp_path / "new" / WEIGHTS_FILE)
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[k]) for k, t in found.items())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    peft.PeftModel.from_pretrained(base(), tmp_path / "new")
    assert main(["convert", str(tmp_path / "new"), "--output", str(tmp_path / "newer")]) == 2
    assert "say what to convert to" in capfd.readouterr().err


def test_other_conversions_take_it_too(tmp_path):
    of_peft(tmp_path / "old", use_rslora=True)
    report = convert_adapter(tmp_path / "old", tmp_path / "new", plain=True, dtype=torch.float16)
    assert report.layers == 1 and json.loads((tmp_path / "new" / CONFIG_FILE).read_text())["use_rslora"] is False
    assert inspect_adapter(tmp_path / "old").nbytes == (tmp_path / "old" / LEGACY_WEIGHTS_FILE).stat().st_size


def test_safetensors_go_first(tmp_path):
    of_peft(tmp_path, pickled=False)
    (tmp_path / LEGACY_WEIGHTS_FILE).write_bytes(b"not even a pickle")
    load_adapter(base(), tmp_path)


def test_parameters_and_tensors_that_are_one_are_tensors(tmp_path):
    shared = torch.randn(3, 4)
    torch.save({"a": nn.Parameter(shared), "b": shared, "c": shared.t()}, tmp_path / "x.bin")
    found = read_pickled(tmp_path / "x.bin")
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in found.values())
    assert torch.equal(found["c"], shared.t()) and found["c"].is_contiguous()


def test_what_it_says_of_missing_tensors_is_what_is_said_of_safetensors(tmp_path):
    of_peft(tmp_path)
    tensors = torch.load(tmp_path / LEGACY_WEIGHTS_FILE, weights_only=True)
    key = next(k for k in tensors if "lora_A" in k)
    torch.save({k: t for k, t in tensors.items() if k != key}, tmp_path / LEGACY_WEIGHTS_FILE)
    with pytest.raises(FileFormatError, match="1 missing tensors"):
        load_adapter(base(), tmp_path)
