"""Ways to spoil the files of a base, each with the words of its refusal."""

import json
import struct

from lora_core.files.checkpoint import INDEX_FILE


def rewritten(path, change, length=None, tail=b""):
    """Changes a file's header in place, and maybe what it says of its own length."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :] + tail)


def first(header):
    return header[min(set(header) - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])]


def set_field(**fields):
    return lambda header: first(header).update(fields)


LIES = {
    "a header longer than the file": (lambda h: None, {"length": 10**12}, "its header says that it is 1,000,000,000,000"),
    "a header that ends early": (lambda h: None, {"length": 20}, "is not JSON"),
    "not JSON": (lambda h: b"{" * 50_000, {}, "is not JSON"),
    "a list": (lambda h: b"[]", {}, "not a JSON object"),
    "a name twice": (lambda h: b'{"a": 1, "a": 2}', {}, "stands there twice"),
    "no place": (lambda h: first(h).pop("data_offsets") and None, {}, "no place in the file"),
    "an entry that is a number": (lambda h: h.update(x=3), {}, "no place in the file"),
    "a shape larger than its bytes": (set_field(shape=[10**6, 10**6]), {}, "does not fill the bytes"),
    "a negative size": (set_field(shape=[-1, 32]), {}, "not made of sizes"),
    "an unknown dtype": (set_field(dtype="F4"), {}, "not known here"),
    "a place beyond the end": (set_field(data_offsets=[0, 10**9]), {}, "does not fill the bytes"),
    "a place before the start": (set_field(data_offsets=[-8, 0]), {}, "not made of sizes"),
    "bytes that belong to nobody": (lambda h: None, {"tail": b"\0" * 8}, "its header speaks of"),
}


def edit_index(base, change):
    index = json.loads((base / INDEX_FILE).read_text())
    change(index)
    (base / INDEX_FILE).write_text(json.dumps(index))


def place(name, file):
    return lambda base: edit_index(base, lambda index: index["weight_map"].update({name: file}))


def lose_a_shard(base):
    min(base.glob("*.safetensors")).unlink()


def lose_the_index(base):
    (base / INDEX_FILE).unlink()


def pickled(base):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


FAULTS = {
    "missing shard": (lose_a_shard, "names the shard model-00001-of-00004.safetensors, which is not there"),
    "a tensor that is not there": (
        place("model.ghost.weight", "model-00001-of-00004.safetensors"),
        "holds 'model.ghost.weight'",
    ),
    "a path upwards": (place("model.norm.weight", "../other.safetensors"), "'../other.safetensors'"),
    "an absolute path": (place("model.norm.weight", "/etc/passwd.safetensors"), "only a .* file beside the index"),
    "a path into a directory": (place("model.norm.weight", "a/b.safetensors"), "only a .* file beside the index"),
    "another kind of file": (place("model.norm.weight", "config.json"), "only a .* file beside the index"),
    "a number for a file": (place("model.norm.weight", 3), "no weight_map"),
    "a tensor of another shard": (place("model.norm.weight", "model-00001-of-00004.safetensors"), "does not place there"),
    "an unlisted tensor": (
        lambda base: edit_index(base, lambda index: index["weight_map"].pop("model.norm.weight")),
        "'model.norm.weight', which the index does not place there",
    ),
    "no map": (lambda base: (base / INDEX_FILE).write_text("{}"), "no weight_map"),
    "an index that is not JSON": (lambda base: (base / INDEX_FILE).write_text("{"), "is not JSON"),
    "no index": (lose_the_index, "holds neither model.safetensors nor"),
    "a pickle": (pickled, "pickle"),
    "no configuration": (lambda base: (base / "config.json").unlink(), "config.json is not there"),
}
