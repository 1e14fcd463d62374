"""The frame of `python -m lora_core`: exit codes for every way to end, and results as text or JSON."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_core.cli.command_line import run, show
from lora_core.errors import CheckFailedError, ConfigError


def ends_with(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (lambda: 0, 0, ""),
        (ends_with(ConfigError("a\nb")), 2, "error: a b\n"),
        (ends_with(CheckFailedError("too far off", [])), 1, "error: too far off\n"),
        (ends_with(KeyboardInterrupt()), 130, "error: interrupted; nothing was left\n"),
    ],
)
def test_the_exit_code_says_how_it_ended(command, code, says, capsys):
    assert run(command) == code and capsys.readouterr().err == says


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    closed = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(close=lambda: closed.append(True)))
    assert run(ends_with(BrokenPipeError())) == 0 and closed


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


@dataclass
class Result:
    path: Path
    values: tuple[float, ...]


def test_results_are_text_or_one_json_object(capsys):
    show({"a": 1, "b": "x"}, as_json=False)
    assert capsys.readouterr().out == "a: 1\nb: x\n"
    show({"found": Result(Path("x"), (1.0, math.nan, math.inf)), 3: None}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"found": {"path": "x", "values": [1.0, None, None]}, "3": None}
