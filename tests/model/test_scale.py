"""`scale_adapter`: updates times a factor, in the forward, in merges and in files."""

import copy
import json

import pytest
import torch
from torch import nn

from lora_core import (
    LoraConfig,
    VeraConfig,
    combine_adapters,
    initialize_eva,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    rename_adapter,
    save_adapter,
    scale_adapter,
    unload,
    unmerge_adapter,
)
from lora_core.errors import AdapterNameError, ConfigError, StateError
from tests.support import tiny

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def adapted(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))
    inject(model, LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0", "1"], "init_lora_weights": False} | settings))
    return model


def by_hand(model, factor):
    """The output of two layers with s B A times the factor; s is 3."""
    x = X
    for layer in model:
        x = x @ layer.weight.t() + layer.bias + factor * 3 * x @ layer.lora_A["default"].t() @ layer.lora_B["default"].t()
    return x


@pytest.mark.parametrize("factor", [0, 0.5, 2, -1.5])
def test_updates_are_multiplied_and_a_second_factor_takes_the_place_of_the_first(factor):
    model = adapted()
    plain, expected = model(X), by_hand(model, factor)
    scale_adapter(model, "default", 7.0)
    scale_adapter(model, "default", factor)
    torch.testing.assert_close(model(X), expected)
    merged = copy.deepcopy(model)
    merge_and_unload(merged)
    torch.testing.assert_close(merged(X), expected, rtol=1e-5, atol=1e-5)
    scale_adapter(model, "default", 1)
    assert torch.equal(model(X), plain)


def test_as_a_context_it_ends_also_through_an_error_and_nests():
    model = adapted()
    plain = model(X)
    with pytest.raises(ZeroDivisionError), scale_adapter(model, "default", 0.5) as outer:
        half = model(X)
        with scale_adapter(model, "default", 2):
            torch.testing.assert_close(model(X), by_hand(model, 2))
        assert torch.equal(model(X), half) and outer.before == 1
        raise ZeroDivisionError
    assert torch.equal(model(X), plain)


def test_files_have_it_in_alpha(tmp_path):
    model = adapted(alpha_pattern={"1": 4}, rank_pattern={"0": 3})
    scale_adapter(model, "default", 0.25)
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["lora_alpha"] == 1.5 and fields["alpha_pattern"] == {"1": 1.0}
    again = adapted()
    unload(again)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), model(X))
    load_adapter(model, tmp_path)  # over itself: its values are the same
    torch.testing.assert_close(again(X), model(X))
    for factor in (0, -1):
        scale_adapter(model, "default", factor)
        with pytest.raises(ConfigError, match="can't be stored: lora_alpha is positive"):
            save_adapter(model, tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_what_it_goes_with_and_what_not():
    model = adapted()
    scale_adapter(model, "default", 0.5)
    expected = model(X)
    combine_adapters(model, ["default"], [1.0], "sum")
    rename_adapter(model, "default", "other")
    assert torch.equal(model(X), expected)
    scale_adapter(model, "other", 1)
    model = adapted()
    scale_adapter(model, "default", 0.5)
    with pytest.raises(StateError, match=r"scaled by 0.5; scale_adapter\(model, 'default', 1\)"):
        initialize_eva(model, [X])
    merge_adapter(model)
    with pytest.raises(StateError, match="folded into the weights; call unmerge_adapter"):
        scale_adapter(model, "default", 2)
    unmerge_adapter(model)
    for bad in ("half", None, float("nan"), True):
        with pytest.raises(ConfigError, match="factor must be a finite number"):
            scale_adapter(model, "default", bad)
    with pytest.raises(AdapterNameError, match="no adapter 'b'"):
        scale_adapter(model, "b", 2)


def test_vera_is_scaled_and_not_stored_so(tmp_path):
    model = tiny.classifier().eval()
    inject(model, VeraConfig(r=4, target_modules=["q"]))
    scale_adapter(model, "default", 0.5)
    with pytest.raises(ConfigError, match="VeRA's files have no scaling"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("factor", [0.1, 0.7, 1 / 3, 0.5])
@pytest.mark.parametrize("settings", [{}, {"r": 3, "lora_alpha": 7}, {"use_rslora": True}], ids=str)
def test_a_scaled_adapter_loads_the_file_that_it_wrote(tmp_path, factor, settings):
    model = adapted(**settings)
    scale_adapter(model, "default", factor)
    parameters, expected = list(model.parameters()), model(X)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(X), expected)


def test_leaving_scales_no_other_adapter_that_took_the_name(tmp_path):
    model, other = adapted(), adapted(r=4)
    save_adapter(other, tmp_path)
    with scale_adapter(model, "default", 2.0):
        load_adapter(model, tmp_path, replace=True)
        expected = model(X)
    assert torch.equal(model(X), expected)
