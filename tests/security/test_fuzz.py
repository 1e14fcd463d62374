"""Random shapes, dtypes and layouts against the oracle, empty ones among them; and adapters that were damaged at random."""

import copy
import functools
import json
import random
import signal
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_core import LoraConfig, LoraError, inject, load_adapter, save_adapter, unload
from lora_core.deploy.updates import read_updates
from lora_core.files.storage import CONFIG_FILE, WEIGHTS_FILE
from lora_core.maths.lora import lora_linear
from lora_core.spec.patterns import END, LENGTH, MAX_SECONDS, WHOLE, expression_of, matches, refusal
from tests.support import kinds, linear, oracle, tiny

FIXED = settings(derandomize=True, deadline=None, max_examples=150)  # the same examples everywhere, on any machine

# --- the fused linear layer -------------------------------------------------------------------------------------------


def laid_out(x, layout):
    """The same values, or for `expanded` the first row's for all, in memory of another order."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "expanded" and x.dim() > 1 and len(x):
        return x[:1].expand(x.shape)
    return x


LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)  # the dimensions before the last: none, or empty, or up to 125


@FIXED
@given(
    shape=SHAPES,
    d_in=st.integers(1, 20),
    d_out=st.integers(1, 20),
    r=st.integers(1, 24),
    dtype=st.sampled_from(list(linear.ROUNDINGS)),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    bias=st.booleans(),
    dense=st.sampled_from([None, torch.clone]),
    layouts=st.tuples(LAYOUTS, LAYOUTS, st.sampled_from(["contiguous", "transposed", "strided"])),
    scaling=st.sampled_from([1.0, 0.25, -2.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_dtype_rank_and_layout_follows_the_equation(
    shape, d_in, d_out, r, dtype, dropout, bias, dense, layouts, scaling, seed
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    mask, kept = linear.recover_mask(shape, dropout, seed, d_in)
    tensors = {"x": laid_out(draw(*shape, d_in), layouts[0]), "W": laid_out(draw(d_out, d_in), layouts[2])}
    tensors |= {"b": draw(d_out) if bias else None, "A": draw(r, d_in), "B": draw(d_out, r)}
    dy = laid_out(draw(*shape, d_out), layouts[1])
    for name in ("x", "A", "B"):
        tensors[name] = tensors[name].detach().requires_grad_()
    torch.manual_seed(seed)
    y = lora_linear(*tensors.values(), scaling, dropout, dense)
    y.backward(dy)
    expected_y, expected = oracle.lora_linear_and_gradients(tensors, scaling, dy, mask, kept)
    bound_y, bounds = oracle.rounding_bound(tensors, scaling, dy, mask, kept)
    # As in test_functional, whose longest sum is 60: here it has 125 terms and then 24.
    roundings = 8 if dtype.itemsize == 2 else 160
    assert y.dtype == dtype and y.shape == (*shape, d_out)
    oracle.assert_within_rounding(y, expected_y, bound_y, roundings)
    for name in ("x", "A", "B"):
        oracle.assert_within_rounding(tensors[name].grad, expected[name], bounds[name], roundings)


# --- every kind of layer ----------------------------------------------------------------------------------------------


def input_for(kind, shape, layout, seed):
    """An input of this kind with these sizes before its features: batches and lengths, any of which may be zero."""
    torch.manual_seed(seed)
    like = kinds.KINDS[kind].x()
    if kinds.is_embedding(kind):
        return laid_out(torch.randint(0, 9, shape), layout)
    if like.dim() > 2 and "linear" not in kind:  # a convolution: its lengths must do for the kernel
        return laid_out(torch.randn(shape[0] if shape else 1, *like.shape[1:]), layout)
    return laid_out(torch.randn(*shape, like.shape[-1]), layout)


@FIXED
@given(
    kind=st.sampled_from(list(kinds.KINDS)),
    names=st.sampled_from(kinds.ALONE + kinds.TOGETHER),
    shape=SHAPES,
    layout=LAYOUTS,
    seed=st.integers(0, 99),
)
def test_any_input_of_any_kind_of_layer_follows_the_equation(kind, names, shape, layout, seed):
    lora, x = kinds.build(kind, names), input_for(kind, shape, layout, seed)
    before = x.clone()
    expected, bound = kinds.expected_output(kind, lora, lora.lora_active, x)
    y = lora(x)
    oracle.assert_within_rounding(y, expected, bound, kinds.roundings(kinds.KINDS[kind].matrix(lora)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("names", kinds.ALONE + kinds.TOGETHER[-1:], ids="+".join)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_empty_batch_gives_an_empty_output_and_gradients_of_zero(kind, names, training):
    """The last batch of a worker that got no rows: it must not fail, nor change what is trained."""
    lora, x = kinds.build(kind, names).train(training), input_for(kind, (0,), "contiguous", 0)
    for name in lora.lora_active:
        lora.lora_dropout[name] = 0.5
        for parameter in lora.trained(name):
            parameter.requires_grad_()
    x = x if kinds.is_embedding(kind) else x.requires_grad_()
    y = lora(x)
    assert y.shape[0] == 0 and y.shape == lora.lora_base_class.forward(lora, x).shape
    if lora.lora_active:
        y.sum().backward()
        gradients = [p.grad for name in lora.lora_active for p in lora.trained(name)]
        assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "Conv1D", "nf4", "embedding", "padded embedding"])
@pytest.mark.parametrize("names", kinds.ALONE, ids="+".join)
def test_sequences_of_no_tokens(kind, names, shape):
    lora, x = kinds.build(kind, names), input_for(kind, shape, "contiguous", 0)
    for name in lora.lora_active:
        for parameter in lora.trained(name):
            parameter.requires_grad_()
    y = lora(x)
    assert y.shape == (*shape, kinds.D_OUT)
    if y.requires_grad:
        y.sum().backward()
        assert not any(p.grad.any() for name in lora.lora_active for p in lora.trained(name))


# --- patterns of files ------------------------------------------------------------------------------------------------

ATOMS = st.sampled_from(["q", "v", ".", r"\.", r"\d", r"\w", "[qv]", "layers", "0", r"[^.]"])


def larger(inner):
    repeat = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{0,3}", "{1,}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        st.tuples(inner, repeat).map("(?:{0[0]}){0[1]}".format),
        inner.map("(?={0})".format),
    )


@settings(derandomize=True, deadline=None, max_examples=600)
@given(pattern=st.recursive(ATOMS, larger, max_leaves=12), form=st.sampled_from([WHOLE, END]))
def test_what_a_file_may_ask_for_is_matched_in_time(pattern, form):
    """Paths of many dots and of one letter are where patterns of these atoms have the most ways to go."""
    if refusal(pattern, form) is not None:
        return
    for path in ("q" * LENGTH, "." * LENGTH, "0" * LENGTH, "layers." * 9 + "!", "layers.0.q"):
        start = time.perf_counter()
        found = matches(pattern, path, form)
        assert time.perf_counter() - start < MAX_SECONDS
        expression = expression_of(pattern, form)
        assert bool(found) == bool(expression.fullmatch(path) if form == WHOLE else expression.match(path))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r".*(?:q|v)_proj$",
        r"model\.layers\.([0-9]|1[0-5])\.self_attn\.(q|v)_proj",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?=.*self_attn)(?!.*vision).*\.(q|k)$",
        r"(layers\.\d+\.)?self_attn\.\w+",
        rf"layers\.({'|'.join(map(str, range(80)))})\..*\.(q|v)",
        # as unsloth writes it for models of language and vision
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)"
        r"\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    ],
)
def test_patterns_that_people_use_are_accepted(pattern):
    assert refusal(pattern, WHOLE) is None


# --- damaged adapters -------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 4, 5, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf")]
VALUES = [None, True, False, *NUMBERS]
TEXTS = ["", "q", "v", "LORA", "all-linear", "none", "all", "pissa", "(", ".*", "(.*)*x", "(?i)q", "a\nb", "\ud800", "../x"]
VALUES += [*TEXTS, "F16", "I32", "F8_E4M3", "x" * 5_000, [], {}, [1], ["q"], ["q", "v"], ["("], [[]], {"q": 4}, {"q": 0}]
VALUES += [{"(": 1}, {"a": {"b": []}}, {"q": 10**30}, {"q": 10**400}, {"(?i)q": 4}, [0, 64], [4, 16], [64, 0]]
NAMES = ["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "layers_to_transform"]
NAMES += ["use_dora", "use_rslora", "lora_bias", "bias", "modules_to_save", "task_type", "exclude_modules", "peft_type", "new"]
NAMES += ["lora_dropout", "init_lora_weights", "base_model_name_or_path", "dtype", "shape", "data_offsets", "__metadata__"]


def places(node):
    """(container, key) of everything in a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(items):
        yield node, key
        yield from places(child)


def edit(node, rng):
    """Changes a JSON object in one place; returns its text."""
    container, key = rng.choice(list(places(node)))
    what = rng.randrange(10)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[rng.choice(NAMES + TEXTS)] = container.pop(key)
    elif what == 2:
        container[key] = copy.deepcopy(rng.choice([container[key] for container, key in places(node)]))
    elif what == 3 and isinstance(container[key], int):
        container[key] += rng.choice([-1, 1, 8, -8, 2**32, -(2**32)])
    elif what == 4:
        container[key] = rng.choice(VALUES)
    else:  # what the reader looks at: a field, or in a header a field of a tensor
        inner = [child for child in node.values() if isinstance(child, dict) and "dtype" in child]
        known = [name for name in NAMES if name in ("dtype", "shape", "data_offsets")] if inner else NAMES
        name = rng.choice(known)
        rng.choice(inner or [node])[name] = rng.choice(NUMBERS if name in ("r", "lora_alpha", "lora_dropout") else VALUES)
    return json.dumps(node).encode()


def damage(data, rng):
    """Bytes flipped, cut, put elsewhere, or written twice."""
    data, what = bytearray(data), rng.randrange(5)
    i, j = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    # Most of a weights file is values, of which nothing much can be wrong: half of the damage goes to its start.
    i = rng.randrange(min(len(data), 2_000)) if rng.random() < 0.5 else i
    length = rng.choice([1, 2, 8, 64, 500])
    if what == 0:
        for _ in range(rng.choice([1, 1, 3, 30])):
            data[rng.randrange(min(len(data), rng.choice([16, 2_000, len(data)])))] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[i:]
    elif what == 2:
        del data[i : i + length]
    elif what == 3:
        data[i:i] = data[j : j + length]
    else:
        data[i : i + length] = bytes(rng.randrange(256) for _ in range(length))
    return bytes(data)


def mutated(weights, config, rng):
    """(weights, config) with one or a few mutations."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.choice(["weights", "header", "header", "config", "fields", "fields", "fields"])
        try:
            if kind == "weights":
                weights = damage(weights, rng)
            elif kind == "header":
                (size,) = struct.unpack("<Q", weights[:8])
                header = edit(json.loads(weights[8 : 8 + size]), rng)
                weights = struct.pack("<Q", len(header)) + header + weights[8 + size :]
            elif kind == "config":
                config = damage(config, rng)
            else:
                config = edit(json.loads(config), rng)
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
            continue  # broken already: nothing there to edit
    return weights, config


class Taken(Exception):
    """An adapter took too long."""


def stop(*_):
    raise Taken


def fuzz(directory, count, seed):
    """Loads `count` damaged adapters; returns how many loaded all the same."""
    rng, loaded = random.Random(seed), 0
    torch.manual_seed(0)
    model = tiny.Classifier(width=16)
    variants = [{}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"v": 2}, "use_rslora": True}]
    originals = []
    for variant in variants:
        fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "modules_to_save": ["classifier"], **variant}
        inject(model, LoraConfig(**fields))
        save_adapter(tiny.randomize(model), directory)
        originals.append(((directory / WEIGHTS_FILE).read_bytes(), (directory / CONFIG_FILE).read_bytes()))
        unload(model)
    before, previous = tiny.snapshot(model), signal.signal(signal.SIGALRM, stop)
    try:
        for i in range(count):
            weights, config = mutated(*rng.choice(originals), rng)
            (directory / WEIGHTS_FILE).write_bytes(weights)
            (directory / CONFIG_FILE).write_bytes(config)
            for read in (functools.partial(load_adapter, model, strict=i % 2 == 0), read_updates):
                signal.setitimer(signal.ITIMER_REAL, 5)
                try:
                    read(directory=directory)
                except LoraError as error:
                    assert str(error).isprintable(), (seed, i, str(error))
                except BaseException as error:
                    raise AssertionError(f"mutation {i} of seed {seed}: {error!r}; config {config[:2_000]!r}") from error
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if "lora_registry" in vars(model):
                    loaded += 1
                    unload(model)
            assert tiny.snapshot(model) == before, (seed, i)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return loaded


@pytest.mark.filterwarnings("ignore")
def test_damaged_adapters_are_refused_or_loaded_and_nothing_else(tmp_path):
    loaded = fuzz(tmp_path, 300, seed=0)
    assert 10 < loaded < 200  # else the damage is too great, or none, and shows nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_damaged_adapters_are(tmp_path, seed):
    fuzz(tmp_path, 1_000, seed)


def test_a_model_without_parameters_or_layers_is_refused(tmp_path):
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"]))
    save_adapter(model, tmp_path)
    for empty in (nn.Identity(), nn.Sequential(), nn.ModuleDict({"q": nn.Identity()})):
        with pytest.raises(LoraError):
            load_adapter(empty, tmp_path)
