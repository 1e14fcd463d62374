"""What newcomers type: each mistake is answered with what to do."""

import inspect
import warnings

import pytest
import torch
from torch import nn

import lora_core
from lora_core import (
    LoraConfig,
    VeraConfig,
    inject,
    load_adapter,
    lora_plus_groups,
    mixed_batch,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
)
from lora_core.bases.nf4 import NF4Format
from lora_core.errors import ConfigError, StateError, TargetError
from lora_core.model.optimizers import watch_optimizers
from tests.support import tiny

QUERY = LoraConfig(r=2, target_modules=["query"])


def takes_a_model(verb):
    return callable(verb) and next(iter(inspect.signature(verb).parameters), None) == "model"


VERBS = [name for name in lora_core.__all__ if name.islower() and takes_a_model(getattr(lora_core, name))]
ARGUMENTS = {"mixed_batch": [["default"]], "lora_plus_groups": [1e-3], "save_probe": ["out", {}]}


def call(name, model):
    verb = getattr(lora_core, name)
    needed = [p for p in inspect.signature(verb).parameters.values() if p.default is p.empty and p.kind != p.KEYWORD_ONLY]
    arguments = ARGUMENTS.get(name) or [NF4Format() if p.name == "form" else "x" for p in needed[1:]]
    outcome = verb(model, *arguments)
    if hasattr(outcome, "__enter__"):
        outcome.__enter__()


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("bert-base-uncased", r"not str \(given 'bert-base-uncased'\); load the model first.*AutoModel\.from_pretrained"),
        (QUERY, "not LoraConfig; the model comes first, then its configuration"),
        (VeraConfig(), "not VeraConfig; the model comes first"),
        (None, "not NoneType$"),
        ([nn.Linear(2, 2)], "not list$"),
    ],
    ids=["a name", "a configuration", "another", "none", "a list"],
)
def test_what_is_no_model_is_told_to_be_none(name, model, says):
    with pytest.raises(ConfigError, match=f"model must be a torch.nn.Module, {says}"):
        call(name, model)


def test_all_verbs_were_tried():
    assert len(VERBS) > 25


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("query", r"a string is an expression for the whole path, names go in a list: \['query'\]"),
        ("self.query", r"names go in a list: \['self.query'\]"),
        ("query,value", r"names go in a list: \['query', 'value'\]"),
        ("query, value", r"names go in a list: \['query', 'value'\]"),
        ("query|value", r"names go in a list: \['query', 'value'\]"),
        ("(query|value)", r"names go in a list: \['query', 'value'\]"),
        ("[query, value]", r"names go in a list: \['query', 'value'\]"),
        ("self.(query|key)", r"for the whole path: '\.\*\(self\.\(query\|key\)\)' matches what ends so"),
        ("quary", "closest: 'query'"),
        (r".*\.quary", "module paths look like"),
    ],
)
def test_a_string_that_means_names_is_told_to_be_an_expression(targets, says):
    with pytest.raises(TargetError, match=f"matched no module; .*{says}"):
        inject(tiny.build("bert"), LoraConfig(target_modules=targets))


@pytest.mark.parametrize("targets", [["query", "value"], r".*(self.(query|key))"], ids=str)
def test_what_it_says_to_do_is_right(targets):
    assert inject(tiny.build("bert"), LoraConfig(target_modules=targets)).targets


@pytest.mark.parametrize("config", [{"r": 4}, "lora", 4, None], ids=str)
def test_what_is_no_configuration_is_told_to_be_none(config):
    more = r"; pass LoraConfig\(\*\*config\)" if isinstance(config, dict) else ""
    with pytest.raises(ConfigError, match=f"config must be a LoraConfig, not {type(config).__name__}{more}$"):
        inject(tiny.build("bert"), config)


# --- optimisers -------------------------------------------------------------------------------------------------------


def a_step(model, optimizer):
    x = torch.randint(0, 50, (2, 4))
    logits = model(x).last_hidden_state if hasattr(model(x), "last_hidden_state") else model(x).logits
    if logits.requires_grad:
        logits.square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_that_was_made_before_says_so_at_its_first_step(kind):
    model = tiny.build("bert")
    optimizer = kind(model.parameters(), lr=1e-3)
    inject(model, QUERY)
    with pytest.warns(UserWarning, match=r"that inject\(\) froze and none of an adapter's.*make it after inject") as caught:
        a_step(model, optimizer)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):  # once is enough
        a_step(model, optimizer)


def test_one_that_holds_only_a_head_that_is_trained_as_a_copy_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1e-3)
    inject(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    with pytest.warns(UserWarning, match="make it after inject"):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()


def test_one_that_trained_the_whole_model_before_says_so_after_inject():
    other, model = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    inject(other, LoraConfig(r=2, target_modules=["0"]))  # optimisers are looked at from here on
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    inject(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="make it after inject"):
        optimizer.step()


def test_one_that_was_made_after_says_nothing():
    model = tiny.build("bert")
    inject(model, QUERY)
    with warnings.catch_warnings(action="error"):
        a_step(model, torch.optim.SGD(trainable_parameters(model), lr=1e-3))
        a_step(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        a_step(model, torch.optim.SGD(lora_plus_groups(model, 1e-3)))


def test_one_of_another_model_or_of_one_without_adapters_says_nothing():
    model, other = tiny.build("bert"), tiny.build("bert")
    inject(model, QUERY)
    before = torch.optim.SGD(tiny.build("bert").parameters(), lr=1e-3)
    with warnings.catch_warnings(action="error"):
        before.step()
        a_step(other, torch.optim.SGD(other.parameters(), lr=1e-3))
        unload(model)
        a_step(model, torch.optim.SGD(model.parameters(), lr=1e-3))


def test_one_of_an_adapter_that_waits_says_nothing():
    model = tiny.build("bert")
    inject(model, QUERY, "first")
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1e-3)
    inject(model, QUERY, "second")
    set_adapter(model, "second")
    with warnings.catch_warnings(action="error"):
        optimizer.step()


def test_models_are_not_kept_alive():
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(2, 2))
    inject(model, LoraConfig(r=1, target_modules=["0"]))
    watch_optimizers(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_compiled_step_is_not_disturbed():
    model = nn.Sequential(nn.Linear(2, 2))
    inject(model, LoraConfig(r=1, target_modules=["0"]))
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.5)
    for parameter in trainable_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in trainable_parameters(model)]
    torch.compile(optimizer.step, backend="eager")()
    assert all(torch.equal(p, b - 0.5) for p, b in zip(trainable_parameters(model), before, strict=True))


def test_an_adapter_that_was_loaded_to_be_used_is_told_not_to_be_trained(tmp_path):
    model = tiny.build("bert")
    inject(model, QUERY)
    save_adapter(model, tmp_path)
    idle, busy = tiny.build("bert"), tiny.build("bert")
    report = load_adapter(idle, tmp_path)
    assert not report.trained and "parameters, which are not trained (trainable=True trains them)" in str(report)
    with pytest.warns(UserWarning, match=r"nothing is trained: 'default' .*load_adapter\(..., trainable=True\)") as caught:
        assert trainable_parameters(idle) == []
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        report = load_adapter(busy, tmp_path, trainable=True)
        assert report.trained and "trainable parameters" in str(report)
        assert trainable_parameters(busy)
        assert trainable_parameters(nn.Sequential()) == []


# --- mixed batches ----------------------------------------------------------------------------------------------------


def test_beams_are_told_to_be_rows():
    model = tiny.build("llama")
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    tokens = {"input_ids": torch.randint(5, 50, (2, 4)), "num_beams": 3, "max_new_tokens": 2, "do_sample": False}
    model.eval()
    says = "a mixed batch of 2 rows.*name each row 3 times on end"
    with pytest.raises(StateError, match=says), mixed_batch(model, ["default", None]):
        model.generate(**tokens)
    with mixed_batch(model, ["default"] * 3 + [None] * 3):
        assert len(model.generate(**tokens)) == 2


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind(4, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


HEADS = {kind.__name__: (lambda kind=kind: Recurrent(kind)) for kind in (nn.GRU, nn.LSTM, nn.RNN)} | {"a branch": Branching}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_takes_no_weights_by_row_is_named(head):
    model = nn.Sequential(nn.Linear(4, 4), HEADS[head]())
    inject(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    x = torch.randn(2, 3, 4)
    says = rf"1 \({type(model[1]).__name__}\) can't run with weights of its own for each row.*run the rows of each adapter"
    with pytest.raises(StateError, match=says), mixed_batch(model.eval(), ["default", None]):
        model(x)
    assert model(x).shape == x.shape
