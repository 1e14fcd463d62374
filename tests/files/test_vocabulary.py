"""Adapters of a model whose vocabulary grew: no row of a new token is lost without a word."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_core import LoraConfig, inject, load_adapter, merge_adapter, save_adapter, set_adapter, unload
from lora_core.bases import DEFAULT, base_for
from lora_core.errors import ConfigError, FileFormatError, StateError, WrongBaseError
from tests.support import tiny

IDS = torch.tensor([[5, 99, 100, 101, 7]])
PLAIN = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    directory = tmp_path / "base"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SMALL)).save_pretrained(directory)
    return directory


def grown(base, seed, size=102):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


def in_memory(seed):
    """The same of a model that is on no disk."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SMALL))
    torch.manual_seed(seed)
    model.resize_token_embeddings(102, mean_resizing=False)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def keys(directory):
    return {key for key in load_file(directory / "adapter_model.safetensors") if "lora" not in key}


def test_what_is_saved_after_a_resize_computes_the_same_on_a_base_that_is_resized_anew(base, tmp_path):
    model = grown(base, 1)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter")
    again = grown(base, 2)
    assert (logits(again) - logits(model)).abs().max() > 1e-2
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_a_vocabulary_that_did_not_grow_is_not_stored(base, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter")
    assert keys(tmp_path / "adapter") == set()


def test_it_can_be_asked_for_and_left_out(base, tmp_path):
    model = grown(base, 1)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "without", save_embedding_layers=False)
    assert keys(tmp_path / "without") == set()
    plain = transformers.LlamaForCausalLM.from_pretrained(base)
    inject(plain, PLAIN)
    save_adapter(plain, tmp_path / "with", save_embedding_layers=True)
    assert len(keys(tmp_path / "with")) == 2
    load_adapter(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "with")
    with pytest.raises(ConfigError, match="save_embedding_layers must be True, False or 'auto', not 'yes'"):
        save_adapter(model, tmp_path / "bad", save_embedding_layers="yes")


def test_rows_that_are_trained_by_themselves_are_enough(base, tmp_path):
    model = grown(base, 1)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [99, 100, 101]}))
    save_adapter(model, tmp_path / "adapter")
    assert {k.removeprefix("base_model.model.") for k in keys(tmp_path / "adapter")} == {
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "lm_head.weight",  # which is not tied, and whose new rows are nowhere else
    }


@pytest.mark.parametrize("size", [99, 100, 110])
def test_a_model_of_another_size_is_told_the_call_that_it_takes(base, tmp_path, size):
    model = grown(base, 1)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter")
    other = grown(base, 1, size)
    before = tiny.snapshot(other)
    with pytest.raises(FileFormatError, match=rf"for 102 tokens, and this model has {size}; call model.resize_token_emb"):
        load_adapter(other, tmp_path / "adapter")
    assert tiny.snapshot(other) == before


def test_also_where_the_embeddings_are_trained_whole(base, tmp_path):
    model = grown(base, 1)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(FileFormatError, match=r"call model.resize_token_embeddings\(102\) first"):
        load_adapter(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")


def test_embeddings_of_another_base_have_no_home_unless_asked(base, tmp_path):
    model = grown(base, 1)
    model.model.embed_tokens.weight.data[3] += 1
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter")
    other = grown(base, 2)
    with pytest.raises(FileFormatError, match=r"without a home.*embed_tokens\.weight"):
        load_adapter(other, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter", strict=False)
    assert torch.equal(logits(other), logits(model))


def test_where_nothing_tells_that_it_grew_the_fingerprint_knows_the_rows(tmp_path):
    model = in_memory(1)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(in_memory(1), tmp_path / "adapter")
    with pytest.raises(WrongBaseError, match="lm_head.weight has other rows|embed_tokens.weight has other rows"):
        load_adapter(in_memory(2), tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter", save_embedding_layers=True)
    again = in_memory(2)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_the_fingerprint_leaves_out_the_rows_that_the_adapter_trains(tmp_path):
    tokens = {"embed_tokens": [99, 100, 101], "lm_head": [101, 100, 99]}
    model = in_memory(1)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens))
    save_adapter(model, tmp_path / "adapter")
    again = in_memory(2)
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    path = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"trainable_token_indices": {"embed_tokens": [1, 2, 3], "lm_head": [1, 2, 3]}}))
    with pytest.raises(WrongBaseError, match="settings in its configuration"):
        load_adapter(in_memory(1), tmp_path / "adapter")


def test_a_base_that_is_gone_from_disk_is_a_warning(base, tmp_path):
    model = grown(base, 1)
    shutil.rmtree(base)
    inject(model, PLAIN)
    with pytest.warns(UserWarning, match="can't be told whether the vocabulary grew"):
        save_adapter(model, tmp_path / "adapter")


def test_the_hubs_cache_is_where_a_base_of_the_hub_is(base, tmp_path, monkeypatch):
    model = grown(base, 1)
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc"
    shutil.copytree(base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model.name_or_path = model.config._name_or_path = "someone/tiny"
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter")
    assert len(keys(tmp_path / "adapter")) == 2


def test_what_is_cast_is_the_adapter_and_not_the_base(base, tmp_path):
    model = grown(base, 1)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for k, t in tensors.items() if "lora" in k} == {torch.bfloat16}
    assert {t.dtype for k, t in tensors.items() if "lora" not in k} == {torch.float32}
    load_adapter(grown(base, 2), tmp_path / "adapter")


def test_a_packed_head_is_not_stored(base, tmp_path):
    model = grown(base, 1)
    model.lm_head = base_for(DEFAULT).pack(model.lm_head, DEFAULT)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(StateError, match="lm_head is packed.*save_embedding_layers=False"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("folded", [False, True])
def test_it_is_the_bases_rows_that_are_stored_whichever_adapter_is_active_or_folded(base, tmp_path, folded):
    model = grown(base, 1)
    inject(model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=False))
    expected = logits(model)
    inject(model, LoraConfig(r=2, target_modules=["k_proj"]), "other")
    if folded:
        merge_adapter(model, "default")
    else:
        set_adapter(model, "other")
    save_adapter(model, tmp_path / "adapter")
    again = grown(base, 2)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


def test_two_adapters_of_one_base_each_have_their_rows(base, tmp_path):
    models = {}
    for seed, name in enumerate("ab"):
        models[name] = grown(base, seed)
        inject(models[name], PLAIN)
        save_adapter(models[name], tmp_path / name)
    both = grown(base, 7)
    plain = tiny.snapshot(both)
    for name in "ab":
        load_adapter(both, tmp_path / name, name)
    for name in "aba":
        set_adapter(both, name)
        assert torch.equal(logits(both), logits(models[name]))
    with pytest.raises(StateError, match="both own 'model.embed_tokens.weight'|both own 'lm_head.weight'"):
        set_adapter(both, ["a", "b"])
    assert not any(p.requires_grad for p in both.parameters())
    unload(both)
    assert tiny.snapshot(both) == plain


def test_they_are_not_trained_with_an_adapter_that_is(base, tmp_path):
    model = grown(base, 1)
    inject(model, PLAIN)
    save_adapter(model, tmp_path / "adapter")
    again = grown(base, 2).bfloat16()
    with pytest.warns(UserWarning, match="was saved on another base"):
        report = load_adapter(again, tmp_path / "adapter", trainable=True, strict=False)
    assert set(report.kept) == {"model.embed_tokens.weight", "lm_head.weight"} and "embeddings of its own" in str(report)
    assert again.model.embed_tokens.weight.dtype == torch.bfloat16  # as the base's, and not in float32
    assert {name.split(".")[-2] for name, p in again.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
