"""What the pages under docs/ show can be done: their code runs, their commands parse, their files and messages are there."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import lora_core
from tests.support import ROOT
from tests.support.language_models import small_llama

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
#: Their snippets are run by tests of their own.
RUN_ELSEWHERE = {"extend", "llm"}
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.splitlines()]
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "lora_core").rglob("*.py")))


def split_at_module(line):
    """The words before and after "-m"."""
    words = shlex.split(line, comments=True)
    return words[: words.index("-m")], words[words.index("-m") + 1 :]


@pytest.mark.parametrize("line", LINES)
def test_the_commands_parse(line):
    (program, *options), (module, *arguments) = split_at_module(line)
    assert program in ("python", "torchrun", "accelerate") and (program != "python" or not options)
    module = "lora_core.__main__" if module == "lora_core" else module
    __import__(module, fromlist=["parser"]).parser().parse_args(arguments)


def test_every_command_of_the_study_is_shown():
    shown = {split_at_module(line)[1][0].removeprefix("experiments.") for line in LINES}
    assert {"sst2", "predict", "compare", "report", "sweep", "sft", "chat"} <= shown


@pytest.mark.parametrize("page", sorted(PAGES.keys() - RUN_ELSEWHERE))
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        exec(compile(code, f"{page}.md", "exec"), names)


def test_the_first_example_is_of_ten_lines():
    code, *_ = re.findall(r"```python\n(.*?)```", PAGES["quickstart"], re.DOTALL)
    assert len([line for line in code.splitlines() if line and not re.match("import|from", line)]) <= 10


def test_the_files_that_are_named_are_there():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.\w+)`", text):
            assert any((ROOT / parent / name).exists() for parent in ("", "lora_core")), f"{page}: {name}"


def test_each_technique_of_the_methods_is_explained():
    for word in ("LoRA", "QLoRA", "NF4", "rsLoRA", "DoRA", "Bias"):
        assert f"\n| {word} |" in PAGES["techniques"]


def test_the_messages_that_are_explained_are_those_of_the_source():
    told = re.findall(r"^\| `([^`]+)` \|", PAGES["troubleshooting"], re.MULTILINE)
    assert len(told) > 10
    for message in told:
        assert message in SOURCE, message


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^::: lora_core\.(?:\w+\.)*(\w+)$", PAGES["reference"], re.MULTILINE))
    reports = {name for name in lora_core.__all__ if name.endswith("Report")} | {"ParameterCount", "LoraError"}
    assert set(lora_core.__all__) - reports <= listed


def test_every_page_is_in_the_site_and_says_what_it_is_for():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page, text in PAGES.items():
        assert f": {page}.md" in nav, page
        head, _, rest = text.partition("\n\n")
        assert head.startswith("# ") and not rest.startswith("#"), f"{page} does not open with what it is for"


def test_links_between_pages_hold():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / "docs" / target).exists(), f"{page}: {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {f"{page}.html" for page in PAGES} <= {path.name for path in tmp_path.iterdir()}


def test_the_examples_of_the_trainers_run(tmp_path, monkeypatch):
    """Each after the ones before it; those of trl where it is installed."""
    monkeypatch.chdir(tmp_path)
    names = {"BASE": small_llama(tmp_path / "base"), "ROWS": [{k: torch.arange(9, 21) for k in ("input_ids", "labels")}] * 8}
    blocks = re.findall(r"```python\n(.*?)```", PAGES["llm"], re.DOTALL)
    assert len(blocks) == 3
    for code in blocks:
        if "trl" in code:
            pytest.importorskip("trl", reason="trl is not installed, so the examples of trl were not run")
        exec(compile(code, "llm.md", "exec"), names)
        if code is blocks[0]:
            assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
            assert not (tmp_path / "out" / "checkpoint-4" / "model.safetensors").exists()
