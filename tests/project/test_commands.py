"""Every command answers --help at once: it parses its arguments before it imports what does the work."""

import re
import subprocess
import sys

import pytest

from tests.support import ROOT

#: Modules that are run with `python -m`.
COMMANDS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for package in ("lora_core", "experiments", "bench")
    for path in (ROOT / package).rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
#: Runs a module as `python -m` does, with the arguments that follow its name; says what it ended with, and what was imported.
CODE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as stopped:
    code = stopped.code
heavy = {"torch", "transformers", "numpy", "matplotlib", "peft", "huggingface_hub"} & {n for n, m in sys.modules.items() if m}
print("ended", code, *heavy)
"""


def test_the_commands_are_found():
    assert {"lora_core", "bench", "experiments.sst2", "experiments.predict", "experiments.sweep"} <= set(COMMANDS)


SUBCOMMANDS = [f"lora_core {name}" for name in ("inspect", "merge", "verify", "combine", "extract", "convert")]


@pytest.mark.parametrize("command", [*COMMANDS, *SUBCOMMANDS])
def test_help_needs_no_library(command):
    done = subprocess.run([sys.executable, "-c", CODE, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
    said, _, ended = done.stdout.rpartition("\nended ")
    assert ended.split() == ["0"] and not done.stderr, ended + done.stderr
    assert said.startswith(f"usage: python -m {command} ") and "show this help message" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_flag_is_one_line_and_needs_no_library(command):
    done = subprocess.run([sys.executable, "-c", CODE, command, "--hlep"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "ended 2\n"
    assert re.fullmatch(rf"error: .*; see python -m {re.escape(command)} --help\n", done.stderr)
