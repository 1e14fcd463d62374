"""The loss behind a frozen head is torch's own, in value and gradient, and holds no logits; other heads are left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import next_token
from experiments.next_token import FrozenHead, summed_cross_entropy
from lora_core import LoraConfig, inject, use_fast_linear
from lora_core.errors import StateError
from tests.support import tiny

V, D = 97, 16


def plain(x, weight, bias, targets):
    return F.cross_entropy(F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="sum")


@pytest.mark.parametrize("rows", [0, 1, 5, 30])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("words", [1, 7, 2**20], ids=["a row", "rows", "whole"])
def test_it_is_torchs_cross_entropy_in_float64(rows, biased, words, monkeypatch):
    monkeypatch.setattr(next_token, "BLOCK", words * V)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, D, dtype=torch.float64, requires_grad=True), torch.randn(V, D, dtype=torch.float64)
    bias, targets = torch.randn(V, dtype=torch.float64) if biased else None, torch.randint(V, (rows,))
    expected, found = plain(x, weight, bias, targets), summed_cross_entropy(x, weight, bias, targets)
    torch.testing.assert_close(found, expected)
    if rows:
        gradients = [torch.autograd.grad(0.3 * loss, x)[0] for loss in (expected, found)]
        torch.testing.assert_close(*gradients)
        assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, weight, bias, targets), x)


def test_under_autocast_each_logit_is_rounded_as_it_would_be():
    """The sum is the same; the gradient is rounded to bfloat16 before it is scaled, not after."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(30, D, requires_grad=True), torch.randn(V, D), torch.randint(V, (30,))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(x, weight, None, targets), summed_cross_entropy(x, weight, None, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss / 2, x)[0] for loss in (expected, found)]
    assert torch.equal(*gradients)  # a half changes no bit


def test_logits_that_are_far_apart_have_a_finite_loss():
    x, weight, targets = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]]), torch.tensor([1])
    loss = summed_cross_entropy(x, weight, None, targets)
    assert loss.item() == 400 and torch.autograd.grad(loss, x)[0].item() == 2


def test_no_second_derivative():
    x = torch.randn(3, D, requires_grad=True)
    loss = summed_cross_entropy(x, torch.randn(V, D), None, torch.tensor([1, 2, 3]))
    with pytest.raises(StateError, match="second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_what_is_kept_for_the_backward_is_of_the_size_of_its_input():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        summed_cross_entropy(torch.randn(30, D, requires_grad=True), torch.randn(V, D), None, torch.randint(V, (30,)))
    assert sum(kept) == 30 * D


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_models_head_gets_what_its_logits_are_made_of(architecture):
    model = tiny.build(architecture).requires_grad_(False)
    use_fast_linear(model)
    head = FrozenHead.of(model)
    logits = model(tiny.TOKENS).logits
    hidden = head.inputs(model, input_ids=tiny.TOKENS)
    assert torch.equal(F.linear(hidden, head.weight, head.bias), logits)
    assert torch.equal(model(tiny.TOKENS).logits, logits) and "forward" not in vars(head.layer)


def test_a_model_that_fails_has_its_head_again():
    model = tiny.build("llama").requires_grad_(False)
    head = FrozenHead.of(model)
    with pytest.raises(IndexError):
        head.inputs(model, input_ids=torch.tensor([[10**6]]))
    assert model(tiny.TOKENS).logits.shape[-1] == head.weight.shape[0]


def test_logits_that_the_model_changes_are_not_taken_apart():
    model = tiny.build("llama").requires_grad_(False)
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    inject(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    before = torch.get_rng_state()
    assert FrozenHead.of(model).inputs(model.train(), input_ids=tiny.TOKENS) is None
    assert torch.equal(torch.get_rng_state(), before)  # a run that goes on from a checkpoint draws the same masks
    model(tiny.TOKENS)
    assert not torch.equal(torch.get_rng_state(), before)


def test_heads_that_are_trained_adapted_or_looked_into_are_left_alone():
    model = tiny.build("llama")
    assert FrozenHead.of(model) is None  # trained
    model.requires_grad_(False)
    assert FrozenHead.of(model) is not None
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert FrozenHead.of(model) is None
    handle.remove()
    inject(model, LoraConfig(r=2, target_modules=["lm_head"]))
    assert FrozenHead.of(model) is None
    assert FrozenHead.of(tiny.build("bert")) is None
    assert isinstance(FrozenHead.of(tiny.build("gpt2").requires_grad_(False)).layer, nn.Linear)
