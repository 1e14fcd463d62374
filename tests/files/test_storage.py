"""Adapters on disk: bit-exact round trips, strict reading that leaves the model alone, and writing whole or not at all."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lora_core import LoraConfig, delete_adapter, inject, load_adapter, merge_adapter, save_adapter, set_adapter, unload
from lora_core.errors import (
    AdapterNameError,
    ConfigError,
    FileFormatError,
    LoraError,
    StateError,
)
from lora_core.files.adapter import read_adapter
from lora_core.files.storage import CONFIG_FILE, WEIGHTS_FILE, adapter_tensors
from lora_core.model.registry import adapter_parameters, find_adapter
from tests.support import tiny
from tests.support.bad_adapters import ANY_LAYER, BAD, edit_config

X = tiny.batch()
FULL = {
    "r": 4,
    "lora_alpha": 6.5,
    "lora_dropout": 0.1,
    "target_modules": ["q", "v"],
    "modules_to_save": ["classifier"],
    "use_rslora": True,
    "rank_pattern": {"v": 3},
    "alpha_pattern": {r"layers\.1\.q": 2},
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
}


def trained(dtype=torch.float32, **settings):
    model = tiny.classifier(dtype)
    inject(model, LoraConfig(**{**FULL, **settings}))
    return tiny.randomize(model).eval()


@pytest.fixture
def saved(tmp_path):
    """A directory with a good adapter."""
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": "all"}, {"bias": "lora_only"}, {"target_modules": "all-linear", **ANY_LAYER}, ANY_LAYER]
    + [{"target_modules": r".*\.(q|v)", **ANY_LAYER}, {"modules_to_save": ["norm", "classifier"]}],
    ids=str,
)
def test_a_round_trip_is_exact(tmp_path, settings):
    model = trained(**settings)
    save_adapter(model, tmp_path)
    loaded = tiny.classifier().eval()
    report = load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(X), model(X))
    ours, theirs = adapter_tensors(model), adapter_tensors(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[k]) and t.dtype == theirs[k].dtype for k, t in ours.items())
    assert report.targets == tuple(find_adapter(model, "default").layers)
    config, again = find_adapter(model, "default").config, find_adapter(loaded, "default").config
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "layers_to_transform")
    for field in fields:
        assert getattr(config, field) == getattr(again, field), field


def test_a_second_save_is_the_same_bytes(tmp_path):
    save_adapter(trained(), tmp_path / "a")
    loaded = tiny.classifier()
    load_adapter(loaded, tmp_path / "a")
    save_adapter(loaded, tmp_path / "b")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bfloat16_adapters_stay_bfloat16_bit_for_bit(tmp_path):
    model = trained().to(torch.bfloat16)
    save_adapter(model, tmp_path)
    loaded = tiny.classifier(torch.bfloat16).eval()
    load_adapter(loaded, tmp_path)
    assert loaded.layers[0].q.lora_A["default"].dtype == torch.bfloat16
    assert all(torch.equal(t, adapter_tensors(loaded)[k]) for k, t in adapter_tensors(model).items())
    assert torch.equal(loaded(X.bfloat16()), model(X.bfloat16()))


def test_the_files_are_two_and_readable_by_anyone(saved):
    assert sorted(p.name for p in saved.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])
    fields = json.loads((saved / CONFIG_FILE).read_text())
    assert fields["peft_type"] == "LORA" and fields["inference_mode"] is True and fields["fan_in_fan_out"] is False
    modes = {os.stat(saved / f).st_mode & 0o777 for f in (CONFIG_FILE, WEIGHTS_FILE)}
    plain = saved.parent / "plain"
    plain.write_text("")
    assert modes == {os.stat(plain).st_mode & 0o777}


def test_tensor_keys_and_shapes_are_pefts(saved):
    tensors = load_file(saved / WEIGHTS_FILE)
    start = "base_model.model."
    assert tensors[f"{start}layers.0.q.lora_A.weight"].shape == (4, 64)
    assert tensors[f"{start}layers.0.v.lora_B.weight"].shape == (64, 3)
    assert tensors[f"{start}classifier.weight"].shape == (3, 64)
    assert len(tensors) == 2 * 4 + 2


def stored_targets(model, directory):
    save_adapter(model, directory)
    return json.loads((directory / CONFIG_FILE).read_text())["target_modules"]


def test_all_linear_is_written_out_by_names(tmp_path):
    assert stored_targets(trained(target_modules="all-linear", **ANY_LAYER), tmp_path) == ["q", "k", "v", "out"]


def test_names_that_would_match_more_are_written_in_full(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({"head": nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Conv1d(4, 4, 1)})})
        model["body"] = nn.ModuleList(nn.ModuleDict({n: nn.Linear(4, 4) for n in ("up", "down", "0")}) for _ in range(2))
        return model

    model = build()
    report = inject(
        model, LoraConfig(r=2, target_modules="all-linear", exclude_modules=["body.1.up"], modules_to_save=["head"])
    )
    down = ["body.0.down", "body.1.down"]  # a convolution has that name too, and head.up is trained whole
    assert stored_targets(model, tmp_path) == ["body.0.up", down[0], "body.0.0", down[1], "body.1.0"]
    assert load_adapter(build(), tmp_path).targets == report.targets


def test_an_exclusion_leaves_the_names_short(tmp_path):
    model = trained(target_modules="all-linear", exclude_modules=["0.q"], **ANY_LAYER)
    assert set(stored_targets(model, tmp_path)) == {"q", "k", "v", "out"}
    assert load_adapter(tiny.classifier(), tmp_path).targets == tuple(find_adapter(model, "default").layers)


def test_saved_modules_tied_to_each_other_are_stored(tmp_path):
    model = tiny.build("gpt2")
    tied = {"modules_to_save": ["lm_head", "wte"], "ensure_weight_tying": True}
    inject(model, LoraConfig(r=2, target_modules=["c_attn"], **tied))
    tiny.randomize(model)
    save_adapter(model, tmp_path)
    loaded = tiny.build("gpt2")
    load_adapter(loaded, tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_biases_tied_to_each_other_are_stored(tmp_path):
    config = transformers.BertConfig(**tiny.SMALL)
    model, loaded = transformers.BertForMaskedLM(config).eval(), transformers.BertForMaskedLM(config).eval()
    loaded.load_state_dict(model.state_dict())
    inject(model, LoraConfig(r=2, target_modules=["query"], bias="all"))
    save_adapter(tiny.randomize(model), tmp_path)
    load_adapter(loaded, tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_an_adapter_under_another_name_is_the_same_adapter(saved):
    model = tiny.classifier().eval()
    load_adapter(model, saved, "first")
    load_adapter(model, saved, "second")
    expected = model(X)
    set_adapter(model, "second")
    assert torch.equal(model(X), expected)


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(saved):
    for trainable in (False, True):
        model = tiny.classifier()
        load_adapter(model, saved, trainable=trainable)
        own = {id(p) for p in adapter_parameters(model, "default")}
        flags = {p.requires_grad for p in model.parameters() if id(p) in own}
        assert flags == {trainable}


def test_loading_into_an_adapter_keeps_its_parameters_and_their_flags(saved):
    model = tiny.classifier()
    inject(model, LoraConfig(**FULL))
    parameters = dict(model.named_parameters())
    load_adapter(model, saved)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert model.layers[0].q.lora_A["default"].requires_grad
    assert torch.equal(model.eval()(X), trained()(X))


def test_loading_into_an_adapter_of_other_shape_or_scale_is_refused(saved):
    for settings in ({"lora_alpha": 1}, {"rank_pattern": {}}, {"target_modules": ["q"], "rank_pattern": {}}):
        model = trained(**settings)
        before = tiny.snapshot(model)
        with pytest.raises(AdapterNameError, match="delete_adapter"):
            load_adapter(model, saved)
        assert tiny.snapshot(model) == before


def test_loading_into_a_merged_adapter_is_refused(saved):
    """Its old values are in the weights: the new ones would not take effect."""
    model = trained()
    merge_adapter(model)
    before = tiny.snapshot(model)
    with pytest.raises(StateError, match="unmerge_adapter"):
        load_adapter(model, saved)
    assert tiny.snapshot(model) == before


def test_loading_onto_a_merged_model_under_another_name_waits_its_turn(saved):
    model = trained(modules_to_save=None)
    merge_adapter(model)
    expected = model(X)
    load_adapter(model, saved, "other")
    assert torch.equal(model(X), expected)


def test_loading_and_unloading_leaves_the_plain_model(saved):
    model = tiny.classifier()
    before = tiny.snapshot(model)
    load_adapter(model, saved)
    unload(model)
    assert tiny.snapshot(model) == before
    load_adapter(model, saved)
    delete_adapter(model, "default")
    assert tiny.snapshot(model) == before


def test_a_pattern_that_misses_is_a_warning_when_every_tensor_has_a_home(saved):
    edit_config(saved, target_modules=["q", "v", "w"])
    with pytest.warns(UserWarning, match=r"\['w'\] match no module"):
        load_adapter(tiny.classifier(), saved)


# --- PEFT's spellings of "not used" -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
        {"exclude_modules": None, "revision": "main", "auto_mapping": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"lora_dropout": 0},
        {"unheard_of": None},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_accepted(saved, changes):
    edit_config(saved, **changes)
    model = tiny.classifier().eval()
    load_adapter(model, saved)
    assert torch.equal(model(X), trained()(X))


def test_layer_zero_alone_is_not_taken_for_unset(tmp_path):
    model = trained(layers_to_transform=[0], alpha_pattern={})
    save_adapter(model, tmp_path)
    edit_config(tmp_path, layers_to_transform=0)
    loaded = tiny.classifier().eval()
    assert load_adapter(loaded, tmp_path).targets == ("layers.0.q", "layers.0.v")
    assert torch.equal(loaded(X), model(X))


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("beside", [False, True], ids=["plain", "beside-another"])
def test_a_bad_adapter_is_refused_and_the_model_left_as_it_was(saved, case, beside):
    spoil, error, message = BAD[case]
    spoil(saved)
    model = tiny.classifier()
    if beside:
        inject(model, LoraConfig(target_modules=["q"]), "other")
    before = tiny.snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load_adapter(model, saved)
    assert isinstance(caught.value, LoraError) and "\n" not in str(caught.value)
    assert tiny.snapshot(model) == before


def test_a_file_in_place_of_the_directory_is_refused(saved):
    with pytest.raises(FileFormatError, match="is not a directory"):
        load_adapter(tiny.classifier(), saved / CONFIG_FILE)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "/root"])
def test_an_adapter_name_is_never_a_path(saved, name):
    model = tiny.classifier()
    before = tiny.snapshot(model)
    with pytest.raises(ConfigError, match="adapter_name"):
        load_adapter(model, saved, name)
    assert tiny.snapshot(model) == before
    with pytest.raises(AdapterNameError):
        save_adapter(trained(), saved, name)


def test_a_model_of_another_width_is_refused(saved):
    model = tiny.Classifier(width=32)
    with pytest.raises(FileFormatError, match=r"10 wrong shapes|9 wrong shapes"):
        load_adapter(model, saved)


# --- writing ----------------------------------------------------------------------------------------------------------


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_files_and_nothing_else(saved, monkeypatch, call):
    before = contents(saved)

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(tiny.randomize(trained(), seed=9), saved)
    assert contents(saved) == before


def test_a_leftover_of_a_killed_process_is_in_nobodys_way(saved):
    """A container's process often has the id that the one before had."""
    (saved / f".{WEIGHTS_FILE}.{os.getpid()}.tmp").write_text("half")
    model = tiny.randomize(trained(), seed=9)
    save_adapter(model, saved)
    assert all(torch.equal(t, adapter_tensors(model)[k]) for k, t in read_adapter(saved)[1].items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_written(tmp_path, bad):
    model = trained()
    model.layers[0].q.lora_B["default"].data[0, 0] = bad
    with pytest.raises(FileFormatError, match=r"layers\.0\.q\.lora_B.*not saved"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unknown_adapter_is_not_written(tmp_path):
    with pytest.raises(AdapterNameError, match="'other'"):
        save_adapter(trained(), tmp_path / "new", "other")
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_target_directory_is_a_lora_error(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(LoraError, match="taken"):
        save_adapter(trained(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saving_through_a_compiled_wrapper_uses_the_models_own_paths(tmp_path, saved):
    save_adapter(torch.compile(trained(), backend="eager"), tmp_path / "compiled")
    assert contents(tmp_path / "compiled") == contents(saved)


def test_an_inactive_adapter_can_be_saved(tmp_path):
    model = trained()
    inject(model, LoraConfig(r=2, target_modules=["out"], modules_to_save=["classifier"]), "other")
    tiny.randomize(model, "other")
    save_adapter(model, tmp_path, "other")
    set_adapter(model, "other")
    loaded = tiny.classifier().eval()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(X), model(X))


def test_a_model_without_layers_to_adapt_is_refused(saved):
    with pytest.raises(FileFormatError, match="match no layer"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), saved)


def test_the_order_of_patterns_survives(tmp_path):
    """The first hit wins, so a file with sorted patterns would be another adapter."""
    model = tiny.classifier()
    patterns = {"layers.0.v": 2, "0.v": 3, "v": 5}
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=["v"], rank_pattern=patterns, alpha_pattern=patterns))
    save_adapter(tiny.randomize(model), tmp_path)
    again = tiny.classifier()
    load_adapter(again, tmp_path)
    assert [layer.v.lora_A["default"].shape[0] for layer in again.layers] == [2, 5]
    assert torch.equal(again(tiny.batch()), model(tiny.batch()))
