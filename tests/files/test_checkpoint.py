"""A base's files, read strictly: what is there, to the byte, and one line for whatever a header or an index gets wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import checkpoints
from lora_core.errors import FileFormatError, OutputError
from lora_core.files.checkpoint import open_checkpoint, read_header
from lora_core.files.shards import NAMES, Entry, new_directory, write_shard
from lora_core.files.stored import DTYPES
from tests.support.bad_checkpoints import FAULTS, LIES, rewritten


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


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_one_line(base, case):
    change, how, says = LIES[case]
    path = min(base.glob("*.safetensors"))
    rewritten(path, change, **how)
    with pytest.raises(FileFormatError, match=says) as caught:
        open_checkpoint(base)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_truncated_file_is_one_line(base, size):
    path = min(base.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        open_checkpoint(base)


# --- indexes that lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAULTS)
def test_an_index_that_lies_is_one_line(base, case):
    spoil, says = FAULTS[case]
    spoil(base)
    with pytest.raises(FileFormatError, match=says) as caught:
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
