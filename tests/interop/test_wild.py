"""Configurations that people have published, and the calls in their code; see `tests/support/wild.py`."""

import os
from pathlib import Path

import pytest

from lora_core import LoraConfig
from tests.support import ROOT

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

wild = pytest.importorskip("tests.support.wild")


@pytest.fixture(scope="module")
def directory():
    """$WILD_DIR, or ../shared/wild beside the checkout."""
    directory = Path(os.environ.get("WILD_DIR") or ROOT.parent / "shared" / "wild")
    if not (directory / "calls.json").is_file():
        pytest.skip(f"published configurations are not at {directory}; set WILD_DIR to where calls.json and configs/ are")
    return directory


def test_every_lora_configuration_that_peft_reads_is_read_alike(directory):
    found = {name: pair for name, pair in wild.files(directory).items() if isinstance(pair[0], peft.LoraConfig)}
    assert found
    assert {name: str(ours) for name, (_, ours) in found.items() if not isinstance(ours, LoraConfig)} == {}
    for name, (theirs, ours) in found.items():
        targets = theirs.target_modules
        assert (ours.r, ours.lora_alpha) == (theirs.r, theirs.lora_alpha), name
        assert ours.target_modules == (targets if isinstance(targets, str | None) else tuple(targets)) or (
            set(ours.target_modules) == set(targets)
        ), name
        assert (ours.use_dora, ours.use_rslora, ours.bias) == (theirs.use_dora, theirs.use_rslora, theirs.bias), name


def test_what_is_no_lora_configuration_is_refused(directory):
    found = {name: ours for name, (theirs, ours) in wild.files(directory).items() if not isinstance(theirs, peft.LoraConfig)}
    assert found and not [name for name, ours in found.items() if isinstance(ours, LoraConfig)]


def test_every_call_that_peft_takes_is_taken_or_refused_by_name(directory):
    taken = wild.calls(directory)
    assert taken
    refused = [(call, error) for call, by_peft, error in taken if by_peft and not isinstance(error, LoraConfig)]
    assert [(call, str(error)) for call, error in refused if not wild.refused_by_name(call, error)] == []
