"""Flags that the commands share: every field has one, lists are lists, and methods come in the study's order."""

import argparse

import pytest

from experiments import flags
from experiments.errors import ExperimentError
from experiments.methods import Schedule
from experiments.recipes import METHODS


def parsed(*argv, **kwargs):
    p = argparse.ArgumentParser()
    flags.schedule_flags(p, **kwargs)
    return p.parse_args(argv)


def test_every_field_of_a_schedule_has_a_flag_and_its_own_default():
    args = parsed()
    assert flags.schedule_of(args, METHODS["lora"]) == Schedule()
    assert flags.schedule_of(args, METHODS["full"]) == Schedule(learning_rate=5e-5)


def test_defaults_of_a_command_and_flags_that_are_left_out():
    args = parsed("--batch-size", "8", without=("seed", "learning_rate"), epochs=1)
    made = flags.schedule_of(args, METHODS["lora"], seed=3, learning_rate=1e-4)
    assert made == Schedule(epochs=1, batch_size=8, seed=3, learning_rate=1e-4)
    with pytest.raises(SystemExit):
        parsed("--seed", "1", without=("seed",))


def test_a_value_that_makes_no_sense_is_refused():
    with pytest.raises(ExperimentError, match="batch_size must be at least 1, not 0"):
        flags.schedule_of(parsed("--batch-size", "0"), METHODS["lora"])


def test_lists():
    assert flags.names("a, b") == ("a", "b")
    assert flags.listed(int)("1,2") == (1, 2) and flags.listed(float)("1e-4") == (1e-4,)
    for kind, text in ((str, "a,,b"), (int, "1,x"), (int, "")):
        with pytest.raises(argparse.ArgumentTypeError, match="no comma-separated list"):
            flags.listed(kind)(text)


def test_methods_come_once_and_in_order():
    assert [m.name for m in flags.methods_of(["qlora", "base", "qlora"])] == ["base", "qlora"]
    with pytest.raises(ExperimentError, match="there is no 'lorra'"):
        flags.methods_of(["lora", "lorra"])
