"""Predictions on the command line: from arguments or lines, in the order given, on the base that was trained on."""

import io
import shutil
import subprocess
import sys

import pytest

from experiments import predict
from lora_core.bases import is_packed


@pytest.fixture
def call(capfd, monkeypatch):
    """Runs the command with some standard input; returns (exit code, standard output, standard error)."""

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capfd.readouterr()
        try:
            code = predict.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


TEXTS = ["I absolutely loved this product!", "dull", "a long and winding sentence that says nothing much about it at all"]


def parse(out):
    return [tuple(line.split("\t")) for line in out.splitlines()]


def test_texts_are_answered_in_order(call, runs):
    code, out, err = call("--adapter", runs["lora"] / "adapter", *TEXTS)
    assert code == 0 and not err
    rows = parse(out)
    assert [text for *_, text in rows] == TEXTS
    assert {label for label, *_ in rows} <= {"negative", "positive"}
    assert all(0.5 <= float(probability) <= 1 for _, probability, _ in rows)


def test_lines_give_what_arguments_give_and_a_text_does_not_depend_on_its_neighbours(call, runs):
    adapter = ("--adapter", runs["qlora"] / "adapter")
    _, together, _ = call(*adapter, *TEXTS)
    code, lines, _ = call(*adapter, stdin="\n".join(TEXTS).encode() + b"\n")
    assert code == 0 and lines == together
    _, alone, _ = call(*adapter, TEXTS[1])
    assert alone == together.splitlines(keepends=True)[1]


def test_it_works_as_a_process_of_its_own(runs):
    argv = [sys.executable, "-m", "experiments.predict", "--adapter", str(runs["qlora"] / "adapter"), TEXTS[0]]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse(done.stdout)[0][2] == TEXTS[0]


@pytest.mark.parametrize(("method", "quantized"), [("lora", False), ("qlora", True)])
def test_the_base_is_held_as_it_was_in_training(runs, method, quantized):
    model = predict.Predictor(runs[method] / "adapter").model
    assert any(is_packed(module) for module in model.modules()) is quantized
    assert not is_packed(model.classifier)


def test_an_adapter_without_our_files_needs_only_its_base(call, runs, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(runs["lora"] / "adapter" / name, tmp_path)
    _, expected, _ = call("--adapter", runs["lora"] / "adapter", *TEXTS)
    assert call("--adapter", tmp_path, "--model", "packaged", *TEXTS) == (0, expected, "")


def truncated(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def nameless(directory):
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"sentence-transformers/all-MiniLM-L6-v2"', "null"))


def broken_config(directory):
    (directory / "adapter_config.json").write_text("{")


def of_another_rank(directory):
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 16', '"r": 8'))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, "adapter_model.safetensors"),
        (nameless, "does not name its base model; name it with --model"),
        (broken_config, "adapter_config.json is not JSON"),
        (of_another_rank, "shape"),
        (shutil.rmtree, "has no adapter_config.json; give the adapter/ directory of a run"),
    ],
)
def test_a_damaged_adapter_is_one_line(call, runs, tmp_path, damage, says):
    adapter = shutil.copytree(runs["lora"] / "adapter", tmp_path / "adapter")
    damage(adapter)
    code, out, err = call("--adapter", adapter, "fine")
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize(
    ("argv", "stdin", "says"),
    [
        ([], b"", "no text was given; pass one as an argument, or lines on standard input"),
        ([], b"fine\n\nbad\n", "line 2 is empty"),
        ([], b"caf\xe9\n", "standard input is not utf-8 text (byte 3)"),
        (["fine", "  "], b"", "text 2 is empty"),
    ],
)
def test_empty_or_unreadable_input_is_refused(call, runs, argv, stdin, says):
    code, out, err = call("--adapter", runs["lora"] / "adapter", *argv, stdin=stdin)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_a_whole_model_needs_no_adapter(call, runs):
    code, out, err = call("--model", runs["full"] / "model", *TEXTS)
    assert code == 0 and not err
    assert [text for *_, text in parse(out)] == TEXTS
    assert predict.Predictor(None, str(runs["full"] / "model")).max_length == 64  # as it was trained


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fine"], "give --adapter, the adapter/ directory of a run, or --model, its model/ directory"),
        (["--model", "packaged", "fine"], "model: 'packaged' has no trained head for two labels; name an adapter"),
    ],
)
def test_something_trained_is_required(call, argv, says):
    code, out, err = call(*argv)
    assert code == 2 and not out and err.startswith(f"error: {says}") and err.count("\n") == 1
