"""`load_adapter(..., replace=True)`: an adapter of other layers or another rank in the place of one, under its name."""

import pytest
import torch

from lora_core import LoraConfig, inject, load_adapter, merge_adapter, save_adapter, set_adapter, trainable_parameters, unload
from lora_core.errors import AdapterNameError, FileFormatError, StateError, TargetError
from lora_core.model.registry import registry_of
from tests.support import tiny


def build():
    return tiny.build("bert")


@torch.no_grad()
def logits(model):
    return model(tiny.TOKENS).logits


def saved(directory, seed=1, **settings):
    model = build()
    inject(model, LoraConfig(**{"r": 2, "target_modules": ["query"], "init_lora_weights": False} | settings))
    tiny.randomize(model, "default", seed=seed)
    save_adapter(model, directory)
    return model


OTHERS = {
    "another rank": {"r": 5},
    "another scaling": {"lora_alpha": 3},
    "other layers": {"target_modules": ["key", "attention.output.dense"]},
    "DoRA": {"use_dora": True},
    "what was trained whole": {"target_modules": ["classifier"]},
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("alone", [True, False])
def test_another_adapter_takes_its_place_its_name_and_its_state(case, alone, tmp_path):
    saved(tmp_path / "old", modules_to_save=["classifier"])
    expected = logits(saved(tmp_path / "new", 2, **OTHERS[case]))
    model = build()
    before = tiny.snapshot(model)
    if not alone:
        inject(model, LoraConfig(r=3, target_modules=["value"], init_lora_weights=False), "first")
    load_adapter(model, tmp_path / "old", trainable=True)
    if not alone:
        inject(model, LoraConfig(r=3, target_modules=["value"]), "last")
    set_adapter(model, "default")
    with pytest.raises((AdapterNameError, TargetError), match=r"pass replace=True|trained whole"):
        load_adapter(model, tmp_path / "new")
    load_adapter(model, tmp_path / "new", replace=True)
    torch.testing.assert_close(logits(model), expected)
    registry = registry_of(model)
    assert registry.active == ("default",) and trainable_parameters(model)
    assert list(registry.adapters) == (["default"] if alone else ["first", "default", "last"])
    unload(model)
    assert tiny.snapshot(model) == before


def test_one_that_waits_goes_on_waiting(tmp_path):
    saved(tmp_path / "old")
    saved(tmp_path / "new", 2, r=4)
    model = build()
    inject(model, LoraConfig(r=3, target_modules=["value"], init_lora_weights=False), "first")
    load_adapter(model, tmp_path / "old")
    expected = logits(model)
    load_adapter(model, tmp_path / "new", replace=True)
    assert torch.equal(logits(model), expected) and registry_of(model).active == ("first",)


def test_where_its_values_fit_the_parameters_stay(tmp_path):
    saved(tmp_path / "old")
    expected = logits(saved(tmp_path / "new", 2))
    model = build()
    load_adapter(model, tmp_path / "old", trainable=True)
    parameters = [id(p) for p in trainable_parameters(model)]
    load_adapter(model, tmp_path / "new", replace=True)
    assert [id(p) for p in trainable_parameters(model)] == parameters and torch.equal(logits(model), expected)


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    saved(tmp_path / "old")
    saved(tmp_path / "new", 2, r=4)
    weights = tmp_path / "new" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    model = build()
    load_adapter(model, tmp_path / "old")
    before, expected = tiny.snapshot(model), logits(model)
    with pytest.raises(FileFormatError, match="missing tensors"):
        load_adapter(model, tmp_path / "new", replace=True)
    assert tiny.snapshot(model) == before and torch.equal(logits(model), expected)


def test_one_that_is_folded_is_not_replaced(tmp_path):
    saved(tmp_path / "old")
    saved(tmp_path / "new", 2, r=4)
    model = build()
    load_adapter(model, tmp_path / "old")
    merge_adapter(model)
    with pytest.raises(StateError, match="call unmerge_adapter"):
        load_adapter(model, tmp_path / "new", replace=True)


def test_a_name_that_is_free_needs_no_replacing(tmp_path):
    expected = logits(saved(tmp_path / "new"))
    model = build()
    load_adapter(model, tmp_path / "new", replace=True)
    assert torch.equal(logits(model), expected)
