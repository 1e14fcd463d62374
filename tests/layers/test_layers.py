"""One injected layer: what it computes, what it leaves alone, and folding adapters into its weight."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core import quantize_nf4
from lora_core.errors import StateError
from lora_core.layers import LoraConv1D, LoraLayer, LoraLinear, lora_class, why_not
from tests.support import oracle

D_IN, D_OUT, R = 64, 48, 4


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT, bias=bias).to(dtype)


def conv1d(dtype=torch.float32):
    torch.manual_seed(0)
    layer = Conv1D(D_OUT, D_IN)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def nf4(dtype=torch.float32, compute_dtype=None):
    model = nn.Sequential(linear(dtype))
    quantize_nf4(model, compute_dtype=compute_dtype)
    return model[0]


KINDS = {"linear": linear, "conv1d": conv1d, "nf4": nf4}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def adopt(layer, *names, dropout=0.0, random=True, scaling=0.5):
    """`layer` with active adapters of rank 4, 5, ..., all of their values random unless `random` is false."""
    lora = lora_class(layer).adopt(layer)
    for extra, name in enumerate(names):
        lora.add_adapter(name, R + extra, scaling + extra, dropout, init=not random)
    lora.activate(names)
    return lora


def parts(layer, name):
    """(A, B, s) of an adapter."""
    return layer.lora_A[name].detach(), layer.lora_B[name].detach(), layer.lora_scaling[name]


def matrix(layer):
    """The layer's frozen weight as (d_out, d_in), worked out from its type."""
    if isinstance(layer, Conv1D):
        return layer.weight.detach().t()
    if hasattr(layer.weight, "quant_state"):
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.detach()


def some_x(tokens, dtype=torch.float32):
    torch.manual_seed(4)
    return torch.randn(tokens, D_IN).to(dtype)


# --- a fresh adapter changes nothing ----------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(D_IN,), (3, D_IN), (2, 3, D_IN), (4, 50, D_IN), (0, D_IN)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fresh_adapter_changes_no_bit(kind, dtype, shape, dropout):
    layer = KINDS[kind](dtype)
    x = torch.randn(shape).to(dtype)
    before = layer(x)
    lora = adopt(layer, "a", "b", dropout=dropout, random=False).train()
    assert torch.equal(lora(x), before)
    lora.activate(["a"])
    assert torch.equal(lora(x), before)


@pytest.mark.parametrize("kind", ["linear", "nf4"])  # Conv1D itself refuses such an input
def test_a_fresh_adapter_changes_no_bit_of_a_strided_input(kind):
    layer = KINDS[kind]()
    x = torch.randn(D_IN, 6, 5).permute(2, 1, 0)
    before = layer(x)
    assert torch.equal(adopt(layer, "a", random=False)(x), before)


@EVERY_KIND
def test_initial_values(kind):
    lora = adopt(KINDS[kind](), "a", random=False)
    A, B, _ = parts(lora, "a")
    assert A.shape == (R, D_IN) and B.shape == (D_OUT, R) and not B.any()
    # Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(d_in): bounded by it, and filling it.
    assert A.abs().max() <= D_IN**-0.5 and A.abs().max() > 0.9 * D_IN**-0.5
    assert abs(A.mean()) < 5 * D_IN**-0.5 / (3 * A.numel()) ** 0.5


@pytest.mark.parametrize(
    ("weight", "adapter"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_adapters_are_kept_in_at_least_float32(weight, adapter):
    lora = adopt(linear(weight), "a")
    assert lora.lora_A["a"].dtype == lora.lora_B["a"].dtype == adapter


# --- what it computes -------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids="+".join)
@pytest.mark.parametrize("tokens", [3, 300], ids=["few-tokens", "many-tokens"])
def test_active_adapters_add_up(kind, names, tokens):
    lora = adopt(KINDS[kind](), *names)
    x = some_x(tokens)
    expected, bound = 0, 0
    W, b = matrix(lora).double(), lora.bias.detach().double()
    for number, name in enumerate(names):
        A, B, s = parts(lora, name)
        first = number == 0
        arguments = [x.double(), W if first else torch.zeros_like(W), b if first else None, A.double(), B.double()]
        expected = expected + oracle.lora_linear(*arguments, s)
        bound = bound + oracle.lora_linear(*(t if t is None else t.abs() for t in arguments), s)
    oracle.assert_within_rounding(lora(x), expected, bound, D_IN + 12)


@EVERY_KIND
def test_gradients_of_two_adapters_with_different_dropout_reach_both(kind):
    lora = adopt(KINDS[kind](), "a", "b")
    lora.lora_dropout["b"] = 0.5
    for name in ("a", "b"):
        lora.lora_A[name].requires_grad_()
        lora.lora_B[name].requires_grad_()
    lora.train()(some_x(6)).square().sum().backward()
    assert all(table[name].grad.any() for table in (lora.lora_A, lora.lora_B) for name in ("a", "b"))


@EVERY_KIND
def test_dropout_is_only_for_training(kind):
    lora = adopt(KINDS[kind](), "a", dropout=0.5)
    x = some_x(5)
    assert torch.equal(lora.eval()(x), lora(x))
    assert not torch.equal(lora.train()(x), lora(x))


@EVERY_KIND
def test_an_inactive_adapter_costs_and_changes_nothing(kind):
    layer = KINDS[kind]()
    x = some_x(5)
    before = layer(x)
    lora = adopt(layer, "a")
    lora.activate([])
    assert torch.equal(lora(x), before)


def test_activate_ignores_adapters_that_are_elsewhere():
    lora = adopt(linear(), "a")
    lora.activate(["other", "a"])
    assert lora.lora_active == ("a",)


# --- the object stays what it was -------------------------------------------------------------------------------------


@EVERY_KIND
def test_adopting_keeps_object_class_parameters_and_keys(kind):
    layer = KINDS[kind]()
    base, weight, keys = type(layer), layer.weight, set(layer.state_dict())
    lora = adopt(layer, "a")
    assert lora is layer and isinstance(lora, base) and isinstance(lora, LoraLayer)
    assert lora.weight is weight
    assert set(lora.state_dict()) - keys == {"lora_A.a", "lora_B.a"}


@EVERY_KIND
def test_releasing_gives_back_exactly_what_was_there(kind):
    layer = KINDS[kind]()
    called = []
    layer.register_forward_hook(lambda *args: called.append(1))
    attributes, base, weight = sorted(vars(layer)), type(layer), layer.weight
    state = {key: t.clone() for key, t in layer.state_dict().items()}
    lora = adopt(layer, "a", "b")
    lora.fold(["a"])
    released = lora.release()
    assert released is layer and type(layer) is base and sorted(vars(layer)) == attributes and layer.weight is weight
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(layer.state_dict()[key], t) for key, t in state.items())
    layer(some_x(2))
    assert called


def test_a_deep_copy_is_independent():
    lora = adopt(linear(), "a")
    twin = copy.deepcopy(lora)
    assert torch.equal(twin(some_x(3)), lora(some_x(3)))
    twin.lora_A["a"].data.zero_()
    assert not torch.equal(twin(some_x(3)), lora(some_x(3)))


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.Bilinear(2, 2, 2),
        nn.Identity(),
        nn.Embedding(3, 4, max_norm=1.0),  # rescales the weight as it reads it
        nn.EmbeddingBag(3, 4),
        nn.ConvTranspose2d(1, 1, 1),
        nn.LazyConv2d(1, 1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_other_modules_have_no_class(module):
    assert lora_class(module) is None


@pytest.mark.parametrize("base", [nn.Linear, nn.Conv2d, nn.Embedding])
def test_a_subclass_has_a_class_if_it_keeps_the_forward(base):
    sizes = (2, 3, *((1,) if base is nn.Conv2d else ()))
    same, own = type("Same", (base,), {}), type("Own", (base,), {"forward": lambda self, x: x})
    assert issubclass(lora_class(same(*sizes)), (LoraLayer, same)) and lora_class(own(*sizes)) is None
    assert why_not(own(*sizes)) == f"its forward may compute something else than that of nn.{base.__name__}"
    called = type("Called", (base,), {"__call__": lambda self, x: x})
    assert lora_class(called(*sizes)) is None


def test_each_kind_of_layer_has_one_class_that_is_a_subclass_of_its_own():
    for make in (
        lambda: nn.Conv1d(2, 2, 1),
        lambda: nn.Conv2d(2, 2, 1),
        lambda: nn.Conv3d(2, 2, 1),
        lambda: nn.Embedding(2, 2),
    ):
        assert lora_class(make()) is lora_class(make()) and issubclass(lora_class(make()), (LoraLayer, type(make())))
        assert issubclass(lora_class(make()), type(make()))


def test_a_linear_layer_with_a_forward_of_its_own_has_no_class():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert lora_class(Doubled(2, 2)) is None


def test_classes():
    assert lora_class(linear()) is LoraLinear
    assert issubclass(lora_class(conv1d()), (LoraConv1D, Conv1D))
    assert lora_class(conv1d()) is lora_class(conv1d())
    assert lora_class(adopt(linear(), "a")) is LoraLinear


# --- folding ----------------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids="+".join)
def test_folded_computes_the_same_and_unfolding_restores_every_byte(kind, names):
    lora = adopt(KINDS[kind](), *names).eval()
    x = some_x(40)
    unfolded, weight = lora(x), lora.weight
    data, W = weight.data.clone(), matrix(lora)
    state = copy.deepcopy(getattr(weight, "quant_state", None))

    assert lora.fold(names) == (0.0, 1.0)  # nothing lost, all kept
    expected = oracle.merged_weight(W, [parts(lora, name) for name in names])
    magnitude = oracle.merged_weight(W.abs(), [(A.abs(), B.abs(), s) for A, B, s in (parts(lora, n) for n in names)])
    folded = lora.weight.detach().t() if kind == "conv1d" else lora.weight.detach()
    oracle.assert_within_rounding(folded, expected, magnitude, R + 5)
    # The same sum in another order, in float32: each of 64 terms may round once, at the size of the output.
    torch.testing.assert_close(lora(x), unfolded, rtol=1e-5, atol=64 * 6e-8 * unfolded.abs().max().item())

    lora.unfold()
    assert lora.weight is weight and torch.equal(lora.weight.data, data) and not lora.lora_folded
    assert torch.equal(matrix(lora), W)
    if state is not None:
        assert torch.equal(lora.weight.quant_state.absmax, state.absmax)
    assert torch.equal(lora(x), unfolded)


def test_16_bit_weights_are_folded_in_float32_and_cast_once():
    lora = adopt(linear(torch.bfloat16), "a", "b")
    exact = oracle.merged_weight(lora.weight.detach(), [parts(lora, "a"), parts(lora, "b")])
    before = lora.weight.detach().double()
    lost = lora.fold(["a", "b"]).lost
    folded = lora.weight.detach()
    # One rounding to bfloat16, by half of eps = 2^-7 at most; float32's errors before it are 65,536 times smaller.
    assert ((folded.double() - exact).abs() <= exact.abs() * (2**-8 + 1e-5) + 1e-7).all()
    error = (folded.double() - exact).norm() / (exact - before).norm()
    assert lost == pytest.approx(error.item(), rel=1e-3) and lost > 0


def test_an_update_too_small_for_bfloat16_is_reported_as_lost():
    lora = adopt(linear(torch.bfloat16), "a")
    lora.weight.data.fill_(1.0)
    lora.lora_A["a"].data.fill_(1e-3)
    lora.lora_B["a"].data.fill_(1e-3)
    assert lora.fold(["a"]) == pytest.approx((1.0, 0.0), rel=0.03)  # 1 + 2e-6 is 1 in bfloat16; float32 knows it to 3 %


def test_nothing_folded_is_nothing_lost():
    lora = adopt(linear(torch.bfloat16), "a", random=False)
    before = lora.weight.detach().clone()
    assert lora.fold(["a"]) == (0.0, 1.0) and torch.equal(lora.weight, before)


@EVERY_KIND
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_folded(kind, bad):
    lora = adopt(KINDS[kind](), "a")
    weight = lora.weight
    lora.lora_A["a"].data[0, 0] = bad
    with pytest.raises(StateError, match="'?a'? .*NaN or infinite"):
        lora.fold(["a"])
    assert lora.weight is weight and not lora.lora_folded


def test_folding_leaves_a_tied_weight_elsewhere_alone():
    layer, other = linear(), nn.Linear(D_IN, D_OUT)
    other.weight = layer.weight
    before = layer.weight.detach().clone()
    lora = adopt(layer, "a")
    lora.fold(["a"])
    assert torch.equal(other.weight, before) and not torch.equal(layer.weight, before)
    lora.unfold()
    assert other.weight is layer.weight


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folded_4_bit_layer_takes_what_it_took_before(dtype, compute_dtype):
    """The compute dtype may be neither that of the input nor that of the bias."""
    lora = adopt(nf4(dtype, compute_dtype), "a")
    x = some_x(7, dtype)
    unfolded = lora(x)
    lora.fold(["a"])
    folded = lora(x)
    assert folded.dtype == unfolded.dtype == dtype
    # bfloat16 rounds at eps = 1/128 of a value; A, B, the thin product, W + D, x and y are each rounded once.
    scale = 1e-5 if dtype == compute_dtype == torch.float32 else 6 / 128
    assert (folded - unfolded).abs().max() <= scale * unfolded.abs().max()
