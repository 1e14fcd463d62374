"""A base's files, read strictly: what is there, to the byte, and one line for whatever a header or an index gets wrong."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import checkpoints
from lora_core.errors import CheckpointError, OutputError
from lora_core.files.checkpoint import DTYPES, INDEX_FILE, open_checkpoint, read_header
from lora_core.files.shards import NAMES, Entry, new_directory, write_shard


@pytest.fixture
def base(tmp_path):
    return checkpoints.llama(tmp_path / "base")


def some_tensors():
    made = {str(dtype): torch.arange(24).remainder(2).view(2, 3, 4).to(dtype) for dtype in DTYPES.values()}
    return made | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "byte": torch.tensor([7], dtype=torch.uint8)}


def test_what_the_library_writes_is_read_to_the_byte(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = read_header(tmp_path / "x.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = stored[name].read()
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        assert b"".join(map(bytes, stored[name].chunks())) == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_what_is_written_the_library_reads(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    entries = {  # half of them copied, half of them made
        name: Entry(t.dtype, tuple(t.shape), stored[name] if i % 2 else lambda t=t: t)
        for i, (name, t) in enumerate(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    }
    heard = []
    write_shard(tmp_path / "y.safetensors", entries, heard.append)
    found = load_file(tmp_path / "y.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[n].reshape(-1).view(torch.uint8).equal(t.reshape(-1).view(torch.uint8)) for n, t in tensors.items())
    assert sum(heard) == sum(t.nbytes for t in tensors.values())
    assert set(NAMES) == set(DTYPES.values())


def test_shards_and_single_files_are_one_checkpoint(tmp_path):
    sharded, single = checkpoints.llama(tmp_path / "a", shards=3), checkpoints.llama(tmp_path / "b", shards=1)
    a, b = open_checkpoint(sharded), open_checkpoint(single)
    assert len(a.shards) == 3 and len(b.shards) == 1 and a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(t.read(), b.tensors[name].read()) for name, t in a.tensors.items())


# --- headers that lie -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_one_line(base, case):
    change, how, says = LIES[case]
    path = min(base.glob("*.safetensors"))
    rewritten(path, change, **how)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(base)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_truncated_file_is_one_line(base, size):
    path = min(base.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(base)


# --- indexes that lie -------------------------------------------------------------------------------------------------


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
    "an index that is not JSON": (lambda base: (base / INDEX_FILE).write_text("{"), "can't be read as JSON"),
    "no index": (lose_the_index, "holds neither model.safetensors nor"),
    "a pickle": (pickled, "pickle"),
    "no configuration": (lambda base: (base / "config.json").unlink(), "config.json is not there"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_an_index_that_lies_is_one_line(base, case):
    spoil, says = FAULTS[case]
    spoil(base)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(base)
    assert "\n" not in str(caught.value)


# --- a directory whole or not at all ----------------------------------------------------------------------------------


def test_a_directory_appears_when_it_is_done(tmp_path):
    output = tmp_path / "deep" / "out"
    with new_directory(output) as directory:
        (directory / "a").write_text("x")
        assert not output.exists() and directory.name.startswith(".out.") and directory.name.endswith(".tmp")
    assert [p.name for p in output.iterdir()] == ["a"] and [p.name for p in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(OutputError, match="exists already"), new_directory(tmp_path / name):
            pytest.fail("was entered")
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty"):
        pass
    with pytest.raises(OutputError, match="can't be written: file exists"), new_directory(tmp_path / "file" / "out"):
        pytest.fail("was entered")
