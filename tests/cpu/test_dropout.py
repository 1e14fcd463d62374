"""`FastDropout` means what `nn.Dropout` means, at a tenth of the cost. (The mask itself: see maths/test_functional.py.)"""

import math

import pytest
import torch
from torch import nn

from lora_core import use_fast_dropout
from lora_core.cpu.dropout import FastDropout, draw_keep_mask, dropout, same_keep_mask


def test_it_zeroes_and_rescales_and_the_gradient_uses_the_same_mask():
    torch.manual_seed(0)
    x = (torch.rand(100, 51, dtype=torch.float64) + 1).requires_grad_()
    y = dropout(x, 0.25)
    dy = torch.randn_like(y)
    y.backward(dy)
    kept = (y != 0).double()
    # Scaling by 1 / 0.75 rounds twice, dividing by 0.75 once.
    torch.testing.assert_close(y, x * kept / 0.75, rtol=1e-15, atol=0)
    torch.testing.assert_close(x.grad, dy * kept / 0.75, rtol=1e-15, atol=0)
    assert abs(kept.mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_keeps_dtype_and_shape(dtype):
    for shape in [(), (3,), (2, 0, 5), (2, 3, 5)]:
        y = dropout(torch.ones(shape, dtype=dtype), 0.5)
        assert y.dtype == dtype and y.shape == shape
        assert ((y == 0) | (y == 2)).all()


def test_inputs_of_any_layout():
    x = torch.rand(7, 5).t() + 1
    torch.manual_seed(1)
    y = dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(y, dropout(x.contiguous(), 0.5))


def test_the_mask_is_never_empty_of_chances():
    for p in (0.999, 0.9999999):
        mask, kept, _ = draw_keep_mask(torch.Size((100_000,)), p, torch.device("cpu"))
        assert abs(kept - (1 - p)) < (1 - p) / 30 and abs(mask.sum() - 100_000 * kept) <= 5 * math.sqrt(100_000 * kept)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (3, 3), (4, 0, 2), (7, 11, 13)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 0.01, 1e-5])
def test_a_mask_is_made_again_from_what_is_kept_of_it(shape, p):
    mask, _, source = draw_keep_mask(torch.Size(shape), p, torch.device("cpu"))
    assert mask.shape == shape and mask.dtype == torch.uint8 and ((mask == 0) | (mask == 1)).all()
    assert source.nbytes == 32
    torch.rand(100)  # whatever is drawn in between
    assert torch.equal(same_keep_mask(source, shape, p, mask.device), mask)


def test_use_fast_dropout_replaces_what_it_says():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)), Own(0.5), nn.Linear(2, 2))
    assert use_fast_dropout(model) == 2
    assert [type(m) for m in (model[0], model[1][0], model[2])] == [FastDropout, FastDropout, Own]
    assert use_fast_dropout(model) == 0
    assert isinstance(model[0], nn.Dropout)


def test_it_does_nothing_in_eval_mode_and_honours_p():
    layer = nn.Dropout(0.5)
    use_fast_dropout(nn.Sequential(layer))
    x = torch.ones(1000)
    assert torch.equal(layer.eval()(x), x)
    assert (layer.train()(x) == 0).any()
    layer.p = 0.0
    assert torch.equal(layer(x), x)
    layer.p = 1.0  # nn.Dropout allows it: everything is dropped
    assert torch.equal(layer(x), torch.zeros(1000))


def test_in_place_dropout_stays_in_place():
    layer = nn.Dropout(0.5, inplace=True)
    use_fast_dropout(nn.Sequential(layer))
    x = torch.ones(1000)
    assert layer(x) is x and (x == 0).any()


def test_it_keeps_a_seed_for_the_backward():
    kept = []
    x = torch.ones(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(x, 0.1)
    assert sum(t.nbytes for t in kept) == 32
