"""Adapters that were trained beside experts in 4 bits, merged over files: into what the experts were then."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import (
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    merge_checkpoint,
    quantize_nf4,
    save_adapter,
    save_probe,
    verify,
)
from lora_core.deploy.check import check_merge
from lora_core.deploy.recipe import Recipe
from lora_core.deploy.stream import StreamMerge
from lora_core.deploy.updates import read_updates
from lora_core.errors import FileFormatError, StateError, WrongBaseError
from lora_core.files.adapter import WEIGHTS_FILE, read_adapter
from lora_core.files.checkpoint import open_checkpoint
from tests.support import tiny
from tests.support.experts import MODELS, TOKENS, build, config, logits

TARGETS = {
    "experts": {},
    "experts and layers": {"target_modules": ["q_proj"]},
    "one of the two": {"target_parameters": ["experts.down_proj"]},
    "layers alone": {"target_modules": ["q_proj"], "target_parameters": None},
}


def trained(name, directory, dtype=None, settings=None, **packing):
    """A model with everything in 4 bits and a trained adapter, both saved there."""
    model = build(name)
    model.save_pretrained(directory / "base")
    model = model if dtype is None else model.to(dtype)
    quantize_nf4(model, **packing)
    inject(model, config(name, **(settings or {})))
    save_adapter(tiny.randomize(model), directory / "adapter")
    return model


def merged(directory, model, **recipe):
    report = merge_checkpoint(directory / "base", [directory / "adapter"], directory / "merged", Recipe(**recipe))
    return report, type(model).from_pretrained(directory / "merged", dtype=torch.float32).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", TARGETS)
def test_a_merged_checkpoint_is_what_the_adapter_was_trained_on(name, targets, tmp_path):
    model = trained(name, tmp_path, settings=TARGETS[targets])
    report, found = merged(tmp_path, model)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-4)
    in_memory = merge_and_unload(model)
    assert set(in_memory.dequantized) == set(report.dequantized)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(found.get_parameter(path), parameter, rtol=0, atol=1e-6)
    was = load_file(tmp_path / "base" / "model.safetensors")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == was.keys()


def test_one_that_was_loaded_in_sixteen_bits_first(tmp_path):
    model = trained("mixtral", tmp_path, torch.bfloat16, double_quant=False)
    _, found = merged(tmp_path, model, dtype=torch.bfloat16)
    merge_and_unload(model)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(found.get_parameter(path), parameter.float(), rtol=2**-7, atol=0)


def test_into_the_weights_of_the_files_if_that_is_asked_for(tmp_path):
    model = trained("qwen3", tmp_path)
    report, found = merged(tmp_path, model, base_as="original")
    plain = build("qwen3")
    with pytest.warns(UserWarning, match="4 of 4 weights differ"):
        load_adapter(plain, tmp_path / "adapter", strict=False)
    torch.testing.assert_close(logits(found), logits(plain), rtol=0, atol=1e-5)
    assert not report.dequantized


def test_in_four_bits_again_the_experts_stay_dense(tmp_path):
    """transformers has no 4-bit form for them."""
    model = trained("mixtral", tmp_path, settings={"target_modules": ["q_proj"]})
    report, found = merged(tmp_path, model, base_as="nf4", allow_loss=True)
    assert all("self_attn" in path for path in report.requantized) and sum("experts" in p for p in report.dequantized) == 4
    merge_and_unload(model)
    for path, parameter in model.named_parameters():
        if "experts" in path:
            torch.testing.assert_close(found.get_parameter(path), parameter, rtol=0, atol=1e-6)


def test_experts_that_were_left_dense_stay_what_they_are(tmp_path):
    model = trained("mixtral", tmp_path, settings=TARGETS["experts and layers"], skip=["experts"])
    _, found = merged(tmp_path, model)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-4)
    assert "experts" not in read_adapter(tmp_path / "adapter").fingerprint


def test_a_folded_adapter_says_the_same_of_its_base(tmp_path):
    model = trained("mixtral", tmp_path)
    merge_adapter(model)
    save_adapter(model, tmp_path / "folded")
    assert read_adapter(tmp_path / "folded").fingerprint == read_adapter(tmp_path / "adapter").fingerprint


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_another_base_is_refused(name, tmp_path):
    trained(name, tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({key: -t if "experts" in key else t for key, t in tensors.items()}, path, {"format": "pt"})
    for base_as in (None, "original"):
        with pytest.raises(WrongBaseError, match=r"experts\.gate_up_proj .*has other values"):
            merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", Recipe(base_as=base_as))


def test_names_that_are_not_known_and_a_fingerprint_that_is_none_are_refused(tmp_path):
    trained("qwen3", tmp_path, settings=TARGETS["layers alone"])
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({key.replace(".up_proj.", ".second."): t for key, t in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(StateError, match=r"with model\.layers\.0\.mlp\.experts\.gate_up_proj in 4 bits, and what .* not known"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    weights = tmp_path / "adapter" / WEIGHTS_FILE
    mark = read_adapter(tmp_path / "adapter").fingerprint
    wrongs = {"not as written here": [[], {"a.b": 3}], "not known here": [{"a.b": "nf5/64"}, {"a.b": "float32"}]}
    for message, wrong in ((message, wrong) for message, those in wrongs.items() for wrong in those):
        stored = {"format": "pt", "lora_core.fingerprint": json.dumps(mark | {"experts": wrong})}
        save_file(load_file(weights), weights, stored)
        with pytest.raises(FileFormatError, match=message):
            merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")


def test_a_merge_is_checked_and_a_probe_verified_with_the_experts_in_four_bits(tmp_path):
    model = trained("qwen3", tmp_path)
    save_probe(model, tmp_path / "adapter", {"input_ids": TOKENS})
    assert verify(tmp_path / "adapter", tmp_path / "base").passed
    merge = StreamMerge(open_checkpoint(tmp_path / "base"), [read_updates(tmp_path / "adapter")])
    (tmp_path / "merged").mkdir()
    merge.write(tmp_path / "merged")
    mine, *others = check_merge(merge, tmp_path / "merged")
    assert mine.base_as == "nf4-dequantized" and mine.relative < 1e-4
    assert {other.base_as for other in others} == {"original", "nf4"} and not any(other.obstacle for other in others)
