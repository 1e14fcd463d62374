"""What a run leaves behind: its numbers, its adapter, and nothing when it fails."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from experiments import data, models, predictions, provenance, record, sst2, train
from experiments.data import read_tsv
from experiments.errors import ExperimentError
from experiments.job import Job
from experiments.methods import Schedule
from experiments.models import resolve
from experiments.predict import Predictor
from experiments.predictions import accuracy_and_f1
from experiments.recipes import METHODS

KEYS = [
    *("method", "base_model", "data", "accuracy", "f1", "loss"),
    *("trainable_parameters", "total_parameters", "adapter_parameters", "trainable_percent"),
    *("base_weight_bytes", "peak_rss_mb", "peak_cuda_mb", "train_seconds", "examples_per_second"),
    *("hyperparameters", "seed", "versions", "device", "provenance", "accuracy_by_epoch", "loss_history"),
]

MINILM = 22_713_216  # all-MiniLM-L6-v2 as a BertModel
HEAD = 384 * 2 + 2
LORA = 6 * 4 * 16 * (384 + 384)


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.parametrize("method", ["base", "head-only", "full", "lora", "qlora"])
def test_the_metrics_have_every_key_and_sound_values(runs, method, small_data):
    m = metrics_of(runs[method])
    assert list(m) == KEYS
    assert m["method"] == method and m["seed"] == 0
    assert m["base_model"]["name"] == "sentence-transformers/all-MiniLM-L6-v2" and m["base_model"]["source"]
    assert (m["data"]["source"], m["data"]["train"], m["data"]["validation"]) == (str(small_data), 96, 48)
    assert 0 <= m["accuracy"] <= 1 and 0 <= m["f1"] <= 1 and m["loss"] > 0
    assert 200 < m["peak_rss_mb"] < 16_000
    assert m["versions"]["torch"] and m["device"].startswith("cpu")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_parameters_are_counted_in_closed_form(runs, method):
    m = metrics_of(runs[method])
    assert m["adapter_parameters"] == LORA == 294_912
    assert m["trainable_parameters"] == LORA + HEAD == 295_682
    assert m["total_parameters"] == MINILM + LORA + 2 * HEAD  # the head that came with the model waits aside
    assert m["trainable_percent"] == pytest.approx(100 * m["trainable_parameters"] / m["total_parameters"], abs=1e-4)


def test_the_base_trains_nothing(runs):
    m = metrics_of(runs["base"])
    assert m["trainable_parameters"] == m["adapter_parameters"] == m["train_seconds"] == 0
    assert m["total_parameters"] == MINILM + HEAD
    assert m["examples_per_second"] is None and m["loss_history"] == m["accuracy_by_epoch"] == []
    assert not (runs["base"] / "adapter").exists()


@pytest.mark.parametrize(("method", "trained"), [("head-only", HEAD), ("full", MINILM + HEAD)])
def test_without_an_adapter_the_head_or_everything_is_trained(runs, method, trained):
    from safetensors.torch import load_file

    m = metrics_of(runs[method])
    assert (m["trainable_parameters"], m["adapter_parameters"], m["total_parameters"]) == (trained, 0, MINILM + HEAD)
    assert m["hyperparameters"]["target_modules"] == [] and "r" not in m["hyperparameters"]
    assert not (runs[method] / "adapter").exists()
    before = load_file(resolve("packaged").directory / "model.safetensors")
    after = load_file(runs[method] / "model" / "model.safetensors")
    moved = {name for name in before if f"bert.{name}" in after and before[name].ne(after[f"bert.{name}"]).any()}
    assert bool(moved) is (method == "full")
    assert after["classifier.weight"].shape == (2, 384)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("bias", {"bias": "lora_only"}), ("rslora", {"use_rslora": True}), ("dora", {"use_dora": True}), ("lora", {})],
)
def test_variants_reach_the_adapter_s_file_and_the_record(tmp_path, small_data, method, settings):
    from experiments.sst2 import main

    argv = ["--method", method, "--model", "packaged", "--data", str(small_data), "--max-steps", "1", "--device", "cpu"]
    assert main([*argv, "--output-dir", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    usual = {"bias": "none", "use_rslora": False, "use_dora": False}
    assert {name: config[name] for name in usual} == usual | settings
    recorded = metrics_of(tmp_path)["hyperparameters"]
    assert {name: recorded[name] for name in usual if name in recorded} == settings
    ((label, probability),) = Predictor(tmp_path / "adapter")(["dull"])  # and it loads again
    assert label in ("negative", "positive") and 0.5 <= probability <= 1


@pytest.mark.parametrize("ratio", [1, 4])
def test_lora_plus_moves_b_faster_and_nothing_else(tmp_path, small_data, ratio):
    from safetensors.torch import load_file

    from experiments.sst2 import main

    argv = ["--method", "lora", "--model", "packaged", "--data", str(small_data), "--device", "cpu", "--learning-rate", "1e-3"]
    moving = ["--max-steps", "1", "--warmup", "0", "--max-grad-norm", "0", "--weight-decay", "0", "--lora-plus", str(ratio)]
    assert main([*argv, *moving, "--output-dir", str(tmp_path)]) == 0
    settings = metrics_of(tmp_path)["hyperparameters"]
    assert settings.get("lora_plus_ratio", 1) == ratio
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # Adam's first step is the learning rate in every element whose gradient is not tiny. B starts at zero, so A has none yet.
    for name, tensor in tensors.items():
        if "lora_B" in name:
            assert tensor.abs().median() == pytest.approx(1e-3 * ratio, rel=1e-2)
    assert tensors["base_model.model.classifier.bias"].abs().max() == pytest.approx(1e-3, rel=1e-2)


def test_every_linear_layer_can_be_meant(tmp_path, small_data):
    from experiments.sst2 import main

    argv = ["--method", "lora", "--rank", "1", "--target-modules", "all-linear", "--model", "packaged", "--max-steps", "1"]
    assert main([*argv, "--data", str(small_data), "--device", "cpu", "--output-dir", str(tmp_path)]) == 0
    layers = 6 * (4 * (384 + 384) + 2 * (384 + 1536)) + 2 * 384  # the pooler is linear too
    assert metrics_of(tmp_path)["adapter_parameters"] == layers


def test_the_base_weights_weigh_what_their_format_says(runs):
    dense = 4 * (MINILM + HEAD)
    assert metrics_of(runs["base"])["base_weight_bytes"] == dense
    assert metrics_of(runs["lora"])["base_weight_bytes"] == dense
    quantized = 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384  # the linear layers, the pooler among them
    blocks = quantized // 64
    # a scale of 8 bits for each block of 64, a float32 for each 256 of these (rounded up in each layer) and an offset
    layers = [384 * 384] * 25 + [384 * 1536] * 12
    scales = blocks + sum(4 * -(-size // 64 // 256) + 4 for size in layers)
    assert metrics_of(runs["qlora"])["base_weight_bytes"] == dense - 4 * quantized + quantized // 2 + scales


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_each_epoch_is_evaluated_and_the_last_one_counts(runs, method):
    m = metrics_of(runs[method])
    assert len(m["accuracy_by_epoch"]) == 2 and m["accuracy_by_epoch"][-1] == m["accuracy"]
    assert [step for step, _ in m["loss_history"]] == [1, 2, 3, 4, 5, 6]  # 96 sentences, batches of 32, 2 epochs
    assert m["train_seconds"] > 0
    assert m["examples_per_second"] == pytest.approx(2 * 96 / m["train_seconds"], rel=0.02)


@pytest.mark.parametrize("method", ["head-only", "full", "lora", "qlora"])
def test_what_is_saved_is_what_was_trained(runs, method, small_data):
    m = metrics_of(runs[method])
    split = read_tsv(small_data / "dev.tsv")
    adapter, model = runs[method] / "adapter", runs[method] / "model"
    predictor = Predictor(adapter) if adapter.exists() else Predictor(None, str(model))
    labels, probabilities = zip(*predictor(split.texts), strict=True)
    right = (np.array(labels) == "positive") == split.labels
    likelihood = np.where(right, probabilities, np.subtract(1, probabilities))
    assert right.mean() == pytest.approx(m["accuracy"], abs=1e-6)
    # The same loss, but for the rounding of another batch size: the adapter, the head and (for qlora) the base agree.
    assert -np.log(likelihood).mean() == pytest.approx(m["loss"], abs=2e-6)


def test_training_moved_both_adapter_and_head(runs):
    from safetensors.torch import load_file

    tensors = load_file(runs["lora"] / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)  # they start at zero
    assert len([name for name in tensors if "lora_B" in name]) == 24


def test_the_adapter_names_its_base_so_that_others_can_load_it(runs):
    config = json.loads((runs["qlora"] / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert record.AdapterNote.read(runs["qlora"] / "adapter") == record.AdapterNote(quantize=True, max_length=64)
    assert record.AdapterNote.read(runs["lora"] / "adapter") == record.AdapterNote(quantize=False, max_length=64)


def test_a_run_is_reproducible(runs, tmp_path, small_data):
    from experiments.sst2 import main

    common = ["--model", "packaged", "--data", str(small_data), "--max-length", "64", "--device", "cpu", "--precision", "fp32"]
    assert main(["--method", "lora", "--epochs", "2", "--output-dir", str(tmp_path / "again"), *common]) == 0
    first, again = metrics_of(runs["lora"]), metrics_of(tmp_path / "again")
    assert first["loss_history"] == again["loss_history"] and first["loss"] == pytest.approx(again["loss"], abs=1e-6)


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_accuracy_and_f1_are_their_definitions():
    rng = np.random.default_rng(0)
    for n in (1, 5, 200):
        called, labels = rng.integers(0, 2, (2, n)).astype(np.uint8)
        hits = int((called & labels).sum())
        f1 = 2 * hits / (2 * hits + int((called != labels).sum())) if called.any() or labels.any() else 0
        expected = {"accuracy": (called == labels).mean(), "f1": f1}
        assert accuracy_and_f1(labels, called) == pytest.approx(expected)


def test_f1_without_any_positive_is_zero():
    nothing = np.zeros(3, np.uint8)
    assert accuracy_and_f1(nothing, nothing) == {"accuracy": 1.0, "f1": 0.0}


@pytest.mark.parametrize("method", ["base", "lora"])
def test_what_each_sentence_was_called_is_kept_in_the_sentences_order(runs, method, small_data):
    labels, predicted = predictions.read(runs[method])
    split = read_tsv(small_data / "dev.tsv")
    assert labels.tolist() == split.labels.tolist()
    assert metrics_of(runs[method])["accuracy"] == pytest.approx((labels == predicted).mean(), abs=1e-6)
    if method == "lora":
        again = [label for label, _ in Predictor(runs[method] / "adapter")(split.texts)]
        assert again == [("negative", "positive")[value] for value in predicted]


def test_where_the_numbers_come_from_is_kept(runs):
    kept = metrics_of(runs["lora"])["provenance"]
    measured = {name: kept[name] for name in ("load_before", "seconds")}
    assert kept == provenance.after(provenance.here(), torch.get_num_threads()) | measured
    assert (
        kept["load_before"] >= 0
        and kept["seconds"] > metrics_of(runs["lora"])["train_seconds"]
        and not provenance.differing(metrics_of(runs["lora"]))
    )


# --- the process -----------------------------------------------------------------------------------------------------


def test_the_peak_of_a_process_is_its_own():
    # What getrusage says outlives an exec: without care, a run started by a large process begins with that one's peak.
    code = "from experiments.record import peak_rss_mb; print(peak_rss_mb())"
    parent = (
        "import subprocess, sys; block = bytearray(b'1') * (1 << 30); "
        f"sys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)"
    )
    peak = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout
    assert 20 < float(peak) < 900


# --- the files --------------------------------------------------------------------------------------------------------


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    record.write_json(path, {"a": 1, "b": [1, 2]})
    assert path.read_text() == '{\n  "a": 1,\n  "b": [1, 2]\n}\n'
    with pytest.raises(ValueError):
        record.write_json(path, {"a": float("nan")})
    assert record.read_json(path) == {"a": 1, "b": [1, 2]} and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


PLAN = {
    "method": "lora",
    "base_model": {"name": "m", "why": "x"},
    "data": {"name": "d"},
    "hyperparameters": {"target_modules": ("q",)},
    "seed": 0,
}


def test_what_can_t_be_scored_is_refused_before_it_is_trained(tmp_path, small_data, monkeypatch, capsys):
    found = importlib.metadata.version

    def version(name):
        if name == "scikit-learn":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(train, "load_classifier", lambda base: pytest.fail("it was loaded"))
    argv = ["--model", "packaged", "--data", str(small_data), "--method", "lora", "--output-dir", str(tmp_path / "out")]
    assert sst2.main([*argv, "--device", "cpu", "--precision", "fp32"]) == 2
    assert "scores need scikit-learn" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(record, "LIBRARIES", ("torch", "no-such-library"))
    assert record.versions().keys() == {"python", "torch"}


@pytest.mark.parametrize("changes", [{"trains": "head"}, {"quantize": True}, {"use_rslora": True}, {"roles": ("query",)}])
def test_no_two_recipes_are_one_run(changes, small_data):
    base, sentences = models.resolve("packaged"), data.load(str(small_data))
    method = METHODS["full" if "trains" in changes else "best" if "use_rslora" in changes else "lora"]
    plans = [Job(one, Schedule(), base, sentences).plan() for one in (method, dataclasses.replace(method, **changes))]
    assert plans[0]["hyperparameters"] != plans[1]["hyperparameters"]


def test_the_same_run_is_recognised_and_another_is_not(tmp_path):
    assert record.finished(tmp_path / "new", PLAN) is None
    record.write_json(tmp_path / "metrics.json", PLAN | {"accuracy": 0.9})
    assert record.finished(tmp_path, PLAN | {"base_model": {"name": "m", "why": "y"}})["accuracy"] == 0.9
    with pytest.raises(ExperimentError, match=r"holds another run \(its seed differ\); pass --overwrite"):
        record.finished(tmp_path, PLAN | {"seed": 1})
    with pytest.raises(ExperimentError, match="base_model"):
        record.finished(tmp_path, PLAN | {"base_model": {"name": "n"}})


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(ExperimentError, match=r"experiment\.json"):
        record.AdapterNote.read(tmp_path)
    (tmp_path / "experiment.json").write_text('{"quantize": true}')
    with pytest.raises(ExperimentError, match="max_length"):
        record.AdapterNote.read(tmp_path)


def test_an_adapter_without_a_note_gets_the_defaults(tmp_path):
    assert record.AdapterNote.read(tmp_path) == record.AdapterNote(False, 128)
    record.AdapterNote(True, 32, "bf16").write(tmp_path)
    assert dataclasses.astuple(record.AdapterNote.read(tmp_path)) == (True, 32, "bf16")
    record.write_json(tmp_path / record.NOTE, {"quantize": False, "max_length": 64})  # as older runs have written it
    assert record.AdapterNote.read(tmp_path) == record.AdapterNote(False, 64, "fp32")


def test_a_run_on_other_data_of_the_same_size_is_another_run(tmp_path, small_data):
    from experiments.sst2 import main

    def run(data, output):
        common = ["--method", "head-only", "--model", "packaged", "--max-steps", "1", "--device", "cpu"]
        return main([*common, "--data", str(data), "--output-dir", str(output)])

    assert run(small_data, tmp_path / "out") == 0
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    for name, change in (
        ("labels", lambda line: line.replace("\t0", "\t2").replace("\t1", "\t0").replace("\t2", "\t1")),
        ("sentences", lambda line: line.replace("the", "a")),
    ):
        for file in ("train.tsv", "dev.tsv"):
            other = shutil.copytree(small_data, tmp_path / f"{name}-{file}")
            header, *lines = (other / file).read_text(encoding="utf-8").splitlines(keepends=True)
            (other / file).write_text("".join([header, *map(change, lines)]), encoding="utf-8")
            assert run(other, tmp_path / "out") == 2
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before
    assert run(shutil.copytree(small_data, tmp_path / "elsewhere"), tmp_path / "out") == 0  # the same sentences: done already


def test_an_older_file_without_a_hash_is_another_run(tmp_path):
    old = {**PLAN, "data": {"name": "d", "train": 3}, "accuracy": 0.9}
    record.write_json(tmp_path / "metrics.json", old)
    with pytest.raises(ExperimentError, match=r"its data \(no hash recorded\) differ"):
        record.finished(tmp_path, PLAN | {"data": {"name": "d", "train": 3, "sha256": "0123"}})


def test_other_weights_in_the_same_directory_are_another_base(tmp_path):
    from safetensors.torch import save_file

    def found():
        return models.resolve(str(tmp_path)).sha256

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    weights = torch.zeros(1000, 1000)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    hashes = [found()]
    weights[200, 5] = 1e-3  # as a merged adapter leaves most tensors as they were
    save_file({"w": weights}, tmp_path / "model.safetensors")
    hashes.append(found())
    assert len(set(hashes)) == 2 and all(len(h) == 16 for h in hashes)
    (tmp_path / "README.md").write_text("what nothing is loaded from")
    assert found() == hashes[-1]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt"])
def test_another_configuration_or_tokenizer_is_another_base(tmp_path, name):
    from safetensors.torch import save_file

    for file in ("config.json", name):
        (tmp_path / file).write_text("{}")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = models.resolve(str(tmp_path)).sha256
    assert models.resolve(str(tmp_path)).sha256 == before
    (tmp_path / name).write_text("[]")
    assert models.resolve(str(tmp_path)).sha256 != before


def test_a_base_whose_file_can_t_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ExperimentError, match=r"model .*: .*model\.safetensors is a pipe; a regular file is expected"):
        _ = models.resolve(str(tmp_path)).sha256
