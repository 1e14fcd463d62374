"""What a stranger's directory may do to who opens it, by category: how it is spoiled, the door, and what is said.

    ATTACKS["links"]["base/tokenizer.json -> a secret: merge"] = Attack(spoil, door, says)

The directories are `base`, a tiny Llama; `adapter`, of that; `run`, with a checkpoint of an experiment; and what the doors
write goes to `out`. `says` is a part of the line that is printed; None: whatever it is, it is a line.
"""

import io
import json
import os
import stat
import struct
import zipfile
from typing import NamedTuple

import torch

from bench import checkpoints
from experiments import checkpoints as runs
from lora_core.files.adapter import FINGERPRINT

CONFIG, WEIGHTS, PICKLE = "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/adapter_model.bin"
BASE_CONFIG, BASE_WEIGHTS, STEP = "base/config.json", "base/model.safetensors", "run/step-00000001"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "vocab.txt", "merges.txt", "chat_template.jinja")
SECRET = "a secret\n"


class Attack(NamedTuple):
    """A way to spoil the directories below a path, the door, and what is said; whether it may also do no harm."""

    spoil: object
    door: str
    says: str | None
    may_pass: bool = False


def build(root):
    """The directories as they should be."""
    checkpoints.llama(root / "base", shards=1, dtype=torch.float32)
    checkpoints.adapter(root / "adapter", r=4, targets=("q_proj", "v_proj"))
    for name in ("tokenizer_config.json", *TOKENIZER):
        (root / "base" / name).write_text("{}")
    tensors = {"model.w": torch.ones(3), "loss": torch.zeros(())}
    runs.write(root / STEP, 1, tensors, {"settings": {"seed": 1}, "seconds": 1.0, "peaks": {}}, "{}")
    (root / "secret").write_text(SECRET)


# --- ways to spoil ----------------------------------------------------------------------------------------------------


def remove(path):
    if path.is_dir() and not path.is_symlink():
        for below in path.iterdir():
            remove(below)
        path.rmdir()
    elif os.path.lexists(path):
        path.unlink()


def write(place, content):
    return lambda root: (root / place).write_bytes(content if isinstance(content, bytes) else content.encode())


def link(place, target):
    def spoil(root):
        remove(root / place)
        (root / place).symlink_to(target if str(target).startswith("/") else root / target)

    return spoil


def special(place, kind):
    def spoil(root):
        remove(root / place)
        os.mknod(root / place, kind | 0o600)

    return spoil


def directory(place):
    def spoil(root):
        remove(root / place)
        (root / place).mkdir()

    return spoil


def grown(place, size):
    """A file of this size without content: it takes no place on a disk, and a copy does."""

    def spoil(root):
        with open(root / place, "ab") as file:
            file.truncate(size)

    return spoil


def fields(place, **changes):
    def spoil(root):
        content = json.loads((root / place).read_text())
        (root / place).write_text(json.dumps(content | changes))

    return spoil


def header(place, change, tail=b""):
    """The header of a safetensors file is another: changed in place, or the text that `change` returns."""

    def spoil(root):
        data = (root / place).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + size])
        text = change(entries)
        text = text if isinstance(text, bytes) else json.dumps(entries).encode()
        (root / place).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :] + tail)

    return spoil


def appended(place, text):
    """An object has one more entry, as text."""
    return lambda root: (root / place).write_text(f"{(root / place).read_text().rstrip()[:-1]}, {text}}}")


def moved(place):
    """The adapter lies there."""

    def spoil(root):
        (root / "adapter").rename(root / "elsewhere")
        (root / place).parent.mkdir(parents=True)
        (root / "elsewhere").rename(root / place)

    return spoil


def tensor_names(entries):
    return [name for name in entries if name != "__metadata__"]


def renamed(place, name, of="q_proj"):
    """A tensor, or all of one layer, has another name."""

    def change(entries):
        first = next(n for n in tensor_names(entries) if of in n)
        path = first.partition(".lora_")[0]
        for old in [n for n in tensor_names(entries) if n.startswith(path)]:
            entries[name + old.removeprefix(path)] = entries.pop(old)

    return header(place, change)


def retyped(place, dtype, size, of="q_proj"):
    """A tensor is of another dtype, of as many bytes: the last dimension changes with the size of a value."""

    def change(entries):
        entry = entries[next(n for n in tensor_names(entries) if of in n)]
        entry["dtype"], entry["shape"][-1] = dtype, entry["shape"][-1] * 4 // size

    return header(place, change)


def reshaped(place, shape, of="q_proj"):
    def change(entries):
        entries[next(n for n in tensor_names(entries) if of in n)]["shape"] = shape

    return header(place, change)


def pickled(content, **settings):
    """The adapter's tensors are in a pickle; `content` gets those that were there, or is the file."""

    def spoil(root):
        from safetensors.torch import load_file

        tensors = load_file(root / WEIGHTS)
        (root / WEIGHTS).unlink()
        made = content(tensors) if callable(content) else content
        if isinstance(made, bytes):
            (root / PICKLE).write_bytes(made)
        else:
            torch.save(made, root / PICKLE, **settings)

    return spoil


def archived(change):
    """The pickle's archive is written again: {name in it: bytes} -> [(name, bytes, method)]."""

    def spoil(root):
        pickled(lambda tensors: tensors)(root)
        with zipfile.ZipFile(root / PICKLE) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(root / PICKLE, "w") as archive:
            for name, data, method in change(members):
                archive.writestr(zipfile.ZipInfo(name), data, method)

    return spoil


def with_pickle(pickle):
    """An archive of torch whose data.pkl is this."""
    return archived(lambda m: [(n, pickle if n.endswith("data.pkl") else d, zipfile.ZIP_STORED) for n, d in m.items()])


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def cut_at(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


class Runs:
    """What makes a directory when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def both(*spoils):
    return lambda root: [spoil(root) for spoil in spoils]


def nested(depth, kind="[]"):
    inner = "1"
    return {"[]": "[" * depth + inner + "]" * depth, "{}": '{"a":' * depth + inner + "}" * depth}[kind]


# --- the table --------------------------------------------------------------------------------------------------------

ATTACKS = {}


def add(category, name, spoil, doors, says=None, may_pass=False):
    for door in doors.split():
        ATTACKS.setdefault(category, {})[f"{name}: {door}"] = Attack(spoil, door, says, may_pass)


# Links out of the directory, and files that would fill the disk.
OUTSIDE = {"a secret": "secret", "/dev/zero": "/dev/zero", "a folder": "run", "nothing": "nowhere", "itself": None}
for name in (*TOKENIZER, "tokenizer_config.json", "generation_config.json", "added_tokens.json", "spiece.model"):
    for what, target in OUTSIDE.items():
        place = f"base/{name}"
        says = "outside of its directory" if target else "can't be read"
        add("links", f"{place} -> {what}", link(place, target or place), "merge", says)
for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "README.md", "notes.txt", "experiment.json", "template.jinja"):
    for what, target in OUTSIDE.items():
        place = f"adapter/{name}"
        says = "outside of its directory" if target else "can't be read"
        add("links", f"{place} -> {what}", link(place, target or place), "convert", says)
    add(
        "links",
        f"adapter/{name}: a gigabyte of nothing",
        both(write(f"adapter/{name}", ""), grown(f"adapter/{name}", 2**30)),
        "convert",
        "bytes, and 536,870,912 are allowed",
    )
for name in ("tokenizer.json", "vocab.txt"):
    tokenizer = write("adapter/tokenizer_config.json", "{}")
    add("links", f"adapter/{name} for a merge", both(tokenizer, link(f"adapter/{name}", "secret")), "merge", "outside of its")
add(
    "links",
    "base/config.json -> a secret object",
    both(write("secret.json", '{"auths": 1}'), link(BASE_CONFIG, "secret.json")),
    "merge",
    None,
)
add("links", "vocab.txt: a gigabyte of nothing", grown("base/vocab.txt", 2**30), "merge", "are allowed")
add(
    "links",
    "a snapshot that is none",
    both(
        lambda root: (root / "snapshots").mkdir(),
        lambda root: (root / "base").rename(root / "snapshots" / "base"),
        lambda root: (root / "blobs").symlink_to("/etc"),
        link("snapshots/base/vocab.txt", "/etc/passwd"),
        lambda root: (root / "base").symlink_to(root / "snapshots" / "base"),
    ),
    "merge",
    "outside of its directory",
)

# Pipes, devices and the like, which are waited for or have no end.
SPECIAL = {
    "a pipe": lambda place: special(place, stat.S_IFIFO),
    "a socket": lambda place: special(place, stat.S_IFSOCK),
    "a device": lambda place: link(place, "/dev/zero"),
    "a directory": directory,
}
ADAPTER_DOORS, BASE_DOORS = "load inspect merge convert", "merge"
for kind, make in SPECIAL.items():
    for place in (CONFIG, WEIGHTS):
        add("special files", f"{place}: {kind}", make(place), ADAPTER_DOORS, f"is {kind}; a regular file is expected")
    for place in (BASE_CONFIG, BASE_WEIGHTS, "base/tokenizer.json", "base/tokenizer.model"):
        says = "outside of its" if kind == "a device" and "token" in place else f"is {kind}; a regular file is expected"
        add("special files", f"{place}: {kind}", make(place), BASE_DOORS, says)
    for place in (BASE_CONFIG, BASE_WEIGHTS, "base/tokenizer.json"):
        add("special files", f"{place}: {kind}", make(place), "train", f"is {kind}; a regular file is expected")
    for name in (runs.TENSORS, runs.STATE, runs.NUMBERS):
        add("special files", f"{name}: {kind}", make(f"{STEP}/{name}"), "resume", f"is {kind}; a regular file is expected")
    add(
        "special files",
        f"{PICKLE}: {kind}",
        both(lambda root: remove(root / WEIGHTS), make(PICKLE)),
        "load inspect convert",
        f"is {kind}; a regular file is expected",
    )
    add(
        "special files", f"probe: {kind}", make("adapter/probe.safetensors"), "verify", f"is {kind}; a regular file is expected"
    )

# JSON that is too deep, too long, twice there, or none.
DEEP = {"lists": nested(100_000), "objects": nested(100_000, "{}"), "lists of 600": nested(600)}
for what, text in DEEP.items():
    inside = f'{{"x": {text}}}'
    add("JSON", f"{CONFIG}: {what}", write(CONFIG, inside), ADAPTER_DOORS, "nested more than 64 levels deep")
    add("JSON", f"{BASE_CONFIG}: {what}", write(BASE_CONFIG, inside), "merge", "nested more than 64 levels deep")
    add("JSON", f"{BASE_CONFIG}: {what}", write(BASE_CONFIG, inside), "train")
    add("JSON", f"{runs.NUMBERS}: {what}", write(f"{STEP}/{runs.NUMBERS}", inside), "resume", "nested more than 64 levels deep")
    add("JSON", f"header: {what}", header(WEIGHTS, lambda h, t=inside: t.encode()), "load inspect", "nested more than 64")
    add("JSON", f"base header: {what}", header(BASE_WEIGHTS, lambda h, t=inside: t.encode()), "merge", "nested more than 64")
    index = both(lambda root: remove(root / BASE_WEIGHTS), write("base/model.safetensors.index.json", inside))
    add("JSON", f"index: {what}", index, "merge", "nested more than 64")
    mark = header(WEIGHTS, lambda h, t=text: h["__metadata__"].update({FINGERPRINT: t}))
    add("JSON", f"fingerprint: {what}", mark, "load inspect", "nested more than 64")
for what, text in {
    "NULs": bytes(99),
    "UTF-16": '{"r": 4}'.encode("utf-16"),
    "no UTF-8": b'{"r": "\xff"}',
    "nothing": b"",
    "half": b'{"r": 4,',
    "two": b"{}{}",
    "a huge number": b'{"r": 1' + b"0" * 5_000 + b"}",
}.items():
    add("JSON", f"{CONFIG}: {what}", write(CONFIG, text), "load convert", "is not JSON")
    add("JSON", f"{BASE_CONFIG}: {what}", write(BASE_CONFIG, text), "merge", "is not JSON")
    add("JSON", f"{runs.NUMBERS}: {what}", write(f"{STEP}/{runs.NUMBERS}", text), "resume", "is not JSON")
for what, text in {"a list": "[]", "a number": "4", "null": "null", "a text": '"x"'}.items():
    add("JSON", f"{BASE_CONFIG}: {what}", write(BASE_CONFIG, text), "merge", "a JSON object is expected")
    add("JSON", f"{runs.NUMBERS}: {what}", write(f"{STEP}/{runs.NUMBERS}", text), "resume", "a JSON object is expected")
for name, value in {"r": 8, "peft_type": "LORA", "target_modules": ["q_proj"]}.items():
    add(
        "JSON",
        f"{name} twice",
        appended(CONFIG, f"{json.dumps(name)}: {json.dumps(value)}"),
        ADAPTER_DOORS,
        f"'{name}' stands there twice",
    )
for what, change in {
    "step": {"step": 1e999},
    "seconds": {"seconds": "x"},
    "peaks": {"peaks": 1},
    "no hashes": {"sha256": {}},
    "hashes of others": {"sha256": {"tensors.safetensors": 1, "trainer_state.json": 2}},
    "settings": {"settings": 3},
}.items():
    add("JSON", f"checkpoint: {what}", fields(f"{STEP}/{runs.NUMBERS}", **change), "resume")

# Values of a base's configuration.
for what, value in {
    "a number": 5,
    "an object": {"a": 1},
    "a list of numbers": [5],
    "null": [None],
    "nothing": [],
    "a list": [["x"]],
}.items():
    add("configurations", f"architectures: {what}", fields(BASE_CONFIG, architectures=value), "merge", may_pass=True)
    label = fields(CONFIG, task_type="SEQ_CLS")
    add(
        "configurations",
        f"architectures and a task: {what}",
        both(label, fields(BASE_CONFIG, architectures=value)),
        "merge",
        may_pass=True,
    )
for name in ("id2label", "num_labels", "tie_word_embeddings", "vocab_size", "model_type", "torch_dtype", "hidden_size"):
    for value in (5, "x", {"a": 1}, [1], None, -1):
        add("configurations", f"{name} is {value!r}", fields(BASE_CONFIG, **{name: value}), "merge", may_pass=True)

# Names and patterns that take long.
LONG = {
    "20,000 characters": "a" * 20_000,
    "a megabyte": "a" * 2**20,
    "40,000 dots": "." * 40_000,
    "40,000 parts": "a." * 40_000,
}
for what, name in LONG.items():
    add("long names", f"tensor: {what}", renamed(WEIGHTS, f"base_model.model.{name}"), ADAPTER_DOORS, "1,000 are allowed")
    add("long names", f"base: {what}", renamed(BASE_WEIGHTS, name), "merge", "1,000 are allowed")
    add("long names", f"pickle: {what}", pickled(lambda t, n=name: t | {n: torch.ones(1)}), "load inspect", "1,000 characters")
    add("long names", f"target: {what}", fields(CONFIG, target_modules=[name]), "load")
    add(
        "long names",
        f"pattern: {what}",
        fields(CONFIG, target_modules=name),
        "load",
        "allowed" if len(name) < 2**20 else "is larger than",
    )
    add("long names", f"trained whole: {what}", fields(CONFIG, modules_to_save=[name]), "inspect merge", may_pass=True)
PARTS = "base_model.model." + "a." * 450
FULL = both(*(renamed(WEIGHTS, f"{PARTS}{i}", of=f"layers.{i}.self_attn.q_proj") for i in range(4)))
add(
    "long names",
    "450 parts, and 9,999 names",
    both(FULL, fields(CONFIG, modules_to_save=[f"x{i}" for i in range(9_999)])),
    "inspect",
    may_pass=True,
)
SLOW = [
    "(a+)+b",
    "(.*)*x",
    "(a|a)*x",
    "(.|.)" * 60 + "x",
    ".?" * 60 + "x",
    ".*" * 12 + "x",
    "(.?){60}x",
    "((){10000}){10000}q",
    ".*a.*a.*b",
    "(?=(a*)*b)a*",
    r"(\w+\.?)+x",
    "(?:(?:.{0,1000}b?){0,1000}c?){0,1000}x",
]
MANY = {f"(.*{c}.*)*!": 4 for c in range(1_000)}
for pattern in SLOW:
    add("patterns", f"targets {pattern[:20]}", both(FULL, fields(CONFIG, target_modules=pattern)), "load", "match no layer")
    for field in ("rank_pattern", "alpha_pattern"):
        spoil = both(FULL, fields(CONFIG, **{field: {pattern: 4}}))
        add("patterns", f"{field} {pattern[:20]}", spoil, "inspect", may_pass=True)
    layers = fields(CONFIG, layers_to_transform=[0], layers_pattern=[pattern])
    add("patterns", f"layers {pattern[:20]}", layers, "load", "match no layer")
add("patterns", "a thousand slow ones", both(FULL, fields(CONFIG, rank_pattern=MANY)), "inspect merge", may_pass=True)
add("patterns", "10,000 names", fields(CONFIG, rank_pattern={f"a.{i}.q": 4 for i in range(10_000)}), "inspect", may_pass=True)
for pattern in (r"(q)\1", "(a)?(?(1)b|c)", "(?P<x>q)(?P=x)"):
    add("patterns", f"refers back {pattern}", fields(CONFIG, target_modules=pattern), "load inspect", "refers back")

# What a terminal would obey, and lines that a file writes for us.
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
EVIL = {
    "clears": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "line": "x\nfingerprint  all is well",
    "return": "x\rerror: none",
    "C1": "\x9b2J",
    "bidi": "a\u202eb",
    "NUL": "a\0b",
    "half": "\ud800",
    "separator": "a\u2028b",
    "back": "a\b\b\b",
    "hidden": "\u200b",
}
for what, text in EVIL.items():
    spoil = fields(CONFIG, base_model_name_or_path=text)
    add("output", f"base {what}", spoil, "inspect-escaped")
    add(
        "output", f"base with YAML {what}", fields(CONFIG, base_model_name_or_path=f"{text}\nlicense: mit\n---\n# Free"), "card"
    )
    add("output", f"layer {what}", renamed(WEIGHTS, f"base_model.model.{text}"), "inspect-escaped")
    add(
        "output",
        f"copy {what}",
        both(
            fields(CONFIG, modules_to_save=["head"]),
            renamed(WEIGHTS, "base_model.model.q", of="q_proj"),
            header(WEIGHTS, lambda h, t=text: h.update({f"base_model.model.{t}.head.weight": EMPTY})),
        ),
        "inspect-escaped",
    )
    add("output", f"target {what}", fields(CONFIG, target_modules=["q_proj", "v_proj", text]), "inspect-escaped")
    add("output", f"error {what}", fields(CONFIG, task_type=text), "load inspect")

# Values of kinds that can't be computed with, and shapes that can't be.
for dtype, size in {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F4": 1,
    "C64": 8,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "I64": 8,
    "I32": 4,
    "BOOL": 1,
    "F128": 4,
    "X": 4,
}.items():
    add("dtypes", f"A is {dtype}", retyped(WEIGHTS, dtype, size), ADAPTER_DOORS)
    add("dtypes", f"the base's weight is {dtype}", retyped(BASE_WEIGHTS, dtype, size), "merge merge-16")
    add("dtypes", f"another of the base's is {dtype}", retyped(BASE_WEIGHTS, dtype, size, of="norm"), "merge-16", may_pass=True)
for shape in (
    [],
    [1],
    [4, 32, 1],
    [4] * 9,
    [-4, -32],
    [0, 2**63],
    [2**40, 2**40, 0],
    [128, 1],
    [1.5],
    ["x"],
    None,
    {"a": 1},
    [10**30],
):
    add("shapes", f"A is {shape}", reshaped(WEIGHTS, shape), "load inspect merge convert", may_pass=shape == [4, 32, 1])
    add("shapes", f"the base's weight is {shape}", reshaped(BASE_WEIGHTS, shape), "merge")

# Pickles.
TWICE = b"".join(bytes([*b"q", i, *b"h", i, *b"\x86"]) for i in range(60))  # a pair of what was before, and itself
DOUBLING = b"\x80\x02}K\x01" + TWICE + b"K\x01s."
PICKLES = {
    "runs a command": lambda t: t | {"x": Runs(os.system, "exit")},
    "makes a directory": lambda t: t | {"x": Runs(os.mkdir, "it-ran")},
    "evaluates": lambda t: t | {"x": Runs(eval, "1")},
    "opens a file": lambda t: t | {"x": Runs(open, "it-ran", "w")},
    "calls torch": lambda t: t | {"x": Runs(torch.load, "x")},
    "a class": lambda t: t | {"x": Runs},
    "a module": lambda t: t | {"x": torch.nn.Linear(2, 2)},
    "a device": lambda t: t | {"x": torch.device("cpu")},
    "a list": lambda t: list(t.values()),
    "a tensor": lambda t: torch.ones(3),
    "nothing": lambda t: {},
    "none": lambda t: None,
    "numbers for names": lambda t: dict(enumerate(t.values())),
    "tuples for names": lambda t: {(k,): v for k, v in t.items()},
    "numbers for tensors": lambda t: dict.fromkeys(t, 1.0),
    "a dictionary inside": lambda t: {"state_dict": t},
    "sparse": lambda t: {k: v.to_sparse() for k, v in t.items()},
    "quantised": lambda t: {k: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8) for k, v in t.items()},
    "without values": lambda t: {k: v.to("meta") for k, v in t.items()},
    "complex": lambda t: {k: v.to(torch.complex64) for k, v in t.items()},
    "8 bits": lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()},
    "expanded": lambda t: {k: torch.ones(1).expand(2**20, 2**20) for k in t},
    "NaN": lambda t: {k: v * float("nan") for k, v in t.items()},
    "no file": b"",
    "text": b"hello, world",
    "a pickle alone": b"\x80\x02}.",
    "a pickle that ends": b"\x80\x02}(",
    "doubling": DOUBLING,
    "a million marks": b"\x80\x02" + b"(" * 10**6 + b".",
    "deep": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "an archive of nothing": lambda t: zipped({}),
    "an archive of a text": lambda t: zipped({"x/data.pkl": b"hello", "x/version": b"3"}),
}


for what, content in PICKLES.items():
    settings = {"_use_new_zipfile_serialization": False} if what in ("a class", "evaluates") else {}
    door = "load convert" if what == "NaN" else "load inspect convert"  # which `inspect` tells of
    add("pickles", what, pickled(content, **settings), door)
for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    squeezed = archived(lambda m, how=method: [(n, d, how) for n, d in m.items()])
    add("pickles", f"compressed {method}", squeezed, "load inspect", "compressed")
filled = archived(lambda m: [(n, d.ljust(2**24, b"\0") if "/data/" in n else d, zipfile.ZIP_DEFLATED) for n, d in m.items()])
add("pickles", "a bomb", filled, "load inspect", "compressed")
claims = archived(lambda m: [(n, d[:16] if "/data/" in n else d, zipfile.ZIP_STORED) for n, d in m.items()])
add("pickles", "more than there is", claims, "load inspect")
add("pickles", "doubling in an archive", with_pickle(DOUBLING), "load inspect", "over and over")
for part in range(1, 12):
    new = both(pickled(lambda t: t), lambda root, n=part: cut_at(root / PICKLE, n / 12))
    add("pickles", f"cut at {part}/12", new, "load")
    old = both(pickled(lambda t: t, _use_new_zipfile_serialization=False), lambda root, n=part: cut_at(root / PICKLE, n / 12))
    add("pickles", f"an old one cut at {part}/12", old, "load")


# Git LFS, and directories that are somewhere else.
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "46" * 32 + "\nsize {}\n"
for place, doors in {
    CONFIG: ADAPTER_DOORS,
    WEIGHTS: ADAPTER_DOORS,
    BASE_CONFIG: "merge train",
    BASE_WEIGHTS: "merge train",
    "base/tokenizer.json": "merge train",
    "base/tokenizer.model": "merge",
    "adapter/notes.txt": "convert",
    f"{STEP}/{runs.TENSORS}": "resume",
    f"{STEP}/{runs.NUMBERS}": "resume",
}.items():
    add("Git LFS", place, write(place, POINTER.format(12_345)), doors, "git lfs pull")
add("Git LFS", PICKLE, pickled(POINTER.format(1).encode()), "load inspect convert", "git lfs pull")
for below in ("adapter/checkpoint-10", "adapter/a/b"):
    add("Git LFS", f"the adapter is in {below}", moved(below), ADAPTER_DOORS, f"{below} has one: name that directory")

# Places that can't be written to.
OUTPUTS = {
    "a link to an empty directory": (both(lambda root: (root / "empty").mkdir(), link("out", "empty")), "is a link"),
    "a link to nowhere": (link("out", "nowhere"), "is a link"),
    "a link to a device": (link("out", "/dev/null"), "is a link"),
    "a file": (write("out", "mine"), "exists already"),
    "a pipe": (special("out", stat.S_IFIFO), "exists already"),
    "a full directory": (both(lambda root: (root / "out").mkdir(), write("out/mine", "mine")), "exists already"),
    "below a file": (write("out-file", "mine"), None),
}
for what, (spoil, says) in OUTPUTS.items():
    door = "merge convert" if what != "below a file" else "merge-below convert-below"
    add("outputs", what, spoil, door, says)
