"""What PEFT's files hold of the base itself: weights of embeddings and heads, beside A and B or alone."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import load_adapter, unload
from lora_core.deploy.convert import convert_adapter
from lora_core.deploy.inspection import inspect_adapter
from lora_core.deploy.stream import merge_checkpoint
from lora_core.errors import LoraError, WrongBaseError
from tests.support import tiny
from tests.support.language_models import MODELS, build, close, names_of, reloaded

FILE = "adapter_model.safetensors"


def by_peft(name, directory, *parts, **settings):
    """Logits of an adapter that peft made and saved, with the embedding layers, for a base on disk."""
    build(name).save_pretrained(directory / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = [MODELS[name][1], *names_of(name, parts)]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(type(build(name)).from_pretrained(directory / "base"), config).eval()
        model.save_pretrained(directory / "adapter", save_embedding_layers=True)
    return tiny.logits(model.base_model.model)


@pytest.mark.parametrize("parts", [(), ("head",), ("embeddings",)], ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("name", MODELS)
def test_what_is_the_bases_own_is_no_trained_module(name, parts, tmp_path):
    expected = by_peft(name, tmp_path, *parts)
    keys = load_file(tmp_path / "adapter" / FILE)
    assert any("lora_" not in key for key in keys)
    inspection = inspect_adapter(tmp_path / "adapter")
    assert inspection.whole == () and inspection.parameters == inspection.layer_parameters
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    close(tiny.logits(reloaded(name, tmp_path / "merged")), expected)
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"] * 2, tmp_path / "twice")
    model = build(name)
    load_adapter(model, tmp_path / "adapter")
    close(tiny.logits(model), expected)
    assert torch.equal(tiny.logits(unload(model)), tiny.logits(build(name)))


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2, tied"])
def test_one_that_is_not_the_bases_is_refused(name, tmp_path):
    by_peft(name, tmp_path)
    tensors = load_file(tmp_path / "adapter" / FILE)
    for key in [key for key in tensors if "lora_" not in key]:
        save_file(tensors | {key: tensors[key] + 1}, tmp_path / "adapter" / FILE)
        path = key.removeprefix("base_model.model.").removesuffix(".weight")
        with pytest.raises(WrongBaseError, match=f"holds the weight of {path} that it was trained on; the base has another"):
            merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
        with pytest.raises(LoraError, match="without a home"):
            load_adapter(build(name), tmp_path / "adapter")
    assert not (tmp_path / "merged").exists()


def test_what_is_trained_whole_stays_trained(tmp_path):
    expected = by_peft("llama", tmp_path, modules_to_save=["embed_tokens"])
    assert "model.embed_tokens.weight" in inspect_adapter(tmp_path / "adapter").whole
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    close(tiny.logits(reloaded("llama", tmp_path / "merged")), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [(), ("head",), ("embeddings",)], ids=lambda parts: "+".join(parts) or "none")
def test_a_conversion_leaves_them_as_they_are(parts, dtype, tmp_path):
    """In 16 bits they would be another base's."""
    by_peft("llama", tmp_path, *parts)
    convert_adapter(tmp_path / "adapter", tmp_path / "small", dtype=dtype)
    before, after = (load_file(tmp_path / name / FILE) for name in ("adapter", "small"))
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key].to(dtype) if "lora_" in key else before[key])
    load_adapter(build("llama"), tmp_path / "small")
    merge_checkpoint(tmp_path / "base", [tmp_path / "small"], tmp_path / "merged")
