"""Random shapes, dtypes and layouts against the oracle, empty ones among them; and files that were damaged at random."""

import copy
import functools
import hashlib
import json
import random
import shutil
import signal
import struct
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

from experiments import checkpoints
from lora_core import LoraConfig, LoraError, inject, load_adapter, save_adapter, unload
from lora_core.deploy.convert import convert_adapter
from lora_core.deploy.inspection import inspect_adapter
from lora_core.deploy.stream import merge_checkpoint
from lora_core.deploy.updates import read_updates
from lora_core.files.storage import CONFIG_FILE, WEIGHTS_FILE
from lora_core.maths.lora import lora_linear
from lora_core.spec.patterns import END, MAX_SECONDS, WHOLE, matches, refusal
from tests.support import attacks, kinds, linear, oracle, tiny

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


@settings(derandomize=True, deadline=None, max_examples=300)
@given(pattern=st.recursive(ATOMS, larger, max_leaves=12), form=st.sampled_from([WHOLE, END]))
def test_what_a_file_may_ask_for_is_matched_in_time(pattern, form):
    """Paths of many dots and of one letter are where patterns of these atoms have the most ways to go."""
    assert refusal(pattern, form) is None
    for path in ("q" * 1_000, "." * 1_000, "0" * 1_000, "layers." * 140 + "!", "layers.0.q"):
        start = time.thread_time()
        matches(pattern, path, form)
        assert time.thread_time() - start < MAX_SECONDS


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


def test_a_model_without_parameters_or_layers_is_refused(tmp_path):
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"]))
    save_adapter(model, tmp_path)
    for empty in (nn.Identity(), nn.Sequential(), nn.ModuleDict({"q": nn.Identity()})):
        with pytest.raises(LoraError):
            load_adapter(empty, tmp_path)


# --- every file that is read, at every door ---------------------------------------------------------------------------

HOLES = ["\0", "\x1b[2J", "\n", "\u202e", "9" * 30, "-1", "1e999", "NaN", "null", "[[", "{}", '"', "a" * 2_000]


def torn(data, rng):
    """A file with one mutation more: as JSON or as a header if it is one, or as bytes, or with a hole in its text."""
    what = rng.randrange(4)
    try:
        if what == 0:
            return edit(json.loads(data), rng)
        if what == 1:
            (size,) = struct.unpack("<Q", data[:8])
            header = edit(json.loads(data[8 : 8 + size]), rng)
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
        pass  # it is neither, or broken already
    if what == 2 and data:
        place = rng.randrange(min(len(data), 2_000))
        return data[:place] + rng.choice(HOLES).encode() + data[place + rng.choice([0, 1, 8]) :]
    return damage(data, rng) if data else b"{"


def knock(root, kind):
    """Opens what is below `root` as the commands do; raises nothing but a LoraError."""
    adapter, base, out = root / "adapter", root / "base", root / "out"
    if kind == "checkpoint":
        found = checkpoints.newest(root / "run")
        if found:
            found.tensors()
        return checkpoints.read(root / attacks.STEP)
    if kind == "base":
        return merge_checkpoint(base, [adapter], out)
    str(inspect_adapter(adapter))
    return convert_adapter(adapter, out, dtype=torch.float16)


def fuzz_all(tmp_path, count, seed):
    """Mutates files of adapters, pickled ones too, bases and checkpoints; returns how many were read all the same."""
    rng, root, whole = random.Random(seed), tmp_path / "root", 0
    attacks.build(root)
    good = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    weights = root / attacks.WEIGHTS
    torch.save(load_file(weights), root / attacks.PICKLE)
    good[root / attacks.PICKLE] = (root / attacks.PICKLE).read_bytes()
    files = {kind: [p for p in good if p.relative_to(root).parts[0] == folder] for kind, folder in
             (("adapter", "adapter"), ("base", "base"), ("checkpoint", "run"))}  # fmt: skip
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        for i in range(count):
            kind = ("adapter", "base", "checkpoint")[i % 3]
            for path, data in good.items():
                path.write_bytes(data)
            if i % 2:  # the pickle is read where there is nothing else
                weights.unlink()
            chosen = rng.choice(sorted(path for path in files[kind] if path.exists()))
            data = chosen.read_bytes()
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                data = torn(data, rng)
            chosen.write_bytes(data)
            if kind == "checkpoint" and rng.random() < 0.5:  # whoever damages it can count its hash anew
                rehash(root / attacks.STEP)
            before = sorted(p for p in root.rglob("*"))
            signal.setitimer(signal.ITIMER_REAL, 20)
            started = time.process_time()
            try:
                knock(root, kind)
                whole += 1
            except LoraError as error:
                assert str(error).isprintable() and "\n" not in str(error), (seed, i, str(error))
            except BaseException as error:
                raise AssertionError(f"mutation {i} of seed {seed}, {chosen.name}: {error!r}; {data[:2_000]!r}") from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert time.process_time() - started < 2, (seed, i, chosen)
            shutil.rmtree(root / "out", ignore_errors=True)
            left = {p for p in root.rglob("*") if "out" not in p.relative_to(root).parts} - set(before)
            assert not left, (seed, i, left)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return whole


def rehash(step):
    try:
        numbers = json.loads((step / checkpoints.NUMBERS).read_bytes())
        for name in numbers["sha256"]:
            numbers["sha256"][name] = hashlib.sha256((step / name).read_bytes()).hexdigest()
        (step / checkpoints.NUMBERS).write_text(json.dumps(numbers))
    except (ValueError, TypeError, KeyError, OSError, RecursionError):
        pass  # it is what was damaged


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path, capsys):
    whole = fuzz_all(tmp_path, 120, seed=0)
    assert 10 < whole < 100  # else the damage is too great, or none, and shows nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_damaged_files_are(tmp_path, seed):
    """Nine hundred of each seed at every door, and a hundred adapters onto a model."""
    fuzz_all(tmp_path / "files", 900, seed)
    (tmp_path / "adapter").mkdir()
    fuzz(tmp_path / "adapter", 100, seed)
