"""The thin products of a CPU and of a GPU: one table of functions, held to float64; the GPU's run here, too."""

import inspect
import itertools

import pytest
import torch

from lora_core.cpu import thin as cpu
from lora_core.gpu import thin as gpu
from tests.support.linear import SCALING

TABLE = ("operand", "narrow", "add", "tall", "gradients")
T, D, R = 37, 19, 3


@pytest.fixture(params=[cpu, gpu], ids=["cpu", "gpu"])
def ways(request):
    return request.param


def test_both_tables_have_the_same_functions():
    for name in TABLE:
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(gpu, name))


PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("large, small", PAIRS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_they_are_the_products(ways, large, small, masked):
    """To the rounding of the update's dtype; what has 16 bits is rounded once."""
    torch.manual_seed(0)
    x, y = (torch.randn(T, D, dtype=torch.float64).to(large) for _ in range(2))
    A, B, h = (torch.randn(shape, dtype=torch.float64).to(small) for shape in ((R, D), (D, R), (T, R)))
    keep = torch.empty(T, D, dtype=torch.uint8).bernoulli_(0.7) if masked else None
    xd, mask = x.double() * (keep if masked else 1), keep if masked else torch.ones(T, D)

    def near(found, expected, magnitude, dtype):
        assert found.dtype == dtype and found.shape == expected.shape
        rounded = torch.finfo(dtype).eps / 2 if dtype != small else 0
        allowed = rounded * expected.abs() + (2 + T) * torch.finfo(small).eps * magnitude
        assert ((found.double() - expected).abs() <= allowed).all()

    doubles = [t.double() for t in (A, B, h, x, y)]
    (A64, B64, h64, x64, y64), positive = doubles, [t.abs() for t in doubles]
    near(ways.narrow(x, A, keep), xd @ A64.t(), xd.abs() @ positive[0].t(), small)
    near(ways.tall(ways.operand(x, small), h), x64.t() @ h64, positive[3].t() @ positive[2], small)
    for dtype in {large, small}:
        found = ways.add(y.clone(), h, B, SCALING, dtype)
        near(found, y64 + SCALING * h64 @ B64.t(), positive[4] + positive[2] @ positive[1].t(), dtype)
    for need_x, need_A in itertools.product([False, True], repeat=2):
        dA, dx = ways.gradients(x if need_A else None, y.clone() if need_x else None, h, A, keep, large)
        assert (dA is None, dx is None) == (not need_A, not need_x)
        if need_A:
            near(dA, h64.t() @ xd, positive[2].t() @ positive[3], small)
        if need_x:
            near(dx, y64 + mask.double() * (h64 @ A64), positive[4] + positive[2] @ positive[0], large)
