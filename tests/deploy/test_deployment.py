"""Train, merge by command, load with transformers alone: the same model. And the commands of its page, as they stand there."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiments import data, export
from experiments.models import resolve
from experiments.predict import Predictor, main
from experiments.sst2 import main as train
from lora_core import LoraConfig
from lora_core.__main__ import main as lora_core
from lora_core.deploy import placement
from lora_core.deploy.updates import AdapterUpdates
from tests.support import ROOT

METHODS = ("lora", "qlora", "dora")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{method: output directory} of runs on some of the packaged data that learn something, and the validation split."""
    root, packaged = tmp_path_factory.mktemp("trained"), data.load("packaged")
    for name, split, size in (("train.tsv", packaged.train, 320), ("dev.tsv", packaged.validation, 120)):
        sample = split.sample(size, seed=1)
        rows = [f"{text}\t{label}\n" for text, label in zip(sample.texts, sample.labels, strict=True)]
        (root / name).write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")
    common = ["--model", "packaged", "--data", str(root), "--epochs", "1", "--learning-rate", "3e-3"]
    common += ["--device", "cpu", "--precision", "fp32"]
    for method in METHODS:
        assert train(["--method", method, "--output-dir", str(root / method), *common]) == 0
    return {method: root / method for method in METHODS}, data.read_tsv(root / "dev.tsv")


def merged(run, directory, *argv):
    arguments = ["merge", "--base", resolve("packaged").directory, "--adapter", run / "adapter", "--output", directory, *argv]
    assert lora_core([str(argument) for argument in arguments]) == 0
    return directory


def logits(model, tokenizer, texts):
    """(N, 2) float32, by nothing but the model and its tokenizer."""
    batches = [list(texts[i : i + 40]) for i in range(0, len(texts), 40)]
    with torch.no_grad():
        rows = [model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt")).logits for batch in batches]
    return torch.cat(rows).float()


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_the_trained_one(trained, tmp_path, method):
    runs, validation = trained
    adapted = Predictor(runs[method] / "adapter")
    expected = logits(adapted.model, adapted.tokenizer, validation.texts)
    directory = merged(runs[method], tmp_path / "merged")
    model, loading = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.id2label == {0: "negative", 1: "positive"} and model.config.label2id == {"negative": 0, "positive": 1}
    found = logits(model.eval(), AutoTokenizer.from_pretrained(directory), validation.texts)
    assert (found - expected).abs().max() < 1e-5
    accuracy = np.mean(found.argmax(1).numpy() == validation.labels)
    metrics = json.loads((runs[method] / "metrics.json").read_text())
    assert accuracy == pytest.approx(metrics["accuracy"], abs=1e-6) and 0 < found.argmax(1).sum() < 120  # it says both

    half = AutoModelForSequenceClassification.from_pretrained(
        merged(runs[method], tmp_path / "half", "--dtype", "float16"), dtype=torch.float16
    )
    found = logits(half.eval(), AutoTokenizer.from_pretrained(tmp_path / "half"), validation.texts)
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize(
    ("fingerprint", "labels"),
    [
        ({"labels": ["no", "yes"]}, ["no", "yes"]),
        ({"labels": ["no", 1]}, None),
        ({"labels": "no"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_names_of_labels_are_a_list_of_texts_or_not_there(tmp_path, fingerprint, labels):
    adapter = AdapterUpdates(tmp_path, LoraConfig(task_type="SEQ_CLS"), {}, {}, {}, False, fingerprint)
    assert adapter.labels == labels


@pytest.mark.parametrize(
    ("labels", "found"), [(["no", "yes"], ["no", "yes"]), (["no"] * 2, None), (["no", "yes", "maybe"], None)]
)
def test_a_merged_head_has_its_names_if_they_are_as_many_as_its_rows(tmp_path, labels, found):
    adapter = AdapterUpdates(
        tmp_path, LoraConfig(task_type="SEQ_CLS"), {}, {"classifier.weight": torch.zeros(2, 3)}, {}, False, {"labels": labels}
    )
    config = placement._config(SimpleNamespace(config={"architectures": ["BertModel"]}), [adapter])
    assert config.get("label2id") == (found and {name: i for i, name in enumerate(found)})


def test_the_exported_program_serves_the_same_answers(trained, tmp_path, capsys):
    runs, validation = trained
    directory = merged(runs["qlora"], tmp_path / "merged")
    texts = list(validation.texts[:40])
    expected = list(Predictor(runs["qlora"] / "adapter")(texts))
    plain = list(Predictor(None, merged=directory)(texts))
    assert export.main(["--merged", str(directory)]) == 0
    assert "any batch and length" in capsys.readouterr().out
    assert {path.name for path in directory.iterdir() if path.suffix == ".pt2"} == {export.PROGRAM}
    served = list(Predictor(None, merged=directory)(texts))
    for found in (plain, served):
        assert [label for label, _ in found] == [label for label, _ in expected]
        assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--merged", "nowhere", "fine"], "'nowhere'"),
        (["--merged", "DIR", "--adapter", "x", "fine"], "--merged needs neither --adapter nor --model"),
        (["--merged", "BASE", "fine"], "has no trained head for two labels"),
    ],
)
def test_what_is_no_merged_classifier_is_one_line(capsys, tmp_path, argv, says):
    places = {"DIR": tmp_path, "BASE": resolve("packaged").directory}
    assert main([str(places.get(arg, arg)) for arg in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_the_page_s_commands_run(trained, tmp_path):
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    script = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1]
    script, count = re.subn(r"^RUN=.*$", f"RUN={trained[0]['qlora']}", script, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    for text in ("effective rank", "verified", "nf4-dequantized  logits off by"):
        assert text in done.stdout
    assert re.search(r"^(negative|positive)\t0\.\d+\tI absolutely loved", done.stdout, re.MULTILINE)
    assert (tmp_path / "merged" / "model.pt2").is_file() and (tmp_path / "merged-fp16" / "model.safetensors").is_file()
