"""Files whose names are those of another version of the model, or of a wrapper: found where that is sure, else refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import LoraConfig, inject, load_adapter, save_adapter
from lora_core.errors import FileFormatError, LoraError, WrongBaseError
from lora_core.files.adapter import CONFIG_FILE, FINGERPRINT, WEIGHTS_FILE, read_adapter
from lora_core.model.registry import find_adapter
from tests.support import tiny
from tests.support.bad_adapters import edit_config

PREFIX = "base_model.model."
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.q(x) * self.v(x)


class Tower(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Wrapped(nn.Module):
    """A tower inside of others, as `path` says, and a head."""

    def __init__(self, path, **others):
        super().__init__()
        self.path = path
        inner = Tower()
        for name in reversed(path.split(".")):
            inner = nn.ModuleDict({name: inner})
        self.update(inner)
        for name, module in others.items():
            self.add_module(name, module)
        self.head = nn.Linear(8, 2)

    def update(self, modules):
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.head(self.get_submodule(self.path)(x))


def build(path, **others):
    """The same weights, whatever it is called."""
    torch.manual_seed(0)
    return Wrapped(path, **others).eval()


def adapter(model, directory, **settings):
    """Files of a trained adapter of `model`, and what it makes of X."""
    inject(model, LoraConfig(**{"r": 2, "target_modules": ["q", "v"], **settings}))
    save_adapter(tiny.randomize(model).eval(), directory)
    return model(X)


def rename(directory, change):
    tensors = load_file(directory / WEIGHTS_FILE)
    save_file({change(key): tensor for key, tensor in tensors.items()}, directory / WEIGHTS_FILE, {"format": "pt"})


SETTINGS = {
    "names": {},
    "an expression for names of then": {"target_modules": r"language_model\.model\.layers\.\d\.[qv]"},
    "whole paths": {"target_modules": ["language_model.model.layers.0.q", "language_model.model.layers.1.v"]},
    "ranks and alphas by whole paths": {
        "rank_pattern": {r"language_model\.model\.layers\.0\.q": 3, "v": 1},
        "alpha_pattern": {r"language_model\.model\.layers\.1\..*": 5},
        "use_rslora": True,
    },
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclusions": {"exclude_modules": ["language_model.model.layers.1.q"]},
    "DoRA": {"use_dora": True},
    "a head": {"modules_to_save": ["head"]},
    "a module with a path": {"target_modules": ["q"], "modules_to_save": ["language_model.model.layers.1.v"]},
    "biases": {"bias": "all"},
    "biases of the layers": {"bias": "lora_only"},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_layers_are_found_by_their_ends(settings, tmp_path):
    expected = adapter(build("language_model.model"), tmp_path, **SETTINGS[settings])
    model = build("model.language_model")
    with pytest.warns(UserWarning, match="otherwise than this model, 'model.language_model.layers") as caught:
        report = load_adapter(model, tmp_path)
    assert caught[0].filename == __file__
    assert torch.equal(model(X), expected)
    assert report.moved and all(new == f"model.language_model{old[20:]}" for new, old in report.moved.items())
    assert f"; {len(report.moved)} modules have other names in the file" in str(report)


def test_it_is_saved_by_the_names_of_now(tmp_path):
    settings = {"rank_pattern": {r"language_model\.model\.layers\.0\.q": 3}}
    expected = adapter(build("language_model.model"), tmp_path / "old", **settings)
    model = build("model.language_model")
    with pytest.warns(UserWarning, match="otherwise"):
        load_adapter(model, tmp_path / "old")
    save_adapter(model, tmp_path / "new")
    again = build("model.language_model")
    with warnings.catch_warnings(action="error"):
        assert load_adapter(again, tmp_path / "new").moved == {}
    assert torch.equal(again(X), expected)


def test_one_that_is_there_is_filled_again(tmp_path):
    expected = adapter(build("language_model.model"), tmp_path)
    model = build("model.language_model")
    for _ in range(2):
        with pytest.warns(UserWarning, match="otherwise"):
            report = load_adapter(model, tmp_path)
        assert report.moved
    assert torch.equal(model(X), expected)


def test_the_fingerprint_still_tells_another_base(tmp_path):
    adapter(build("language_model.model"), tmp_path)
    assert read_adapter(tmp_path).fingerprint
    model = build("model.language_model")
    nn.init.ones_(model.model.language_model.layers[0].q.weight)
    with pytest.raises(WrongBaseError, match=r"language_model\.model\.layers\.0\.q .* has other values"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(("then", "now"), [("model", "tower.model"), ("model.body", "body"), ("a.b.c", "c.a")])
def test_parts_may_come_and_go(then, now, tmp_path):
    expected = adapter(build(then), tmp_path)
    model = build(now)
    with pytest.warns(UserWarning, match="otherwise"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(("then", "now"), [("bert", "roberta"), ("model.bert", "model.roberta")])
def test_an_adapter_of_another_model_is_not_taken_for_one_of_this(then, now, tmp_path):
    adapter(build(then), tmp_path)
    model = build(now)
    before = tiny.snapshot(model)
    with pytest.raises(FileFormatError, match="does not fit this base"):
        load_adapter(model, tmp_path)
    assert tiny.snapshot(model) == before


def test_two_places_are_refused_by_name(tmp_path):
    adapter(build("model"), tmp_path)
    model = build("model.text", vision=nn.ModuleDict({"model": Tower()}))
    before = tiny.snapshot(model)
    with pytest.raises(FileFormatError) as caught:
        load_adapter(model, tmp_path)
    assert "no 'model.layers.0.q', which could be 'model.text.layers.0.q' or 'vision.model.layers.0.q'" in str(caught.value)
    assert tiny.snapshot(model) == before


def test_of_two_places_the_one_counts_that_has_all_layers(tmp_path):
    expected = adapter(build("model"), tmp_path)
    model = build("model.text", vision=nn.ModuleDict({"model": Tower(1)}))
    edit_config(tmp_path, target_modules=[f"model.layers.{n}.{name}" for n in (0, 1) for name in "qv"])
    with pytest.warns(UserWarning, match="otherwise"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(X), expected)


def test_parts_that_the_file_says_nothing_of_are_told(tmp_path):
    expected = adapter(build("language_model.model"), tmp_path)
    model = build("model.language_model", vision=Tower(3))
    with pytest.warns(UserWarning, match="6 layers, 'vision.layers.0.q' among them, are in parts that it says nothing of"):
        report = load_adapter(model, tmp_path)
    assert torch.equal(model(X), expected)
    assert len(report.left_out) == 6 and set(report.left_out.values()) == {"the file has no tensors for it"}


def test_a_layer_too_few_is_still_missed(tmp_path):
    adapter(build("language_model.model"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({k: t for k, t in tensors.items() if "layers.1.q" not in k}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(FileFormatError, match=r"2 missing tensors \(base_model.model.model.language_model.layers.1.q"):
        load_adapter(build("model.language_model"), tmp_path)


def test_a_layer_too_many_is_still_refused(tmp_path):
    adapter(build("language_model.model"), tmp_path)
    edit_config(tmp_path, target_modules=["q"])
    with pytest.raises(FileFormatError, match="4 tensors without a home"):
        load_adapter(build("model.language_model"), tmp_path)


def test_a_tensor_of_another_shape_is_still_refused(tmp_path):
    adapter(build("language_model.model"), tmp_path)
    edit_config(tmp_path, r=4)
    with pytest.raises(FileFormatError, match="8 wrong shapes"):
        load_adapter(build("model.language_model"), tmp_path)


def test_attention_moves_with_its_projection(tmp_path):
    """PEFT's name for that is not its path."""

    def build(*names):
        torch.manual_seed(0)
        inner = nn.ModuleDict({"layers": nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])})
        for name in reversed(names):
            inner = nn.ModuleDict({name: inner})
        return inner.eval()

    then, now = build("text", "model"), build("model", "text")
    inject(then, LoraConfig(r=2, target_modules=["0"]))
    save_adapter(tiny.randomize(then), tmp_path)
    with pytest.warns(UserWarning, match="calls 2 modules otherwise"):
        load_adapter(now, tmp_path)
    x = X[None]
    assert torch.equal(now.model.text.layers[0](x, x, x)[0], then.text.model.layers[0](x, x, x)[0])


# --- transformers' tables ---------------------------------------------------------------------------------------------


def test_the_table_of_transformers_4_is_read_where_the_model_has_it(tmp_path):
    adapter(build("old"), tmp_path)
    model = build("brand.new")
    model._checkpoint_conversion_mapping = {r"^old\.": "brand.new."}
    with pytest.warns(UserWarning, match=r"'brand\.new\.layers\.0\.q' for one: 'old\.layers\.0\.q'"):
        assert len(load_adapter(model, tmp_path).moved) == 4


def test_two_names_of_one_module_are_refused(tmp_path):
    adapter(build("old"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file(tensors | {k.replace("old", "older"): t.clone() for k, t in tensors.items()}, tmp_path / WEIGHTS_FILE)
    model = build("new")
    model._checkpoint_conversion_mapping = {r"^old(er)?\.": "new."}
    with pytest.raises(FileFormatError, match="'old.layers.0.q' and 'older.layers.0.q' are both 'new.layers.0.q'"):
        load_adapter(model, tmp_path)


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wraps_an_adapted_model_is_passed_over(start, tmp_path):
    expected = adapter(build("model"), tmp_path)
    rename(tmp_path, lambda key: start + key)
    model = build("model")
    with warnings.catch_warnings(action="error"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wraps_the_base_is_passed_over(start, tmp_path):
    expected = adapter(build("model"), tmp_path)
    rename(tmp_path, lambda key: key.replace(PREFIX, PREFIX + start))
    model = build("model")
    with pytest.warns(UserWarning, match="otherwise"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(X), expected)


def test_a_compiled_part_is_that_part(tmp_path):
    """Whichever side it is compiled on."""
    expected = adapter(build("model"), tmp_path)
    model = build("model")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    with pytest.warns(UserWarning, match=r"'model\.layers\.0\._orig_mod\.q' for one: 'model\.layers\.0\.q'"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(X), expected)


def test_a_module_that_is_called_module_is_one(tmp_path):
    expected = adapter(build("module"), tmp_path)
    model = build("module")
    with warnings.catch_warnings(action="error"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(X), expected)


def test_nothing_is_looked_for_where_all_is_there(tmp_path, monkeypatch):
    adapter(build("model"), tmp_path)
    monkeypatch.setattr("lora_core.files.moved.renaming", lambda model: pytest.fail("it was"))
    model = build("model", other=nn.ModuleDict({"model": Tower()}))
    with pytest.raises(LoraError, match="missing"):
        load_adapter(model, tmp_path)
    model = build("model")
    load_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == ["q", "v"]
    assert find_adapter(model, "default").config.target_modules == ("q", "v") and FINGERPRINT
