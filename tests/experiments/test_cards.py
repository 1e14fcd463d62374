"""The model card beside what was trained: its numbers are the run's, and its code loads it."""

import json
import re

import pytest
import torch
import yaml

from experiments.cards import CARD, card
from experiments.models import resolve
from experiments.predict import Predictor
from tests.support import fabricated


def read(run, kind="adapter"):
    return (run / kind / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "kind"), [("lora", "adapter"), ("qlora", "adapter"), ("full", "model"), ("head-only", "model")]
)
def test_the_numbers_are_the_run_s(runs, method, kind):
    text, metrics = read(runs[method], kind), json.loads((runs[method] / "metrics.json").read_text())
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "sentence-transformers/all-MiniLM-L6-v2" and method in head["tags"]
    assert head["library_name"] == ("peft" if kind == "adapter" else "transformers")
    assert f"| accuracy | {metrics['accuracy']:.1%} of 48 held-out rows |" in text and f"| F1 | {metrics['f1']:.3f} |" in text
    assert f"trained on 96 rows of {metrics['data']['name']}" in text and "2 epochs, seed 0" in text
    assert f"{metrics['trainable_parameters']:,} parameters" in text and "MiB (cpu" in text
    assert ("quantize_nf4" in text) is (method == "qlora")


@pytest.mark.parametrize("number", [0, 1], ids=["ours", "peft"])
def test_the_code_of_an_adapter_s_card_loads_it(runs, number):
    code = re.findall(r"```python\n(.*?)```", read(runs["lora"]), re.DOTALL)[number]
    if number:
        pytest.importorskip("peft")
    base, directory = str(resolve("packaged").directory), str(runs["lora"] / "adapter")
    names = {}
    exec(code.replace("sentence-transformers/all-MiniLM-L6-v2", base).replace("this directory", directory), names)
    trained = Predictor(runs["lora"] / "adapter")
    inputs = trained.tokenizer(["a delight", "two hours that I want back"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = names["model"].eval()(**inputs).logits, trained.model(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_code_of_a_whole_model_s_card_loads_it(runs):
    (code,) = re.findall(r"```python\n(.*?)```", read(runs["full"], "model"), re.DOTALL)
    names = {}
    exec(code.replace("this directory", str(runs["full"] / "model")), names)
    assert names["model"].config.id2label == {0: "negative", 1: "positive"}


def test_a_language_model_s_card_has_its_own_score():
    metrics = fabricated.metrics("lora", trainable_percent=1.0)
    del metrics["f1"]
    metrics |= {"exact_match": metrics.pop("accuracy")}
    text = card(metrics, "/a/directory", adapts=True)
    assert (
        "| exact match | 87.0% of 872 held-out rows |" in text and "AutoModelForCausalLM" in text and "num_labels" not in text
    )
