"""The layers of an adapter as lines: what counts as one kind, how long the bars are, what can't be counted."""

import math

import pytest

from lora_core.deploy.layer_views import WIDTH, LayerView, by_kind, each, kind


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model.layers.11.mlp.fc1", "model.layers.*.mlp.fc1"),
        ("0", "*"),
        ("h.0", "h.*"),
        ("experts.3.w2", "experts.*.w2"),
        ("lora_unet_down_blocks_0_resnets_12_conv1", "lora_unet_down_blocks_*_resnets_*_conv1"),
    ],
)
def test_numbers_by_themselves_are_left_open(path, found):
    assert kind(path) == found


def test_bars_are_shares_of_the_largest_and_ranges_are_told():
    views = [LayerView("a.0", 4, 2.0, 8.0, 3.0), LayerView("a.1", 8, 1.0, 4.0, 5.0), LayerView("b", 4, 2.0, 1.5, 1.0)]
    a, b = by_kind(views).splitlines()[1:3]
    assert a.split() == ["a.*", "2", "4", "to", "8", "1", "to", "2", "6", "#" * WIDTH, "4.00"]
    assert b.split() == ["b", "1", "4", "2", "1.5", "#" * (WIDTH // 4), "1.00"]
    assert len(each(views).splitlines()) == 4


@pytest.mark.parametrize("norm", [0.0, math.nan])
def test_what_changes_nothing_or_is_no_number_has_no_bar(norm):
    assert "#" not in by_kind([LayerView("a.0", 4, 2.0, norm, norm)])


def test_names_out_of_a_file_can_t_move_the_cursor():
    assert "\x1b" not in by_kind([LayerView("a\x1b[2J", 4, 2.0, 1.0, 1.0)]) + each([LayerView("a\x1b[2J", 4, 2.0, 1.0, 1.0)])
