"""`FastDropout` means what `nn.Dropout` means, at a tenth of the cost. (The mask itself: see test_functional.py.)"""

import gc
import math
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core import dropout as engine
from lora_core import functional, use_fast_dropout
from lora_core.dropout import (
    FastDropout,
    draw_keep_mask,
    dropout,
    dropped_for,
    same_keep_mask,
    same_keep_mask_for,
)


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
        assert kept == 1 / 256 and mask.sum() > 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (3, 3), (4, 0, 2), (7, 11, 13)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_a_mask_is_made_again_from_what_is_kept_of_it(shape, p):
    mask, _, source = draw_keep_mask(torch.Size(shape), p, torch.device("cpu"))
    assert mask.shape == shape and mask.dtype == torch.uint8 and ((mask == 0) | (mask == 1)).all()
    assert source.nbytes == 32
    torch.rand(100)  # whatever is drawn in between
    assert torch.equal(same_keep_mask(source, shape, p), mask)


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


# --- one mask for the layers that read one tensor ----------------------------------------------------------------------


def dropped(*readings, p=0.5):
    """x dropped out, for each (x, reader), one after another."""
    return [dropped_for(x, p, x.dtype, reader).x for x, reader in readings]


def same_mask(*results):
    """Whether the same elements of all were dropped: none was zero before."""
    first, *others = ((result == 0).view(-1, result.shape[-1]) for result in results)
    return all(torch.equal(first, other) for other in others)


def test_layers_that_read_one_tensor_share_its_mask():
    x = torch.rand(2, 30, 10) + 1
    q, k, v = dropped((x, 1), (x, 2), (x, 3))
    assert q is k is v and torch.equal(q, x.view(60, 10) * (q != 0)) and 200 < q.count_nonzero() < 400


def test_a_layer_that_reads_again_draws_again():
    """The same batch, at every step the same tensor: without this the first layer would drop the same elements for ever."""
    x = torch.rand(50, 10) + 1
    first, k, second, again = dropped((x, 1), (x, 2), (x, 1), (x, 2))
    assert first is k and second is again and not same_mask(first, second)


def test_nothing_is_shared_between_what_only_looks_alike():
    x = torch.rand(50, 10) + 1
    (first,) = dropped((x, 1))
    others = [x.clone(), x.view(50, 10), x.detach()]
    assert not any(same_mask(first, *dropped((other, 2 + i))) for i, other in enumerate(others))
    a, _, c = dropped((x, 1), (others[0], 2), (x, 3))  # another tensor in between
    assert not same_mask(a, c)
    (before,) = dropped((x, 1))
    x.add_(1)
    assert not same_mask(before, *dropped((x, 2)))
    with torch.inference_mode():
        y = torch.rand(50, 10) + 1
        assert not same_mask(*dropped((y, 1), (y, 2)))


def test_another_probability_draws_another_mask():
    x = torch.rand(50, 10) + 1
    first, second = dropped_for(x, 0.5, x.dtype, 1), dropped_for(x, 0.25, x.dtype, 2)
    assert (first.p, second.p) == (0.5, 0.25) and (first.kept, second.kept) == (0.5, 0.75)
    assert not same_mask(first.x, second.x)


def test_another_dtype_does_not_get_the_tensor_of_the_first():
    x = torch.rand(50, 10) + 1
    single, double = dropped_for(x, 0.5, torch.float32, 1), dropped_for(x, 0.5, torch.float64, 2)
    assert (single.x.dtype, double.x.dtype) == (torch.float32, torch.float64)


def test_without_knowing_where_a_checkpoint_ends_nothing_is_shared(monkeypatch):
    monkeypatch.setattr(engine, "_saved_tensors_hooks", None)
    x = torch.rand(50, 10) + 1
    assert not same_mask(*dropped((x, 1), (x, 2)))


def test_threads_share_nothing():
    x, found = torch.rand(50, 10) + 1, []
    readers = [threading.Thread(target=lambda i=i: found.extend(dropped((x, i)))) for i in range(2)]
    for thread in readers:
        thread.start()
        thread.join()
    assert not same_mask(*found)


def test_what_was_drawn_goes_with_the_tensor_that_it_is_of():
    x, source = torch.rand(50, 10), torch.zeros(4, dtype=torch.int64)
    gone = weakref.ref(dropped((x, 1))[0]), weakref.ref(same_keep_mask_for(source, (50, 10), 0.5))
    assert all(g() is not None for g in gone)
    del x, source
    gc.collect()
    assert all(g() is None for g in gone)


def test_a_mask_that_was_kept_itself_is_not_remembered():
    source = torch.zeros(50, 10, dtype=torch.uint8, device="meta")  # as on a GPU, where the mask is its own source
    assert same_keep_mask_for(source, (50, 10), 0.5) is source
    gone = weakref.ref(source)
    del source
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("inside", ["", "q", "k", "v", "qk", "kv", "qv", "qkv"])
@pytest.mark.parametrize("leaf", [False, True], ids=["activation", "leaf"])
@pytest.mark.parametrize("backward_first", ["outside", "inside"])
def test_a_layer_in_a_checkpoint_finds_its_mask_again(monkeypatch, inside, reentrant, leaf, backward_first):
    """Whichever of q, k and v are checkpointed, alone or together, and whatever is freed before they run again."""
    torch.manual_seed(0)
    drawn = {}

    def remember(x, p, dtype, reader):
        found = dropped_for(x, p, dtype, reader)
        drawn.setdefault(reader, []).append(found.x.clone())
        return found

    monkeypatch.setattr(functional, "dropped_for", remember)
    W, A = torch.randn(3, 8, 8), torch.randn(3, 2, 8, requires_grad=True)
    B = torch.randn(3, 8, 2, requires_grad=True)
    x = torch.randn(20, 8, requires_grad=True)
    x = x if leaf else x * 1

    def layers(x, names):
        found = [functional.lora_linear(x, W[i], None, A[i], B[i], 1.0, 0.5) for i in map("qkv".index, names)]
        return torch.stack(found) if found else torch.zeros(0)

    parts = {name: None for name in (inside, *(n for n in "qkv" if n not in inside))}
    for name in sorted(parts, key=lambda name: name[:1]):
        if name == inside and name:
            parts[name] = checkpoint(layers, x, name, use_reentrant=reentrant)
        else:
            parts[name] = layers(x, name)
    order = sorted((n for n in parts if n), key=lambda n: (n == inside) != (backward_first == "inside"))
    for name in order:
        part = parts.pop(name)
        part.square().sum().backward(retain_graph=True)
        del part
    assert len(drawn) == 3 and sum(map(len, drawn.values())) == 3 + len(inside)
    for first, *again in drawn.values():
        assert all(torch.equal(first, other) for other in again)


def test_gradients_of_layers_that_share_a_mask_are_those_of_plain_operations(monkeypatch):
    torch.manual_seed(0)
    drawn = []
    monkeypatch.setattr(functional, "dropped_for", lambda *a: drawn.append(dropped_for(*a)) or drawn[-1])
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((7, 5), (2, 3, 5), (2, 2, 5), (2, 3, 2))]
    outcomes = []
    for plain in (False, True):
        x, W, A, B = (t.clone().requires_grad_() for t in tensors)
        W = W.detach()
        if plain:
            x_dropped = x * (drawn[0].x != 0).view(x.shape) / drawn[0].kept
            ys = [x @ W[i].t() + 2.0 * x_dropped @ A[i].t() @ B[i].t() for i in range(2)]
        else:
            ys = [functional.lora_linear(x, W[i], None, A[i], B[i], 2.0, 0.4) for i in range(2)]
        (ys[0].square().sum() + ys[1].sin().sum()).backward()
        outcomes.append([*ys, x.grad, A.grad, B.grad])
    assert drawn[0].x is drawn[1].x
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
