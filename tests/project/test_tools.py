"""What the linter, the formatter and the type checker say of the source; how the public names look to a type checker."""

import re
import subprocess
import sys

import pytest

import lora_core
from tests.support import ROOT


def run(tool, *arguments):
    """(exit code, output) of a tool, in the checkout."""
    pytest.importorskip(tool, reason=f"{tool} is not installed, so it was not run")
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_the_linter_finds_nothing():
    code, said = run("ruff", "check", ".")
    assert code == 0, said


def test_the_source_is_formatted():
    code, said = run("ruff", "format", "--check", ".")
    assert code == 0, said


@pytest.fixture(scope="module")
def use(tmp_path_factory):
    """A program that looks at every public name, and makes four mistakes."""
    path = tmp_path_factory.mktemp("use") / "use.py"
    lines = ["import lora_core", *(f"reveal_type(lora_core.{name})" for name in lora_core.__all__)]
    lines += ["lora_core.LoraConfig(rank=8)", "lora_core.inject(1, lora_core.LoraConfig())", "lora_core.nothing"]
    lines += ["with lora_core.disable_adapters(1): pass"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def typed(use):
    """(what mypy reports in the checkout, what in the program, {public name: its type})."""
    code, said = run("mypy", "lora_core", "examples", str(use))  # in one go: torch is read once
    assert code in (0, 1), said
    found = [line for line in said.splitlines() if ": error:" in line]
    types = dict(zip(lora_core.__all__, re.findall(r'Revealed type is "(.*)"', said), strict=True))
    return [line for line in found if use.name not in line], [line for line in found if use.name in line], types


def test_the_type_checker_finds_nothing(typed):
    assert typed[0] == []


def test_every_public_name_has_its_type(typed):
    for name, kind in typed[2].items():
        assert kind.startswith("def (") and "*Any" not in kind and "-> Any" not in kind, f"{name}: {kind}"


def test_a_reader_s_mistakes_are_found(typed):
    codes = [re.search(r"\[([\w-]+)\]$", line)[1] for line in typed[1]]
    assert codes == ["call-arg", "arg-type", "attr-defined", "arg-type"]
