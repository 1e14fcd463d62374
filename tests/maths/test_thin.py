"""The thin products of a CPU and of a GPU: one table of functions, held to float64; the GPU's run here, too."""

import inspect
import itertools
import runpy

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


@pytest.mark.parametrize("masked", [False, True])
def test_a_gpus_products_in_halves(masked, monkeypatch):
    """Two halves of bfloat16 hold 16 bits, so each factor is off by 2^-17 of itself, and y is still rounded once."""
    monkeypatch.setattr(gpu, "in_halves", lambda x, dtype: x.dtype == torch.bfloat16 and dtype == torch.float32)
    monkeypatch.setattr(gpu, "float32_product", lambda x, y: x.float() @ y.float())  # which torch has on CUDA alone
    torch.manual_seed(0)
    x, y = (torch.randn(T, D).bfloat16() for _ in range(2))
    A, h = torch.randn(R, D), torch.randn(T, R)
    keep = torch.empty(T, D, dtype=torch.uint8).bernoulli_(0.7) if masked else None
    mask = keep.double() if masked else torch.ones(T, D, dtype=torch.float64)
    x64, y64, A64, h64 = (t.double() for t in (x, y, A, h))
    assert gpu.operand(x, torch.float32) is x

    def near(found, expected, magnitude, dtype=torch.float32):
        assert found.dtype == dtype and found.shape == expected.shape
        allowed = (2**-16 + 2**-17 + (2 + T) * 2**-24) * magnitude + (2**-8 * expected.abs() if dtype != torch.float32 else 0)
        assert ((found.double() - expected).abs() <= allowed).all()

    near(gpu.narrow(x, A, keep), (x64 * mask) @ A64.t(), (x64 * mask).abs() @ A64.abs().t())
    near(gpu.tall(x, h), x64.t() @ h64, x64.abs().t() @ h64.abs())
    dA, dx = gpu.gradients(x, y.clone(), h, A, keep, torch.bfloat16)
    near(dA, h64.t() @ (x64 * mask), h64.abs().t() @ (x64 * mask).abs())
    near(dx, y64 + mask * (h64 @ A64), h64.abs() @ A64.abs(), torch.bfloat16)


@pytest.mark.skipif(not gpu._WRITES_FLOAT32, reason="this torch can't write the product of two bfloat16 matrices as float32")
def test_rocm_has_no_products_in_halves(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not runpy.run_path(gpu.__file__)["_WRITES_FLOAT32"]


@pytest.mark.parametrize("power", [-60, -10, 0, 10, 60])
def test_halves_hold_16_bits(power):
    a = torch.randn(7, 5) * 2.0**power
    high, low = gpu.halves(a)
    assert ((high.double() + low.double() - a.double()).abs() <= 2**-17 * a.double().abs()).all()
    assert torch.equal(gpu.halves(a.t())[0], a.t().bfloat16())


@pytest.mark.parametrize("large, small", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "every second"])
def test_an_update_is_added_to_one_token(large, small, shape, strided):
    torch.manual_seed(0)
    step = 1 + strided
    x, y = (torch.randn(*shape[:-1], D * step, dtype=torch.float64).to(large)[..., ::step] for _ in range(2))
    A, B = (torch.randn(size, dtype=torch.float64).to(small) for size in ((R, D), (D, R)))
    assert cpu.is_one_token(x, small)
    expected, before = y.double() + SCALING * x.double() @ A.double().t() @ B.double().t(), (x.clone(), A.clone(), B.clone())
    magnitude = y.double().abs() + x.double().abs() @ A.double().abs().t() @ B.double().abs().t()
    for dtype in {large, small}:
        found = cpu.add_to_token(y.clone(), x, A, B, SCALING, dtype)
        rounded = torch.finfo(dtype).eps / 2 if dtype != small else 0
        allowed = rounded * expected.abs() + (2 + D + R) * torch.finfo(small).eps * magnitude
        assert found.dtype == dtype and found.shape == shape and ((found.double() - expected).abs() <= allowed).all()
    assert all(map(torch.equal, (x, A, B), before))


def test_what_is_no_single_token_of_full_precision_goes_the_other_way():
    x = torch.randn(1, D)
    assert cpu.is_one_token(x, torch.float32) and not cpu.is_one_token(x, torch.bfloat16)
    others = (torch.randn(2, D), torch.randn(0, D), x.to("meta"), torch.nn.Parameter(x))
    assert not any(cpu.is_one_token(other, torch.float32) for other in others)
