"""Bars: on a terminal alone, for what takes long alone; what is watched is what comes out."""

import io

import pytest
from torch import nn

from lora_core import LoraConfig, combine_adapters, inject, progress, quantize_nf4


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal(monkeypatch, seconds=0.0):
    """Standard error as a terminal would be. Not as a fixture: pytest gives the stream back before a test's own lines run."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", seconds)
    return stream


def test_a_bar_is_drawn_on_a_terminal(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    assert list(progress.watched(range(3), "counting")) == [0, 1, 2]
    assert "counting" in terminal.getvalue()
    with progress.counted(2000, "writing") as bar:
        bar(500)
    assert "writing" in terminal.getvalue() and "2.00k" in terminal.getvalue()


def test_nothing_is_drawn_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert list(progress.watched(range(3), "counting")) == [0, 1, 2]
    with progress.counted(2000, "writing") as bar:
        bar(500)
    assert capsys.readouterr() == ("", "")


def test_what_is_done_at_once_shows_no_bar(monkeypatch):
    terminal = on_a_terminal(monkeypatch, seconds=60.0)
    assert list(progress.watched(range(3), "counting")) == [0, 1, 2] and not terminal.getvalue()


def test_a_verb_that_takes_long_has_one(monkeypatch):
    pytest.importorskip("bitsandbytes")
    terminal = on_a_terminal(monkeypatch)
    quantize_nf4(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert "packing layers in NF4" in terminal.getvalue()


def test_combining_has_one(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name in ("a", "b"):
        inject(model, LoraConfig(r=2, target_modules=["0", "1"]), name)
    terminal = on_a_terminal(monkeypatch)
    combine_adapters(model, ["a", "b"], [1, 1], "both", "cat")
    assert "combining" in terminal.getvalue()
