"""W + s L R, multiplied by without being added up: every product is that by the sum, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from lora_core.maths.updated import UpdatedWeight

S, E, P, Q, K = 7, 3, 8, 16, 2
OFFS = torch.tensor([3, 3, 5], dtype=torch.int32)  # the second has no rows, and the last two rows no matrix

#: {what is done: (with x and M, whether M is a stack)}.
PRODUCTS = {
    "linear": (lambda x, M: F.linear(x, M.mT), False),
    "linear with a bias": (lambda x, M: F.linear(x, M.mT, torch.arange(Q).to(x)), False),
    "matmul": (lambda x, M: x @ M, False),
    "matmul before": (lambda x, M: M.mT @ x.mT, False),
    "mm": (lambda x, M: torch.mm(x, M), False),
    "times": (lambda x, M: (x.sum() * (-M * 2 + 1) / (3 - M)).sum(), False),
    "one of a stack": (lambda x, M: x @ M[1], True),
    "one of a stack, by a tensor": (lambda x, M: F.linear(x, M[torch.tensor(2)].transpose(-2, -1)), True),
    "gathered": (lambda x, M: torch.bmm(x[:, None], M[torch.tensor([0, 2, 2, 0, 1, 0, 2])]), True),
    "gathered before": (lambda x, M: torch.bmm(M[torch.tensor([0, 2, 2, 0, 1, 0, 2])].mT, x[..., None]), True),
    "stack": (lambda x, M: x @ M, True),
    "several of a stack": (lambda x, M: (x @ M[1:]).sum(0), True),
    "einsum": (lambda x, M: torch.einsum("sp,epq->esq", x, M), True),
    "by name": (lambda x, M: F.linear(input=x, weight=M.mT) + torch.matmul(x, other=M), False),
    "compared": (lambda x, M: x @ M * (M != 0).all() * (M == M).all() + abs(M).sum() * (M > 0).any(), False),
    "a vector": (lambda x, M: x[0] @ M, False),
    "a vector by a stack": (lambda x, M: x[0] @ M, True),
    "moved": (lambda x, M: x @ M.transpose(0, 1).transpose(0, 1), True),
}


def parts(stack, dtype=torch.float64):
    torch.manual_seed(0)
    lead = (E,) if stack else ()
    tensors = torch.randn(*lead, P, Q), torch.randn(*lead, P, K), torch.randn(*lead, K, Q), torch.randn(S, P)
    W, L, R, x = (t.to(dtype) for t in tensors)
    return W, L.requires_grad_(), R.requires_grad_(), x.requires_grad_()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_by_the_sum(name):
    product, stack = PRODUCTS[name]
    W, L, R, x = parts(stack)
    y, expected = product(x, UpdatedWeight(W, L, R, 1.5)), product(x, W + 1.5 * L @ R)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(y.sin().sum(), (x, L, R))
    for a, b in zip(found, torch.autograd.grad(expected.sin().sum(), (x, L, R)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_rows_each_meet_their_own_matrix(dtype):
    W, L, R, x = parts(True, dtype)
    L, R = (t.detach().float().requires_grad_() for t in (L, R))
    x = torch.cat([x, x]).detach().requires_grad_()[:8]
    M, dense = UpdatedWeight(W, L, R, 0.5), (W.double() + 0.5 * L.double() @ R.double())
    y = F.grouped_mm(x, M, offs=OFFS)
    expected = [x[:3].double() @ dense[0], x[3:5].double() @ dense[2]]
    # Rows beyond the last offset belong to no matrix: what stands there is not defined.
    bound = 1e-5 if dtype == torch.float32 else 2**-8 * 4 * dense.abs().max().item() * P
    torch.testing.assert_close(y[:5].double(), torch.cat(expected), rtol=0, atol=bound)
    y[:5].float().sum().backward()
    assert not L.grad[1].any() and L.grad[0].any() and L.grad[2].any() and R.grad.isfinite().all()


def test_rows_for_nothing_are_no_rows():
    W, L, R, _ = parts(True, torch.float32)
    y = F.grouped_mm(torch.randn(0, P), UpdatedWeight(W, L, R, 1.0), offs=torch.zeros(E, dtype=torch.int32))
    assert y.shape == (0, Q)


def test_it_looks_like_the_weight_and_is_added_up_once_for_the_rest():
    W, L, R, _ = parts(True)
    M = UpdatedWeight(W, L, R, 2.0)
    assert (M.shape, M.dtype, M.device, M.ndim, M.size(1), len(M)) == (W.shape, W.dtype, W.device, 3, P, E)
    assert M.sum() == (W + 2 * L @ R).sum() and M.contiguous().data_ptr() == M.dense().data_ptr()
    assert torch.equal(torch.stack([M[0].dense(), M[-1].dense()]), torch.stack([M[:1].squeeze(0), M[2].dense()]))
    with pytest.raises(IndexError):
        M[E]


def test_no_copy_of_the_weight_and_no_gradient_of_its_size():
    W, L, R, x = parts(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = F.linear(x, UpdatedWeight(W, L, R, 1.0)[1].mT) + x @ UpdatedWeight(W, L, R, 1.0)[0]
    own = {t.untyped_storage().data_ptr() for t in (W, L, R, x)}
    assert max(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) < W[0].numel()
    y.sum().backward()
    assert W.grad is None


def test_in_sixteen_bits_an_update_below_the_weight_s_last_place_counts():
    W = torch.ones(8, 8, dtype=torch.bfloat16)  # whose neighbours are 2^-8 and 2^-7 away
    L, R = torch.zeros(8, 1), torch.ones(1, 8)
    L[0] = 2.0**-10
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 1, -1
    M = UpdatedWeight(W, L, R, 1.0)
    assert not (x @ M.dense()).any()  # lost where the sum is made
    assert torch.equal((x @ M), torch.full((1, 8), 2.0**-10, dtype=torch.bfloat16))


@pytest.mark.parametrize("look", [lambda M: M[0].dense(), lambda M: M.abs()], ids=["at one", "at all"])
def test_a_look_without_gradients_leaves_those_of_what_follows(look):
    W, L, R, x = parts(True)
    M = UpdatedWeight(W, L, R, 1.5)
    with torch.no_grad():
        assert not look(M).requires_grad
    y = x @ M[0] + torch.einsum("sp,epq->sq", x, M)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.sum(), (L, R)))
