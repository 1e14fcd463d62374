"""What the pages under docs/ show can be done: their commands parse, their code runs, their files are there."""

import re
import shlex

import pytest

from tests.support import ROOT

USAGE, TECHNIQUES = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("usage.md", "techniques.md"))
LINES = [line for block in re.findall(r"```sh\n(.*?)```", USAGE, re.DOTALL) for line in block.splitlines()]


def split_at_module(line):
    """The words before and after "-m"."""
    words = shlex.split(line, comments=True)
    return words[: words.index("-m")], words[words.index("-m") + 1 :]


@pytest.mark.parametrize("line", LINES)
def test_the_commands_parse(line):
    (program, *options), (module, *arguments) = split_at_module(line)
    assert program in ("python", "torchrun", "accelerate") and (program != "python" or not options)
    __import__(module, fromlist=["parser"]).parser().parse_args(arguments)


def test_every_command_of_the_study_is_shown():
    shown = {split_at_module(line)[1][0].removeprefix("experiments.") for line in LINES}
    assert {"sst2", "predict", "compare", "report", "sweep"} <= shown


def test_the_example_runs_in_ten_lines(tmp_path, monkeypatch, capsys):
    code, _ = re.findall(r"```python\n(.*?)```", USAGE, re.DOTALL)
    body = [line for line in code.splitlines() if line and not re.match("import|from", line)]
    assert len(body) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "usage.md", "exec"), {})
    assert "1 layers and 2 whole" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_the_example_of_several_adapters_runs(tmp_path, monkeypatch, capsys):
    _, code = re.findall(r"```python\n(.*?)```", USAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "usage.md", "exec"), {})
    assert "'both' = svd of 0.7 'film' + 0.3 'food' on 1 layers: rank 4" in capsys.readouterr().out
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()


def test_the_files_that_are_named_are_there():
    for name in re.findall(r"`([\w/]+\.py|layers/)`", TECHNIQUES):
        assert (ROOT / "lora_core" / name).exists() or (ROOT / name).exists(), name


def test_each_technique_of_the_methods_is_explained():
    for word in ("LoRA", "QLoRA", "NF4", "rsLoRA", "DoRA", "Bias"):
        assert f"\n| {word} |" in TECHNIQUES
