"""What is broken, wrong or hostile, a line each: one error of its own kind, in one line, within seconds, and nothing changes.

Example:

    pytest tests/security/test_bad_input.py -s | grep "bad inputs"      how many there are, here and in the other tests
"""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import sys
import time
import warnings

import pytest
from huggingface_hub import constants

from experiments import data, hub, predict, sst2
from experiments.errors import ExperimentError
from lora_core import LoraConfig, LoraError, inject, load_adapter, save_adapter
from lora_core.__main__ import main as lora_core_main
from lora_core.deploy.updates import read_updates
from lora_core.errors import (
    AdapterNameError,
    ConfigError,
    FileFormatError,
    OutputError,
    TargetError,
    WrongBaseError,
)
from lora_core.files.storage import CONFIG_FILE, FINGERPRINT, WEIGHTS_FILE
from tests.support import tiny
from tests.support.bad_adapters import BAD
from tests.support.bad_checkpoints import FAULTS, LIES
from tests.support.bad_settings import REFUSED

SECONDS = 2.0


@contextlib.contextmanager
def within(seconds=SECONDS):
    """Fails what takes longer, at once: what hangs would hang the suite."""

    def stop(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before, start = signal.signal(signal.SIGALRM, stop), time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - start < seconds


def listing(directory):
    return {str(p.relative_to(directory)): p.lstat().st_size for p in directory.rglob("*")}


def assert_refused(error, says, call):
    """`call` raises a LoraError of exactly this class, whose message is a line to be read, and says so."""
    with within(), pytest.raises(LoraError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, repr(caught.value)
    assert says in message and message.isprintable() and 20 < len(message) <= 1_000, message


# --- adapter directories ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory with a good adapter of `tiny.classifier()`."""
    directory = tmp_path_factory.mktemp("good") / "adapter"
    model = tiny.classifier()
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], modules_to_save=["classifier"]))
    save_adapter(tiny.randomize(model), directory)
    return directory


def raw(content):
    """The weights file is this."""
    return lambda d: (d / WEIGHTS_FILE).write_bytes(content)


def cut(where):
    """The weights file ends there: a number of bytes, or what it is called."""

    def spoil(directory):
        path = directory / WEIGHTS_FILE
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        places = {"after the length": 8, "in the header": 8 + size // 2, "before its last byte": 7 + size, "after it": 8 + size}
        places |= {"in the last tensor": len(content) - 5, "before the last byte": len(content) - 1}
        path.write_bytes(content[: places.get(where, where)])

    return spoil


def header(change, length=None, tail=b""):
    """The header of the weights file is another: changed in place, or what `change` returns."""

    def spoil(directory):
        path = directory / WEIGHTS_FILE
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + size])
        text = change(entries)
        text = json.dumps(entries).encode() if not isinstance(text, bytes) else text
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :] + tail)

    return spoil


KEY = "base_model.model.layers.0.q.lora_A.weight"
OTHER = "base_model.model.layers.1.q.lora_A.weight"


def entry(**fields):
    return header(lambda h: h[KEY].update(fields))


def renamed(name):
    return header(lambda h: h.update({name: h.pop(KEY)}))


def twice(other):
    return header(lambda h: (json.dumps(h)[:-1] + f', "{KEY}": {json.dumps(h[other])}}}').encode())


def mark(value):
    """The fingerprint is this."""
    return header(lambda h: h["__metadata__"].update({FINGERPRINT: value if isinstance(value, str) else json.dumps(value)}))


def text(content):
    """The configuration file is this."""
    return lambda d: (d / CONFIG_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())


def fields(**changes):
    """The configuration says this."""

    def spoil(directory):
        path = directory / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def appended(more):
    return lambda d: (d / CONFIG_FILE).write_text((d / CONFIG_FILE).read_text().rstrip()[:-1] + f", {more}}}")


def fifo(directory):
    (directory / WEIGHTS_FILE).unlink()
    os.mkfifo(directory / WEIGHTS_FILE)


def in_the_way(directory):
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).mkdir()


def loop(directory):
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).symlink_to(CONFIG_FILE)


EMPTY = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}%*s}'
FORMAT, BROKEN = FileFormatError, "not a whole safetensors file"
RANKS = [f"m{i}.q" for i in range(20_000)]
HALF = RANKS[:10_000]
LAYERS = {"layers_to_transform": [0, 1]}
SLOW = "(\\w+\\.?)+x"
STAY = {"base": {}, "settings": ""}


def of(base):
    return STAY | {"base": {"layers.0.q": base}}


ADAPTERS = {
    # the weights file, cut at every boundary of its structure
    "weights: nothing": (cut(0), FORMAT, BROKEN),
    "weights: half a length": (cut(4), FORMAT, BROKEN),
    "weights: a length": (cut("after the length"), FORMAT, BROKEN),
    "weights: half a header": (cut("in the header"), FORMAT, BROKEN),
    "weights: a header but for its last byte": (cut("before its last byte"), FORMAT, BROKEN),
    "weights: a header": (cut("after it"), FORMAT, BROKEN),
    "weights: the last tensor cut": (cut("in the last tensor"), FORMAT, BROKEN),
    "weights: the last byte cut": (cut("before the last byte"), FORMAT, BROKEN),
    "weights: a byte too many": (header(lambda h: None, tail=b"\0"), FORMAT, BROKEN),
    # headers that lie
    "header: longer than the file": (header(lambda h: None, length=10_000), FORMAT, BROKEN),
    "header: longer than is allowed": (header(lambda h: None, length=25_000_001), FORMAT, "25,000,000 are allowed"),
    "header: 2^64 - 1 bytes": (header(lambda h: None, length=2**64 - 1), FORMAT, "18,446,744,073,709,551,615 bytes long"),
    "header: of no bytes": (raw(bytes(8)), FORMAT, BROKEN),
    "header: ends early": (header(lambda h: None, length=20), FORMAT, BROKEN),
    "header: not UTF-8": (header(lambda h: b'{"\xff": 1}'), FORMAT, BROKEN),
    "header: too deep": (header(lambda h: b"[" * 100_000), FORMAT, BROKEN),
    "header: too deep inside": (header(lambda h: b'{"a":' * 100_000 + b"1" + b"}" * 100_000), FORMAT, BROKEN),
    "header: a list": (header(lambda h: b"[]"), FORMAT, BROKEN),
    "header: a huge number": (header(lambda h: b'{"a": 1' + b"0" * 5_000 + b"}"), FORMAT, BROKEN),
    "header: a tensor is a number": (header(lambda h: h.update({KEY: 3})), FORMAT, BROKEN),
    "header: metadata is a list": (header(lambda h: h.update(__metadata__=[])), FORMAT, BROKEN),
    "header: metadata of numbers": (header(lambda h: h.update(__metadata__={"format": 1})), FORMAT, BROKEN),
    "header: tensors without end": (header(lambda h: EMPTY % (26_000_000, b"")), FORMAT, "25,000,000 are allowed"),
    # tensors that lie
    "tensor: twice, the same": (twice(KEY), FORMAT, "stands there twice"),
    "tensor: twice, of another place": (twice(OTHER), FORMAT, "stands there twice"),
    "tensor: overlapping": (header(lambda h: h[KEY].update(data_offsets=h[OTHER]["data_offsets"])), FORMAT, BROKEN),
    "tensor: beyond the end": (entry(data_offsets=[0, 10**9]), FORMAT, BROKEN),
    "tensor: before the start": (entry(data_offsets=[-8, 1016]), FORMAT, BROKEN),
    "tensor: end before start": (entry(data_offsets=[1024, 0]), FORMAT, BROKEN),
    "tensor: no place": (header(lambda h: h[KEY].pop("data_offsets") and None), FORMAT, BROKEN),
    "tensor: larger than its bytes": (entry(shape=[10**6, 10**6]), FORMAT, BROKEN),
    "tensor: a shape that overflows": (entry(shape=[2**63, 2**63]), FORMAT, BROKEN),
    "tensor: a shape beyond 64 bits": (entry(shape=[10**30]), FORMAT, BROKEN),
    "tensor: a negative shape": (entry(shape=[-4, -64]), FORMAT, BROKEN),
    "tensor: an unknown dtype": (entry(dtype="F128"), FORMAT, BROKEN),
    "tensor: a dtype of half bytes": (entry(dtype="F4"), FORMAT, BROKEN),
    "tensor: complex": (entry(dtype="C64", shape=[4, 32]), FORMAT, "'C64', which is not known here"),
    "tensor: other bits of the same size": (entry(dtype="I32"), FORMAT, "int32"),
    "tensor: 8-bit floats": (entry(dtype="F8_E5M2", shape=[4, 256]), FORMAT, "float8_e5m2"),
    "tensor: exponents alone": (entry(dtype="F8_E8M0", shape=[4, 256]), FORMAT, "'F8_E8M0', which is not known here"),
    "tensor: a name with a line break": (renamed("a\nb\x1b[31m"), FORMAT, "a b\\x1b[31m"),
    "tensor: a name of a megabyte": (renamed("a" * 10**6), FORMAT, "1,000,000 characters, and 1,000 are allowed"),
    "tensor: a name that leads outside": (renamed("../../etc/passwd"), FORMAT, "without a home"),
    # the fingerprint of the base
    "fingerprint: not JSON": (mark("{"), FORMAT, "its fingerprint is not JSON"),
    "fingerprint: too deep": (mark("[" * 100_000), FORMAT, "its fingerprint is not JSON"),
    "fingerprint: a huge number": (mark("1" * 5_000), FORMAT, "its fingerprint is not JSON"),
    "fingerprint: a list": (mark([1]), FORMAT, "not as written here"),
    "fingerprint: of others": (mark(STAY), WrongBaseError, "carried no adapter"),
    "fingerprint: a line break": (mark(of("a\n\x1b[2Jb c d")), WrongBaseError, "was a \\x1b[2Jb c"),
    "fingerprint: a megabyte": (mark(of("a" * 10**6 + " b c")), WrongBaseError, "was aaaa"),
    # the configuration as a file
    "config: NULs": (text(bytes(100)), FORMAT, "is not JSON"),
    "config: UTF-16": (text('{"r": 4}'.encode("utf-16")), FORMAT, "is not JSON"),
    "config: not UTF-8 inside": (text(b'{"peft_type": "\xff"}'), FORMAT, "is not JSON"),
    "config: a number": (text("4"), FORMAT, "peft_type is 'int'"),
    "config: null": (text("null"), FORMAT, "peft_type is 'NoneType'"),
    "config: a huge number": (appended(f'"x": 1{"0" * 5_000}'), FORMAT, "is not JSON"),
    "config: too deep inside": (appended(f'"x": {"[" * 100_000}'), FORMAT, "is not JSON"),
    "config: larger than a megabyte": (appended(f'"x": "{"a" * 2**20}"'), FORMAT, "is larger than 1,048,576 bytes"),
    "config: two objects": (lambda d: (d / CONFIG_FILE).open("a").write("{}"), FORMAT, "is not JSON"),
    "config: a directory": (in_the_way, FORMAT, "is a directory; a regular file"),
    "config: a link to itself": (loop, FORMAT, "is not there"),
    "weights: a pipe": (fifo, FORMAT, "is a pipe; a regular file"),
    # its fields
    "field: method in a list": (fields(peft_type=["LORA"]), FORMAT, "peft_type is ['LORA']"),
    "field: a name with a line break": (fields(**{"x\ny": 1}), FORMAT, "has x y=1, unknown"),
    "field: half a character": (fields(**{"\ud800": 1}), FORMAT, "has \\ud800=1, unknown"),
    "field: a long value": (fields(x="z" * 10**5), FORMAT, "has x='zzz"),
    "field: r of 31 digits": (fields(r=10**30), FORMAT, "r must be a positive integer up to 1,048,576"),
    "field: r of 4,000 digits": (fields(r=10**4_000), FORMAT, "not an integer of more than 19 digits"),
    "field: r of 2^62": (fields(r=2**62), FORMAT, "up to 1,048,576"),
    "field: r of 2^20, not in the tensors": (fields(r=2**20), FORMAT, "wrong shapes"),
    "field: r negative": (fields(r=-4), FORMAT, "r must be a positive integer, not -4"),
    "field: r infinite": (fields(r=float("inf")), FORMAT, "not inf"),
    "field: r not a number": (fields(r=float("nan")), FORMAT, "r must be a positive integer, not nan"),
    "field: r a list": (fields(r=[4]), FORMAT, "r must be a positive integer, not [4]"),
    "field: alpha of 400 digits": (fields(lora_alpha=10**400), FORMAT, "lora_alpha must be a positive number"),
    "field: alpha of 10^308": (fields(lora_alpha=1e308), FORMAT, "lora_alpha must be a positive number up to 3.4e+38"),
    "field: alpha so small that nothing is left": (fields(lora_alpha=5e-324), TargetError, "a scaling of 0.0"),
    "field: alpha infinite": (fields(lora_alpha=float("inf")), FORMAT, "lora_alpha must be a positive number, not inf"),
    "field: alpha a text": (fields(lora_alpha="8"), FORMAT, "lora_alpha must be a positive number, not '8'"),
    "field: dropout true": (fields(lora_dropout=True), FORMAT, "lora_dropout must be a probability"),
    "field: dropout not a number": (fields(lora_dropout=float("nan")), FORMAT, "lora_dropout must be a probability"),
    "field: bias a number": (fields(bias=5), FORMAT, "bias must be one of"),
    "field: bias an object": (fields(bias={"a": 1}), FORMAT, "bias must be one of"),
    "field: task in a list": (fields(task_type=["SEQ_CLS"]), FORMAT, "task_type must be one of"),
    "field: use_dora a number": (fields(use_dora=1), FORMAT, "use_dora must be True or False, not 1"),
    "field: use_rslora a text": (fields(use_rslora="no"), FORMAT, "use_rslora must be True or False, not 'no'"),
    "field: lora_bias a list": (fields(lora_bias=[1]), FORMAT, "lora_bias must be True or False"),
    "field: init an object": (fields(init_lora_weights={"a": 1}), FORMAT, "init_lora_weights={'a': 1} is unknown"),
    "field: base a number": (fields(base_model_name_or_path=5), FORMAT, "must be a name or a path, not 5"),
    "field: base a list": (fields(base_model_name_or_path=["x"]), FORMAT, "must be a name or a path"),
    "field: saved modules an object": (fields(modules_to_save={"a": 1}), FORMAT, "modules_to_save must be a list"),
    "field: saved modules numbers": (fields(modules_to_save=[1]), FORMAT, "modules_to_save must be a list"),
    "field: 100,000 saved modules": (fields(modules_to_save=[f"m{i}" for i in range(10**5)]), FORMAT, "10,000 are allowed"),
    "field: 10,000 saved modules": (fields(modules_to_save=[f"m{i}" for i in range(10**4)]), FORMAT, "without a home"),
    "field: targets an object": (fields(target_modules={"q": 1}), FORMAT, "target_modules must be a list"),
    "field: targets in lists": (fields(target_modules=[["q"]]), FORMAT, "target_modules must be a list"),
    "field: targets of 50,000 entries": (fields(target_modules=["q"] * 50_000), FORMAT, "50,000 entries"),
    "field: layers a truth": (fields(layers_to_transform=True), FORMAT, "layers_to_transform must be a layer index"),
    "field: layers in lists": (fields(layers_to_transform=[[0]]), FORMAT, "layers_to_transform must be a layer index"),
    "field: a layer of 31 digits": (fields(layers_to_transform=[10**30]), FORMAT, "match no layer"),
    "field: Megatron": (fields(megatron_config={"a": 1}), FORMAT, "megatron_config={'a': 1} asks for"),
    "field: Arrow": (fields(arrow_config={"top_k": 2}), FORMAT, "arrow_config={'top_k': 2} asks for"),
    "field: a metaclass's": (fields(cls=1), FORMAT, "has cls=1, unknown"),
    # patterns
    "pattern: unclosed": (fields(target_modules="(q"), FORMAT, "is not a regular expression"),
    "pattern: too deep": (fields(target_modules="(" * 900 + ")" * 900), FORMAT, "is not a regular expression"),
    "pattern: a repeat beyond 32 bits": (fields(target_modules="a{99999999999}"), FORMAT, "is not a regular expression"),
    "pattern: of 3,000 characters": (fields(target_modules="(q|v)" * 600), FORMAT, "has 3,000 characters, and 2,000"),
    "pattern: of a word of 500,000 characters": (fields(target_modules="a" * 500_000), FORMAT, "has 500,000 characters"),
    "pattern: flags in the middle": (fields(rank_pattern={"(?i)q": 4}), FORMAT, "is not a regular expression"),
    "pattern: closes what it did not open": (fields(rank_pattern={"a)|(q": 4}), FORMAT, "is not a regular expression"),
    "pattern: a list for ranks": (fields(rank_pattern=["q"]), FORMAT, "rank_pattern must be a dictionary"),
    "pattern: a rank of 31 digits": (fields(rank_pattern={"q": 10**30}), FORMAT, "up to 1,048,576"),
    "pattern: an alpha of 400 digits": (fields(alpha_pattern={"q": 10**400}), FORMAT, "must be a positive number"),
    "pattern: a list of layers, unclosed": (fields(**LAYERS, layers_pattern=["("]), FORMAT, "is not a regular expression"),
    "pattern: a group of our name": (fields(**LAYERS, layers_pattern="(?P<layer>x)"), FORMAT, "match no layer"),
    "pattern: 10,000 for nothing": (fields(rank_pattern=dict.fromkeys(HALF, 5), target_modules="x"), FORMAT, "match no layer"),
    "pattern: 20,000 ranks": (fields(rank_pattern=dict.fromkeys(RANKS, 5)), FORMAT, "20,000 entries"),
    "hang: nested repeats": (fields(target_modules=SLOW), FORMAT, "match no layer"),
    "hang: nested stars": (fields(target_modules="(.*)*x"), FORMAT, "match no layer"),
    "hang: the same twice over": (fields(target_modules="(a|a)*x"), FORMAT, "match no layer"),
    "hang: choices in a row": (fields(target_modules="(.|.)" * 60 + "x"), FORMAT, "match no layer"),
    "hang: options in a row": (fields(target_modules=".?" * 60 + "x"), FORMAT, "match no layer"),
    "hang: stars in a row": (fields(target_modules=".*" * 12 + "x"), FORMAT, "match no layer"),
    "hang: a counted option": (fields(target_modules="(.?){60}x"), FORMAT, "match no layer"),
    "hang: empty, a trillion times": (fields(target_modules="((){10000}){10000}q"), FORMAT, "match no layer"),
    "hang: inside a lookahead": (fields(target_modules=f"(?=.*{SLOW})q"), FORMAT, "match no layer"),
    "hang: inside a condition": (fields(target_modules=f"(a)?(?(1){SLOW}|q)"), FORMAT, "refers back"),
    "hang: layers": (fields(**LAYERS, layers_pattern=[SLOW]), FORMAT, "match no layer"),
    "hang: expressions, many": (fields(rank_pattern={f".*{c}": 4 for c in range(1001)}), FORMAT, "more than 1,000"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_bad_adapter_is_one_line_and_changes_nothing(case, good, tmp_path):
    spoil, error, says = ADAPTERS[case]
    directory = shutil.copytree(good, tmp_path / "adapter")
    spoil(directory)
    model = tiny.classifier()
    before, files = tiny.snapshot(model), listing(tmp_path)
    assert_refused(error, says, lambda: load_adapter(model, directory))
    assert tiny.snapshot(model) == before and listing(tmp_path) == files


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": r"(\w|\w)+!"},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {".*" * 12 + "x": 4}},
        {"rank_pattern": {f".*?.*?.*?{c}!": 4 for c in range(300)}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_patterns_that_would_keep_re_busy_for_ever_change_nothing(changes, good, tmp_path):
    """They match no layer, which is no error in a file, as in PEFT."""
    directory = shutil.copytree(good, tmp_path / "adapter")
    fields(**changes)(directory)
    with within():
        load_adapter(tiny.classifier(), directory)


@pytest.mark.parametrize("case", [c for c in ADAPTERS if not c.startswith("fingerprint")])
def test_without_a_model_it_is_an_error_too_or_an_adapter(case, good, tmp_path):
    """Merging and inspecting read the files alone; what only a model can show to be wrong passes there."""
    directory = shutil.copytree(good, tmp_path / "adapter")
    ADAPTERS[case][0](directory)
    with within(), contextlib.suppress(LoraError):
        read_updates(directory)


def outside(name):
    return lambda model, directory: load_adapter(model, directory, name)


def again(model, directory):
    load_adapter(model, directory, "x")
    inject(model, LoraConfig(target_modules=["q"]), "x")


CALLS = {
    "no directory": (lambda m, d: load_adapter(m, d / "nowhere"), FORMAT, "is not a directory"),
    "a directory of a long name": (lambda m, d: load_adapter(m, "a" * 5_000), FORMAT, "is not a directory"),
    "a directory with a NUL": (lambda m, d: load_adapter(m, "a\0b"), FORMAT, "a\\x00b is not a directory"),
    "a name that is taken": (again, AdapterNameError, "'x' already"),
    "a name upwards": (outside("../x"), ConfigError, "adapter_name must be"),
    "a name of dots": (outside(".."), ConfigError, "adapter_name must be"),
    "a name with a slash": (outside("a/b"), ConfigError, "adapter_name must be"),
    "a name with a backslash": (outside("a\\b"), ConfigError, "adapter_name must be"),
    "an absolute name": (outside("/etc/passwd"), ConfigError, "adapter_name must be"),
    "a drive": (outside("C:"), ConfigError, "adapter_name must be"),
    "a name with a NUL": (outside("a\0"), ConfigError, "adapter_name must be"),
    "a name with a line break": (outside("a\n"), ConfigError, "adapter_name must be"),
    "a name of 129 characters": (outside("a" * 129), ConfigError, "at most 128"),
    "a name with another slash": (outside("a\u2215b"), ConfigError, "adapter_name must be"),
    "a name of wide dots": (outside("\uff0e\uff0e"), ConfigError, "adapter_name must be"),
    "a name written backwards": (outside("a\u202eb"), ConfigError, "a\\u202eb"),
    "a name that looks empty": (outside("\u200b"), ConfigError, "adapter_name must be"),
    "an empty name": (outside(""), ConfigError, "adapter_name must be"),
    "a number for a name": (outside(3), ConfigError, "adapter_name must be"),
    "a name of torch's": (outside("keys"), ConfigError, "ParameterDict"),
    "saving what is not there": (lambda m, d: save_adapter(m, d / "new"), AdapterNameError, "holds no adapters"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_is_one_line_and_changes_nothing(case, good, tmp_path):
    call, error, says = CALLS[case]
    directory = shutil.copytree(good, tmp_path / "adapter")
    model, files = tiny.classifier(), listing(tmp_path)
    before = tiny.snapshot(model)
    assert_refused(error, says, lambda: call(model, directory))
    assert listing(tmp_path) == files and (tiny.snapshot(model) == before or case == "a name that is taken")


PLACES = {
    "a file": (lambda d: d / "file", ConfigError, "a file is in its place"),
    "below a file": (lambda d: d / "file" / "new", ConfigError, "a file is in its place"),
    "a link to nowhere": (lambda d: d / "link", ConfigError, "a file is in its place"),
    "too long a name": (lambda d: d / ("a" * 300), OutputError, "File name too long"),
    "a NUL": (lambda d: f"{d}/a\0b", OutputError, "null byte"),
    "a directory in place of the weights": (lambda d: d / "taken", OutputError, "can't be written to: Is a directory"),
    "no file system for files": (lambda d: "/proc/lora", OutputError, "No such file"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_can_not_be_written_to_is_one_line_and_leaves_nothing(case, tmp_path):
    place, error, says = PLACES[case]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "below")
    (tmp_path / "taken" / WEIGHTS_FILE).mkdir(parents=True)
    files = {str(p) for p in tmp_path.rglob("*")}
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"]))
    assert_refused(error, says, lambda: save_adapter(model, place(tmp_path)))
    assert {str(p) for p in tmp_path.rglob("*")} == files


# --- sentences --------------------------------------------------------------------------------------------------------

HEAD, ROW = "sentence\tlabel\n", "fine\t1\nbad\t0\n"
SENTENCES = {
    "nothing": ("", ":1: the header is ''"),
    "a header alone": (HEAD, "holds no sentence"),
    "a header and empty lines": (HEAD + "\n\n\n", "holds no sentence"),
    "no header": (ROW, ":1: the header is 'fine\\t1'"),
    "columns the other way round": ("label\tsentence\n1\tfine\n", ":1: the header is 'label\\tsentence'"),
    "commas": ("sentence,label\nfine,1\n", ":1: the header is 'sentence,label'"),
    "spaces": ("sentence label\nfine 1\n", ":1: the header is 'sentence label'"),
    "Latin-1": ((HEAD + "caf\xe9\t1\n").encode("latin-1"), "is not UTF-8 text (byte 18)"),
    "UTF-16": ((HEAD + ROW).encode("utf-16"), "is not UTF-8 text (byte 0)"),
    "half a character at the end": (HEAD.encode() + ROW.encode() + "é".encode()[:1], "is not UTF-8 text"),
    "a pickle": (b"\x80\x04\x95\x00", "is not UTF-8 text (byte 0)"),
    "NULs": (bytes(1000), ":1: the header is '\\x00"),
    "positive alone": (HEAD + "fine\t1\ngood\t1\n", "every label is 1; sentences of both labels are needed"),
    "negative alone": (HEAD + "bad\t0\n", "every label is 0; sentences of both labels are needed"),
    "an empty line": (HEAD + "fine\t1\n\nbad\t0\n", ":3: the line is empty; remove it"),
    "an empty line first": (HEAD + "\n" + ROW, ":2: the line is empty; remove it"),
    "a line of spaces": (HEAD + ROW + "   \n", ":4: the label is ' '"),
    "an empty sentence": (HEAD + ROW + "\t1\n", ":4: the sentence is empty"),
    "a label of 2": (HEAD + ROW + "odd\t2\n", ":4: the label is '2'; it must be 0 or 1"),
    "no label": (HEAD + ROW + "odd\t\n", ":4: the label is ''"),
    "a label in words": (HEAD + ROW + "odd\tpositive\n", ":4: the label is 'positive'"),
    "a label of another script": (HEAD + ROW + "odd\t\u0661\n", ":4: the label is '\u0661'"),
    "a label with a space": (HEAD + ROW + "odd\t1 \n", ":4: the label is '1 '"),
    "no tab": (HEAD + ROW + "odd 1\n", ":4: the label is 'odd 1'"),
    "a sentence of 10 MB": (HEAD + ROW + "a" * 10**7 + "\t1\n", ":4: the sentence has 10,000,000 characters"),
    "a line of 10 MB": (HEAD + ROW + "a" * 10**7, ":4: the label is 'aaaa"),
    "a header of 10 MB": ("a" * 10**7, ":1: the header is 'aaaa"),
    "old Macintosh line ends": ((HEAD + ROW).replace("\n", "\r"), ":1: the header is"),
}


@pytest.mark.parametrize("case", SENTENCES)
@pytest.mark.parametrize("name", ["train.tsv", "dev.tsv"])
def test_a_bad_file_of_sentences_is_one_line_with_its_place(case, name, tmp_path):
    content, says = SENTENCES[case]
    for other in ("train.tsv", "dev.tsv"):
        (tmp_path / other).write_text(HEAD + ROW, encoding="utf-8")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(ExperimentError, says, lambda: data.load(str(tmp_path)))


# --- command lines ----------------------------------------------------------------------------------------------------

SST2 = [sst2.main, "--data", "DATA", "--model", "packaged"]
PREDICT = [predict.main, "--adapter", "ADAPTER"]
MERGE = [lora_core_main, "merge", "--adapter", "ADAPTER", "--base", "BASE", "--output", "OUT"]
CONVERT = [lora_core_main, "convert", "ADAPTER"]
LONG = "a" * 5_000

COMMANDS = {
    "sst2: a method of another case": ([*SST2, "--method", "LORA"], "invalid choice: 'LORA'"),
    "sst2: a flag cut short": ([*SST2, "--over"], "unrecognized arguments: --over"),
    "sst2: a word too many": ([*SST2, "please"], "unrecognized arguments: please"),
    "sst2: a flag without its value": ([*SST2, "--rank"], "argument --rank: expected one argument"),
    "sst2: a rank of 2.5": ([*SST2, "--rank", "2.5"], "argument --rank: invalid int value: '2.5'"),
    "sst2: a rank of 5,000 digits": ([*SST2, "--rank", "1" * 5_000], "argument --rank: invalid int value"),
    "sst2: alpha is no number": ([*SST2, "--alpha", "nan", "--method", "lora"], "must be a positive number, not nan"),
    "sst2: epochs below zero": ([*SST2, "--epochs", "-1"], "epochs must be at least 1, not -1"),
    "sst2: a batch of none": ([*SST2, "--batch-size", "0"], "batch_size must be at least 1, not 0"),
    "sst2: no steps": ([*SST2, "--max-steps", "0"], "max_steps must be at least 1, not 0"),
    "sst2: a rate of zero": ([*SST2, "--learning-rate", "0"], "learning_rate must be a number above 0, not 0.0"),
    "sst2: a rate that is no number": ([*SST2, "--learning-rate", "nan"], "learning_rate must be a number above 0, not nan"),
    "sst2: an infinite rate": ([*SST2, "--learning-rate", "inf"], "learning_rate must be a number above 0, not inf"),
    "sst2: a decay below zero": ([*SST2, "--weight-decay", "-1"], "weight_decay and max_grad_norm must be numbers"),
    "sst2: an infinite decay": ([*SST2, "--weight-decay", "inf"], "weight_decay and max_grad_norm must be numbers"),
    "sst2: a norm that is no number": ([*SST2, "--max-grad-norm", "nan"], "weight_decay and max_grad_norm must be numbers"),
    "sst2: warm-up that is no number": ([*SST2, "--warmup", "nan"], "warmup must be a share of the steps"),
    "sst2: a seed below zero": ([*SST2, "--seed", "-1"], "seed must lie in [0, 2^32), not -1"),
    "sst2: a seed beyond 32 bits": ([*SST2, "--seed", str(2**32)], "seed must lie in [0, 2^32)"),
    "sst2: more sentences than there are": ([*SST2, "--train-samples", str(10**30), "--method", "lora"], "ask for fewer"),
    "sst2: more tokens than are read": ([*SST2, "--max-length", str(10**30), "--method", "lora"], "reads at most 512"),
    "sst2: a device of another make": ([*SST2, "--device", "tpu"], "invalid choice: 'tpu'"),
    "sst2: data below a file": ([sst2.main, "--data", "FILE/x", "--model", "packaged"], "is no directory"),
    "sst2: data of a long name": ([sst2.main, "--data", LONG, "--model", "packaged"], "is no directory"),
    "sst2: a model of a long name": ([*SST2[:3], "--model", LONG], "is no directory"),
    "sst2: a model of nobody's": ([*SST2[:3], "--model", "~nobody/x"], "is no directory and no name of the Hub"),
    "sst2: a model's name upwards": ([*SST2[:3], "--model", "../x"], "is no directory and no name of the Hub"),
    "sst2: a directory that is no model": ([*SST2[:3], "--model", "DATA"], "has no config.json; give"),
    "sst2: results of a long name": ([*SST2, "--output-dir", "a" * 300, "--method", "lora"], "File name too long"),
    "sst2: a pattern that hits nothing": ([*SST2, "--target-modules", "(", "--method", "lora"], "'(' matched no module"),
    "predict: no adapter": ([predict.main, "--adapter", "nowhere", "fine"], "has no adapter_config.json"),
    "predict: a file for an adapter": ([predict.main, "--adapter", "FILE", "fine"], "has no adapter_config.json"),
    "predict: an adapter of a long name": ([predict.main, "--adapter", LONG, "fine"], "has no adapter_config.json"),
    "predict: an empty text": ([*PREDICT, ""], "text 1 is empty"),
    "predict: an empty text among others": ([*PREDICT, "fine", " "], "text 2 is empty"),
    "predict: a text of 10 MB": ([*PREDICT, "a " * 5_000_000], "text 1 has 10,000,000 characters, and 100,000 are allowed"),
    "predict: lines of nothing": ([*PREDICT], "line 1 is empty", b"\n\n"),
    "predict: a line of 10 MB": ([*PREDICT], "line 2 has 10,000,000 characters", b"fine\n" + b"a" * 10**7),
    "predict: no UTF-8": ([*PREDICT], "standard input is not utf-8 text (byte 1)", b"a\xff\n"),
    "predict: an adapter of another base": ([*PREDICT, "--model", "packaged", "fine"], "match no layer"),
    "predict: an adapter without a base": ([*PREDICT, "fine"], "does not name its base model; name it with --model"),
    "predict: a base of nobody's": ([*PREDICT, "--model", "~nobody/x", "fine"], "is no directory and no name of the Hub"),
    "predict: too much": ([predict.main, "--merged", "DATA", "--model", "x", "fine"], "needs neither --adapter nor"),
    "predict: merged nowhere": ([predict.main, "--merged", "./nowhere", "fine"], "is no directory"),
    "merge: no base": ([*MERGE[:4], "--output", "OUT"], "does not name its base; name it with"),
    "merge: a base of nobody's": ([*MERGE[:5], "~nobody/x", *MERGE[6:]], "no directory, and no name of the Hub"),
    "merge: a base of a long name": ([*MERGE[:5], LONG, *MERGE[6:]], "is no directory, not in the Hub's cache"),
    "merge: a base that is none": ([*MERGE], "config.json is not there"),
    "merge: a dtype of integers": ([*MERGE, "--dtype", "int8"], "invalid choice: 'int8'"),
    "merge: a weight in words": ([*MERGE, "--weights", "half"], "'half' is not a finite number"),
    "inspect: no directory": ([lora_core_main, "inspect", "nowhere"], "is not a directory"),
    "inspect: a long name": ([lora_core_main, "inspect", LONG], "is not a directory"),
    "inspect: a file": ([lora_core_main, "inspect", "FILE"], "is not a directory"),
    "inspect: a directory of sentences": ([lora_core_main, "inspect", "DATA"], "adapter_config.json is not there"),
    "verify: no probe": ([lora_core_main, "verify", "ADAPTER", "--base", "BASE"], "saved without probe inputs"),
    "convert: no change": ([*CONVERT, "--output", "OUT"], "say what to convert to"),
    "convert: onto itself": ([*CONVERT, "--output", "ADAPTER", "--dtype", "float16"], "exists already"),
    "combine: one alone": ([lora_core_main, "combine", "--adapter", "ADAPTER", "--output", "OUT"], "give two or more adapters"),
}  # fmt: skip


@pytest.fixture(scope="module")
def imported():
    """What the commands import takes seconds, and is not theirs to answer for."""
    from experiments import models, train  # noqa: F401

    models.load_classifier(models.resolve("packaged"))


@pytest.mark.parametrize("case", COMMANDS)
def test_a_bad_command_is_one_line_and_leaves_nothing(case, good, imported, tmp_path, monkeypatch, capfd):
    (main, *argv), says, *stdin = COMMANDS[case]
    places = {name: tmp_path / name.lower() for name in ("DATA", "ADAPTER", "BASE", "OUT", "FILE")}
    shutil.copytree(good, places["ADAPTER"])
    places["BASE"].mkdir()
    places["DATA"].mkdir()
    places["FILE"].write_text("mine")
    for name in ("train.tsv", "dev.tsv"):
        (places["DATA"] / name).write_text(HEAD + ROW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "obstacle", lambda: "the Hub is away")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(*stdin), encoding="utf-8"))
    before = listing(tmp_path)
    for name, place in places.items():
        argv = [str(place) + arg.removeprefix(name) if arg.startswith(name) else arg for arg in argv]
    with within(), warnings.catch_warnings():
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    err = capfd.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, (code, err[-300:])
    assert len(err) < 12_000 and listing(tmp_path) == before


def test_how_many_there_are(capsys):
    """Cases in tables, so without those that tests elsewhere write out; each is one line and one kind of mistake."""
    here = [ADAPTERS, CALLS, PLACES, SENTENCES, COMMANDS]
    elsewhere = [BAD, REFUSED, LIES, FAULTS]
    counts = sum(map(len, here)), sum(map(len, elsewhere))
    with capsys.disabled():
        print(f"\nbad inputs: {counts[0]} here, {counts[1]} in other tables: {sum(counts)}")
    assert counts[0] >= 60
