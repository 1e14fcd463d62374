"""What the README says is true: its code runs, its commands exist, its names and files are there."""

import argparse
import re
import shlex

import pytest

import lora_core
from tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL_LINES = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_example_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed and "merged default" in printed
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("line", SHELL_LINES)
def test_the_commands_exist(line):
    program, *arguments = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert arguments[0] in targets
        return
    assert program.endswith("python") and arguments[0] == "-m", f"this test does not know how to check {line!r}"
    module = __import__(arguments[1], fromlist=["parser"])
    try:
        module.parser().parse_args(arguments[2:])
    except (SystemExit, argparse.ArgumentError) as error:
        pytest.fail(f"{line!r} is refused: {error}")


def test_every_public_verb_is_named():
    text = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("[!r]*.md")])
    verbs = [name for name in lora_core.__all__ if callable(getattr(lora_core, name)) and name.islower()]
    assert len(verbs) > 20 and [verb for verb in verbs if not re.search(rf"\b{verb}(\(|`)", text)] == []


def test_links_and_files_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_rooms_are_all_in_the_tree():
    tree = README[README.index("lora_core/        ") :].partition("```")[0]
    rooms = {path.name for path in (ROOT / "lora_core").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert all(re.search(rf"\b{room}/", tree) for room in rooms) and len(tree.splitlines()) <= 50  # one screen


def test_the_engine_s_files_are_all_in_the_house():
    house = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", house))
    assert {path.stem for path in (ROOT / "lora_core").rglob("*.py")} - {"__init__"} <= words
