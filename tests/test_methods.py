"""The recipes say what the study says, and a schedule refuses what makes no sense."""

import dataclasses
import subprocess
import sys

import pytest

from experiments.errors import ExperimentError
from experiments.methods import METHODS, Schedule


def test_lora_and_qlora_differ_in_the_base_alone():
    lora, qlora = METHODS["lora"], METHODS["qlora"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.1)
    assert lora.roles == ("query", "key", "value", "output")
    assert dataclasses.replace(lora, name="qlora", summary=qlora.summary, quantize=True) == qlora


def test_the_base_trains_nothing():
    assert not METHODS["base"].adapt and not METHODS["base"].quantize


def test_every_method_is_listed_under_its_name():
    assert all(name == method.name and method.summary for name, method in METHODS.items())


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS["lora"].r = 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("max_length", 0),
        ("train_samples", 0),
        ("max_steps", 0),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("warmup", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.01),
        ("max_grad_norm", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_name(field, value):
    with pytest.raises(ExperimentError, match=field):
        Schedule(**{field: value})


def test_the_flags_need_no_transformers():
    # --help and a misspelt flag are answered from here; they must not wait seconds for it
    code = "import sys, experiments.methods, experiments.command, experiments.sst2; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
