"""The experiments' attention computes what "sdpa" computes, and drops weights as its dropout says."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from experiments import attention
from lora_core.cpu import dropout as engine

B, H, T, D = 3, 2, 7, 8


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, H, T, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    mask[1, ..., 5:] = False  # padding
    return torch.nn.Identity(), query, key, value, mask


def slow_attention(query, key, value, mask, keep, kept):
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) / D**0.5
    weights = torch.where(mask, scores, -torch.inf).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,bhsd->bthd", weights * keep / kept, value)


def test_outputs_and_gradients_are_those_of_the_formula_with_the_mask_that_was_drawn(inputs, monkeypatch):
    module, query, key, value, mask = inputs
    drawn = []
    draw = engine.draw_keep_mask

    def remember(*args):
        drawn.append(draw(*args))
        return drawn[-1][0].clone(), *drawn[-1][1:]

    monkeypatch.setattr(engine, "draw_keep_mask", remember)
    result, weights = attention.attention(module, query, key, value, mask, dropout=0.25)
    ((keep, kept, _),) = drawn
    expected = slow_attention(query, key, value, mask, keep.double(), kept)
    assert weights is None and 0 < (keep == 0).sum() < keep.numel() / 2
    torch.testing.assert_close(result, expected)  # float64: rounding alone
    grad = torch.randn_like(result)
    for ours, theirs in zip(*(torch.autograd.grad(y, (query, key, value), grad) for y in (result, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("given", [{}, {"dropout": 0.5, "is_causal": True}], ids=["no dropout", "implicit causal mask"])
def test_what_it_has_nothing_to_add_to_is_sdpa_itself(inputs, given):
    module, query, key, value, mask = inputs
    mask = None if "is_causal" in given else mask
    torch.manual_seed(1)
    ours, _ = attention.attention(module, query, key, value, mask, **given)
    torch.manual_seed(1)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, **given)
    assert torch.equal(ours, theirs)


def test_a_model_that_uses_it_evaluates_bit_for_bit_as_before_and_trains():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config).eval()
    tokens = torch.randint(0, 50, (4, 6))
    mask = torch.ones_like(tokens)
    mask[2, 3:] = 0
    before = model(tokens, attention_mask=mask).logits
    assert attention.use_fast_attention(model)
    assert torch.equal(model(tokens, attention_mask=mask).logits, before)
    model.train()(tokens, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.bert.encoder.parameters())


def test_a_model_with_another_attention_is_left_alone():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, attn_implementation="eager")
    model = BertForSequenceClassification(config)
    assert not attention.use_fast_attention(model)
    assert model.config._attn_implementation == "eager"
