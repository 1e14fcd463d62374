"""One process for an output; what a killed one has left goes; what is replaced keeps its mode."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from bench import checkpoints
from lora_core import LoraConfig, inject, save_adapter
from lora_core.deploy.stream import merge_checkpoint
from lora_core.errors import OutputError
from lora_core.files.disk import write_all, write_whole
from lora_core.files.locks import alone, temporary_name
from lora_core.files.shards import check_free, new_directory
from tests.support import ROOT, tiny


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def started(code, *arguments):
    """A process that runs `code`, once it has printed a line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, env=environment)
    process.stdout.readline()
    return process


HOLD = """
import sys, time
from pathlib import Path
from lora_core.files.shards import new_directory
from lora_core.files.locks import alone
with (alone if sys.argv[2] == "alone" else new_directory)(Path(sys.argv[1])) as directory:
    if directory: (directory / "half").write_text("half")
    print("here", flush=True); time.sleep(60)
"""


def test_a_second_run_in_one_directory_is_told_so_by_name(tmp_path):
    process = started(HOLD, tmp_path, "alone")
    try:
        with pytest.raises(OutputError, match=f"{tmp_path} is in use: another process writes there"), alone(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with alone(tmp_path), pytest.raises(OutputError), alone(tmp_path):  # what a dead process held is free
        pass
    assert not list(tmp_path.iterdir())


def test_a_second_writer_of_one_output_is_told_so_and_the_first_is_left_alone(tmp_path):
    process = started(HOLD, tmp_path / "out", "new")
    try:
        (begun,) = tmp_path.iterdir()
        with pytest.raises(OutputError, match="out is being written by another process"), new_directory(tmp_path / "out"):
            pass
        assert (begun / "half").read_text() == "half"
        with new_directory(tmp_path / "other") as directory:  # of another name
            (directory / "x").write_text("x")
    finally:
        process.kill()
        process.wait()
    assert begun.exists()
    with new_directory(tmp_path / "out") as directory:
        assert not begun.exists()
        (directory / "x").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_files_of_killed_processes_go_with_the_next_one(tmp_path):
    (abandoned := temporary_name(tmp_path / "x.json")).write_text("half")
    mine = [tmp_path / ".x.json.tmp", tmp_path / ".x.json.mine.tmp", temporary_name(tmp_path / "y.json")]
    for path in mine:
        path.write_text("mine")
    write_whole(tmp_path / "x.json", b"{}")
    assert not abandoned.exists() and all(path.exists() for path in mine)


def test_a_killed_merge_is_cleared_by_the_next(tmp_path):
    base, adapter = checkpoints.llama(tmp_path / "base"), checkpoints.adapter(tmp_path / "adapter")
    code = (
        "import sys, time, lora_core.deploy.stream as s\n"
        "s.write_companions = lambda *a: (print('here', flush=True), time.sleep(60))\n"
        "s.merge_checkpoint(*sys.argv[1:2], sys.argv[2:3], sys.argv[3])"
    )
    process = started(code, base, adapter, tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out.")]) == 1
    merge_checkpoint(base, [adapter], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    model = tiny.classifier()
    inject(model, LoraConfig(target_modules=["q"]))
    save_adapter(model, tmp_path)
    usual = mode(tmp_path / "adapter_config.json")
    for kept in (0o600, 0o640, 0o444):
        for path in tmp_path.iterdir():
            path.chmod(kept)
        save_adapter(model, tmp_path)
        assert {mode(path) for path in tmp_path.iterdir()} == {kept}
    write_all(tmp_path / "new", {"x": b""})
    assert mode(tmp_path / "new" / "x") == usual


def test_an_empty_directory_that_is_replaced_keeps_its_mode(tmp_path):
    for kept in (0o700, 0o750, 0o2770):
        (tmp_path / "out").mkdir()
        (tmp_path / "out").chmod(kept)
        with new_directory(tmp_path / "out") as directory:
            assert mode(directory) == 0o700
            (directory / "x").write_text("x")
        assert mode(tmp_path / "out") == kept
        (tmp_path / "out" / "x").unlink()
        (tmp_path / "out").rmdir()


def test_a_mount_point_and_a_link_are_refused_first(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match="link is a link"):
        check_free(tmp_path / "link")
    check_free(tmp_path / "empty")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(OutputError, match="is where a file system is mounted"):
        check_free(tmp_path / "empty")


@pytest.mark.skipif(not os.access("/proc/self/mountinfo", os.R_OK), reason="no list of what is mounted")
def test_a_directory_of_the_same_file_system_that_is_mounted_elsewhere_is_refused(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    if subprocess.run(["mount", "--bind", place, place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError, match="is where a file system is mounted"):
            check_free(place)
    finally:
        subprocess.run(["umount", place], check=True)


LOCALES = {"C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "C as Python has it": {"LC_ALL": "C"}}


@pytest.mark.parametrize("locale", LOCALES)
def test_names_that_a_locale_has_no_letters_for(tmp_path, locale):
    """Directories of such names are read and made, and what is printed of them is printed somehow."""
    root = tmp_path / "é中"
    base = checkpoints.llama(root / "base")
    adapter = checkpoints.adapter(root / "ádapter", base_model_name_or_path="bäse")
    code = (
        "import sys; from lora_core.__main__ import main\n"
        "base, adapter, out = sys.argv[1:]\n"
        "print(main(['merge', '--base', base, '--adapter', adapter, '--output', out]), main(['inspect', adapter]),"
        " main(['convert', adapter, '--dtype', 'float16', '--output', out + '-16']), main(['inspect', out]))"
    )
    names = [os.fsencode(path) for path in (base, adapter, root / "öut")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    process = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, env=environment | LOCALES[locale] | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout.decode(errors="replace").endswith("0 0 0 2\n"), process.stderr[-2_000:]
    assert process.stderr.count(b"\n") == 1 and process.stderr.startswith(b"error: ")
    card = (root / "öut" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and json.loads(card.partition("base_model: ")[2].partition("\n")[0]) == "bäse"
