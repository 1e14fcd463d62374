"""Every number that a user gives: what is no number, not finite or out of range is refused in one line, and nothing changes."""

import math

import pytest
import torch
import transformers

from lora_core import (
    LoraConfig,
    combine_adapters,
    initialize_eva,
    inject,
    lora_plus_groups,
    merge_and_unload,
    quantize_nf4,
    save_adapter,
)
from lora_core.__main__ import main
from lora_core.deploy.check import check_merge
from lora_core.deploy.convert import convert_adapter
from lora_core.deploy.probe import save_probe
from lora_core.deploy.recipe import Recipe
from lora_core.deploy.stream import StreamMerge
from lora_core.deploy.updates import read_updates
from lora_core.deploy.verification import verify
from lora_core.errors import ConfigError, LoraError
from lora_core.files.checkpoint import open_checkpoint
from tests.support import tiny

NOT_FINITE = [math.nan, math.inf, -math.inf, "1", True, [1.0], 10**400]
SMALL = {**tiny.SMALL, "num_key_value_heads": 2}
#: {argument: what is not allowed besides NOT_FINITE}.
TABLE = {
    "merge weights": [None],
    "merge weights, bare": [0, 0.5],
    "combine weights": [None],
    "combine r": [0, -1, 1.5],
    "combine density": [0, -0.1, 1.1],
    "combine seed": [1.5, 2**64, -(2**63) - 1],
    "convert r": [0, -1, 1.5],
    "verify tolerance": [-1, -1e-9],
    "check tolerance": [-1, -1e-9],
    "r": [None, 0, -1, 1.5],
    "lora_alpha": [None, 0, -1, 1e39],
    "lora_dropout": [None, -0.1, 1, 1.5],
    "rank_pattern": [None, 0, -1, 1.5],
    "alpha_pattern": [None, 0, -1, 1e39],
    "layers_to_transform": [-1, 1.5],
    "lora_plus lr": [None, 0, -1],
    "lora_plus ratio": [None, 0, -1],
    "eva rho": [None, 0.5, 0, -1],
    "nf4 block_size": [None, 0, -64, 65],
}
INDEX_IS_ENOUGH = ("layers_to_transform", 10**400)  # an integer, of a layer that no model has: a target that matches nothing
FLAGS = [("--weights", bad) for bad in ("nan", "inf", "1e999", "one")] + [("--tolerance", bad) for bad in ("nan", "inf", "-1")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a LoRA adapter with a probe, a DoRA adapter, and the first one merged."""
    place = tmp_path_factory.mktemp("numbers")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(place / "base")
    for name, dora in (("lora", False), ("dora", True)):
        model = transformers.LlamaForCausalLM.from_pretrained(place / "base").eval()
        inject(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora, task_type="CAUSAL_LM"))
        save_adapter(tiny.randomize(model), place / name)
        save_probe(model, place / name, {"input_ids": tiny.TOKENS})
    return place


def calls(place, bad):
    model = tiny.classifier()
    for name in "ab":
        inject(model, LoraConfig(r=2, target_modules=["q"]), name)
    stream = StreamMerge(open_checkpoint(place / "base"), [read_updates(place / "lora")])
    config = {"target_modules": ["q"]}
    return model, {
        "merge weights": lambda: Recipe(weights=(bad,)),
        "merge weights, bare": lambda: Recipe(weights=bad if bad != [1.0] else [[1.0]]),
        "combine weights": lambda: combine_adapters(model, ["a", "b"], [1.0, bad], "c"),
        "combine r": lambda: combine_adapters(model, ["a"], [1.0], "c", "svd", r=bad),
        "combine density": lambda: combine_adapters(model, ["a"], [1.0], "c", "ties", density=bad),
        "combine seed": lambda: combine_adapters(model, ["a"], [1.0], "c", "ties", density=0.5, seed=bad),
        "convert r": lambda: convert_adapter(place / "dora", place / "new", plain=True, base=place / "base", r=bad),
        "verify tolerance": lambda: verify(place / "lora", place / "base", tolerance=bad),
        "check tolerance": lambda: check_merge(stream, place / "base", tolerance=bad),
        "r": lambda: LoraConfig(r=bad, **config),
        "lora_alpha": lambda: LoraConfig(lora_alpha=bad, **config),
        "lora_dropout": lambda: LoraConfig(lora_dropout=bad, **config),
        "rank_pattern": lambda: LoraConfig(rank_pattern={"q": bad}, **config),
        "alpha_pattern": lambda: LoraConfig(alpha_pattern={"q": bad}, **config),
        "layers_to_transform": lambda: LoraConfig(layers_to_transform=bad if bad != [1.0] else [[1]], **config),
        "lora_plus lr": lambda: lora_plus_groups(model, bad),
        "lora_plus ratio": lambda: lora_plus_groups(model, 1e-3, bad),
        "eva rho": lambda: initialize_eva(model, [tiny.batch()], "a", rho=bad),
        "nf4 block_size": lambda: quantize_nf4(model, block_size=bad),
    }


@pytest.mark.parametrize("argument", TABLE)
def test_a_number_out_of_range_is_refused_in_one_line(argument, place):
    for bad in (*NOT_FINITE, *TABLE[argument]):
        if (argument, bad) == INDEX_IS_ENOUGH:
            continue
        model, table = calls(place, bad)
        before = tiny.snapshot(model)
        with pytest.raises(LoraError) as caught:
            table[argument]()
            pytest.fail(f"{argument}: {bad!r} is taken")
        assert "\n" not in str(caught.value)
        assert tiny.snapshot(model) == before and not (place / "new").exists()


def test_the_table_has_every_call(place):
    assert calls(place, 1)[1].keys() == TABLE.keys()


def test_no_weights_are_not_the_same_as_none_given(place):
    with pytest.raises(ConfigError, match=r"0 weights are given for 1 adapters"):
        StreamMerge(open_checkpoint(place / "base"), [read_updates(place / "lora")], Recipe(weights=()))


def test_what_is_allowed_stays_so(place):
    stream = StreamMerge(open_checkpoint(place / "base"), [read_updates(place / "lora")], Recipe(weights=[-0.5]))
    assert stream.recipe.weights == (-0.5,)
    assert verify(place / "lora", place / "base", tolerance=0).tolerance == 0
    model, _ = calls(place, 1)
    batches = [tiny.batch()] * 4
    assert initialize_eva(model, batches, "a", rho=1e308).ranks == initialize_eva(model, batches, "a", rho=64).ranks
    merge_and_unload(model)


@pytest.mark.parametrize(("flag", "bad"), FLAGS)
def test_on_the_command_line(flag, bad, place, capsys):
    arguments = ["--base", place / "base", "--adapter", place / "lora", "--output", place / "merged", "--check"]
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *map(str, arguments), f"{flag}={bad}"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not (place / "merged").exists()
