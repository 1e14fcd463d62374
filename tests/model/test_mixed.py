"""Mixed batches: each row equals a run of its own with its adapter; and what they refuse."""

import threading

import pytest
import torch
from torch import nn

from lora_core import LoraConfig, inject, merge_adapter, mixed_batch, quantize_nf4, set_adapter
from lora_core.errors import AdapterNameError, StateError
from lora_core.model.registry import copies_of
from tests.support import tiny
from tests.support.mixes import MIX, VARIANTS, logits, one_by_one


def assert_rows_are_their_own(model, names, rows, run):
    """Batched and single products sum the same 100 or so float32 terms in another order: 1e-5 of the largest output."""
    expected = one_by_one(model, names, rows, run)
    with mixed_batch(model, names):
        mixed = run(model, rows)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
    base = one_by_one(model, [None] * len(names), rows, run)
    differs = [(e - b).abs().max() > 1e-3 for e, b in zip(expected, base, strict=True)]
    assert differs == [name is not None for name in names]  # each adapter does something


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "gpt2", "llama"])
def test_each_row_is_what_it_is_alone(architecture):
    model = tiny.build(architecture)
    task = "SEQ_CLS" if architecture in tiny.CLASSIFIERS else None
    for i, (name, settings) in enumerate(VARIANTS.items()):
        targets = tiny.projections(architecture)[: 1 + i % 2]
        inject(model, LoraConfig(target_modules=targets, task_type=task, **settings), name)
        tiny.randomize(model, name, seed=i)
        for parameter in copies_of(model, name).values():
            parameter.data.mul_(3)
    tokens = torch.cat([tiny.TOKENS, tiny.TOKENS + 20])
    assert_rows_are_their_own(model, MIX, tokens, logits)
    assert_rows_are_their_own(model, ["plain"] * 2 + [None] * 4, tokens, logits)


class Kinds(nn.Module):
    """A layer of each kind; the 4-bit one is quantised by the test."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.conv1d, self.conv2d = nn.Conv1d(8, 12, 3, padding=1), nn.Conv2d(1, 6, (3, 2), stride=2, padding=1, dilation=(1, 2))
        self.dense, self.packed = nn.Linear(12, 64), nn.Linear(64, 5, bias=False)

    def forward(self, ids):  # N T -> N 5
        x = self.conv1d(self.embedding(ids).transpose(1, 2))  # N 12 T
        features = self.conv2d(x[:, None]).flatten(1).mean(1, keepdim=True)
        return self.packed(torch.tanh(self.dense(x.transpose(1, 2)))).mean(1) + features


@pytest.mark.parametrize("bits", [32, 4])
def test_every_kind_of_layer_and_a_bias_of_its_own(bits):
    torch.manual_seed(0)
    model = Kinds().eval()
    if bits == 4:
        quantize_nf4(model, skip=["dense"])
    everything = ["embedding", "conv1d", "conv2d", "dense", "packed"]
    for i, (name, settings) in enumerate(VARIANTS.items()):
        inject(model, LoraConfig(target_modules=everything[i % 2 :], **settings), name)
        tiny.randomize(model, name, seed=i)
    inject(model, LoraConfig(r=2, target_modules=["conv1d", "dense"], lora_bias=True), "biased")
    tiny.randomize(model, "biased", seed=9)
    ids = torch.arange(6 * 7).view(6, 7) % 40

    def run(model, rows):
        with torch.no_grad():
            return model(rows)

    assert_rows_are_their_own(model, MIX, ids, run)
    assert_rows_are_their_own(model, ["biased", "dora", None, "biased", "plain", "rslora"], ids, run)


def two_adapters():
    model = tiny.classifier().eval()
    for i, name in enumerate(("a", "b")):
        inject(model, LoraConfig(r=2 + i, target_modules=["q", "v"], modules_to_save=["classifier"]), name)
        tiny.randomize(model, name, seed=i)
    return model


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("mix", [["a", "b", None] * 4, ["b"] * 9 + ["a", None], ["a"]], ids=["even", "uneven", "one row"])
def test_few_tokens_and_many(tokens, mix):
    """Linear layers multiply in one of two ways, by the number of tokens and how the rows are spread."""
    model = two_adapters()
    x = torch.randn(len(mix), tokens, 64, generator=torch.Generator().manual_seed(1))
    assert_rows_are_their_own(model, mix, x, lambda model, rows: model(rows).detach())
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a convolution hands it on, features first in memory
    assert_rows_are_their_own(model, mix, turned, lambda model, rows: model(rows).detach())


def test_afterwards_everything_is_as_it_was():
    model = two_adapters()
    x, before = tiny.batch(tokens=3), tiny.snapshot(model)
    y = model(x)
    with pytest.raises(RuntimeError, match="stop"), mixed_batch(model, ["a", "b", None]):
        raise RuntimeError("stop")
    assert tiny.snapshot(model) == before and torch.equal(model(x), y)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_input_gets_its_gradient_and_the_adapters_none():
    model, names = two_adapters(), ["a", "b", None]
    x = tiny.batch(tokens=3).requires_grad_()
    with mixed_batch(model, names):
        model(x).square().sum().backward()
    alone = tiny.batch(tokens=3).requires_grad_()
    one_by_one(model, names, alone, lambda model, row: model(row)).square().sum().backward()
    torch.testing.assert_close(x.grad, alone.grad, rtol=1e-5, atol=1e-6)


def test_threads_have_their_own_mixes():
    model = two_adapters()
    mixes = [["a", "b", None], ["b", None, "a"], [None, "a", "b"], ["b", "b", "b"]] * 2
    x = tiny.batch(tokens=3)
    with torch.no_grad():
        expected = [one_by_one(model, names, x, lambda model, row: model(row)) for names in mixes]
    active = model(x)
    barrier, wrong = threading.Barrier(len(mixes) + 1), []

    def work(names, want):
        barrier.wait()
        for _ in range(20):
            with torch.no_grad(), mixed_batch(model, names):
                if not torch.allclose(model(x), want, atol=1e-5):
                    wrong.append(names)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(mixes, expected, strict=True)]
    for thread in threads:
        thread.start()
    barrier.wait()
    for _ in range(20):  # meanwhile this one goes on with the active adapter
        assert torch.equal(model(x), active)
    for thread in threads:
        thread.join()
    assert not wrong


def test_refusals():
    model = two_adapters()
    x = tiny.batch(tokens=3)

    def refused(error, message, names):
        with pytest.raises(error, match=message) as caught, mixed_batch(model, names):
            pass
        assert "\n" not in str(caught.value)
        assert not any(m.lora_rows for m in model.modules() if hasattr(m, "lora_rows"))

    refused(AdapterNameError, "'c'", ["a", "c"])
    refused(StateError, "for each row", "a")
    refused(StateError, "for each row", [])
    with mixed_batch(model, ["a", "b"]):
        with pytest.raises(StateError, match=r"2 rows reached a layer with an input of \(3, 64\)"):
            model(x)
        with pytest.raises(StateError, match="already"), mixed_batch(model, ["a"]):
            pass
    model.train()
    refused(StateError, r"model\.eval\(\)", ["a", "b"])
    model.eval()
    merge_adapter(model)
    refused(StateError, "unmerge", ["a", "b"])


def test_an_adapter_with_biases_of_the_base_is_refused():
    model = tiny.classifier().eval()
    inject(model, LoraConfig(target_modules=["q"], bias="lora_only"), "biased")
    inject(model, LoraConfig(target_modules=["q"]), "plain")
    for names in (["biased", "plain"], ["plain", None]):  # the second because it is active, and its biases in place
        with pytest.raises(StateError, match=r"'biased' trains a bias .*'layers\.0\.q\.bias'"), mixed_batch(model, names):
            pass
    set_adapter(model, "plain")
    with mixed_batch(model, ["plain", None]):
        model(tiny.batch(tokens=2))


class KeywordHead(nn.Module):
    """A model that calls its head by keyword, with a flag that is no tensor, and gets a dictionary."""

    def __init__(self, repeats=1):
        super().__init__()
        self.q, self.head, self.repeats = nn.Linear(64, 64), Head(), repeats

    def forward(self, x):
        return self.head(features=self.q(x).repeat(self.repeats, 1), doubled=True)["scores"]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(64, 3)

    def forward(self, features, doubled=False):
        return {"scores": self.out(features) * (2 if doubled else 1)}


def test_a_head_that_is_called_by_keyword():
    torch.manual_seed(0)
    model = KeywordHead().eval()
    for i, name in enumerate(("a", "b")):
        inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]), name)
        tiny.randomize(model, name, seed=i)
    assert_rows_are_their_own(model, ["a", "b", None], tiny.batch(tokens=3), lambda model, rows: model(rows).detach())


def test_a_head_that_reads_other_rows_is_refused():
    model = KeywordHead(repeats=2).eval()
    inject(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]), "a")
    with mixed_batch(model, ["a", None, "a"]), pytest.raises(StateError, match=r"3 rows.*\(6, 64\)"):
        model(tiny.batch(tokens=3))
