"""Rows trained for some tokens (`trainable_token_indices`), against a model whose embeddings were written to."""

import copy
import io

import pytest
import torch
import transformers

from lora_core import (
    LoraConfig,
    combine_adapters,
    count_parameters,
    delete_adapter,
    disable_adapters,
    inject,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    mixed_batch,
    quantize_nf4,
    rename_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge_adapter,
)
from lora_core.errors import AdapterNameError, ConfigError, FileFormatError, StateError, TargetError
from tests.support import tiny

TOKENS = [8, 5, 40]
#: Of logits of up to 30: a few roundings of 2e-6 each.
ROUNDING = 1e-5
IDS = torch.tensor([[5, 8, 9, 40, 3, 5]])


def llama(tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(tie_word_embeddings=tied, **tiny.SMALL)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def with_rows(model, seed=1, tokens=TOKENS, name="default", **settings):
    """The model with an adapter whose rows are random numbers, and these."""
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, **settings), name)
    rows = torch.randn(len(TOKENS), 32, generator=torch.Generator().manual_seed(seed))
    model.model.embed_tokens.lora_tokens[name].data = rows
    return rows


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def written(rows, **kwargs):
    """The base with these rows in its embeddings, and so in its head if that is tied."""
    model = llama(**kwargs)
    model.model.embed_tokens.weight.data[TOKENS] = rows.to(model.dtype)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_computes_what_it_would_with_these_rows_in_its_embeddings(tied):
    model = llama(tied)
    before, plain = tiny.snapshot(model), logits(model)
    rows = with_rows(model)
    expected = logits(written(rows, tied=tied))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)
    with disable_adapters(model):
        assert torch.equal(logits(model), plain)
    merge_adapter(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)
    unmerge_adapter(model)
    unload(model)
    assert tiny.snapshot(model) == before and (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_a_merge_for_good_writes_exactly_these_rows(tied):
    model = llama(tied)
    rows = with_rows(model)
    merge_and_unload(model)
    assert torch.equal(model.model.embed_tokens.weight, written(rows, tied=tied).model.embed_tokens.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_16_bits_rows_are_float32(dtype):
    model = llama(dtype=dtype)
    rows = with_rows(model)
    assert model.model.embed_tokens.lora_tokens["default"].dtype == torch.float32
    found, expected = logits(model), logits(written(rows, dtype=dtype))
    assert found.dtype == expected.dtype == dtype
    # Both round each hidden state and each logit to the dtype; the largest logit is about 10.
    assert (found - expected).abs().max() < 10 * 16 * torch.finfo(dtype).eps


def test_only_these_rows_are_trained_and_nothing_of_the_size_of_the_vocabulary_is_made():
    model = llama()
    before = tiny.snapshot(model)
    rows = with_rows(model).clone()
    (parameter,) = {id(p): p for n, p in model.named_parameters() if "lora_tokens" in n}.values()
    assert sum(p.numel() for p in trainable_parameters(model)) == 2 * 2 * (32 + 32) + 3 * 32
    assert count_parameters(model).adapter == 2 * 2 * (32 + 32) + 3 * 32
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    # The head's own weight is saved for the gradient of x, as without an adapter, and logits for the loss.
    assert sum(shape == (99, 32) for shape in kept) <= 1
    optimizer.step()
    assert not torch.equal(parameter, rows)
    unload(model)
    assert tiny.snapshot(model) == before


def test_gradients_are_those_of_the_rows_in_the_embeddings():
    model = llama()
    oracle = written(with_rows(model))
    for m in (model, oracle):
        m(IDS, labels=IDS).loss.backward()
    grad = model.model.embed_tokens.lora_tokens["default"].grad
    torch.testing.assert_close(grad, oracle.model.embed_tokens.weight.grad[TOKENS], rtol=1e-4, atol=1e-6)


def test_several_adapters_have_rows_of_their_own_and_two_for_one_token_are_refused():
    model = llama()
    first = with_rows(model, 1, name="a")
    second = with_rows(model, 2, name="b")
    with_rows(model, 3, [1, 2, 3], name="c")
    torch.testing.assert_close(logits(model), logits(written(first)), rtol=0, atol=ROUNDING)
    set_adapter(model, "b")
    torch.testing.assert_close(logits(model), logits(written(second)), rtol=0, atol=ROUNDING)
    with pytest.raises(StateError, match=r"'a' and 'b' can't be active together: both train token \d+ of 'model.embed_tokens'"):
        set_adapter(model, ["a", "b"])
    set_adapter(model, ["b", "c"])
    both = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), both, rtol=0, atol=ROUNDING)
    unmerge_adapter(model)
    rename_adapter(model, "b", "d")
    delete_adapter(model, "c")
    torch.testing.assert_close(logits(model), logits(written(second)), rtol=0, atol=ROUNDING)


def test_beside_another_adapter_on_the_same_layers_the_changes_add_up():
    model = llama()
    with_rows(model, name="rows")
    inject(model, LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False), "plain")
    set_adapter(model, ["rows", "plain"])
    together = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), together, rtol=0, atol=5e-6)
    unmerge_adapter(model)
    set_adapter(model, "plain")
    with pytest.raises(StateError, match="'rows' trains tokens"), mixed_batch(model, ["rows"]):
        pass
    alone = logits(model)
    with mixed_batch(model, ["plain"]):
        torch.testing.assert_close(logits(model), alone, rtol=0, atol=ROUNDING)


def test_combining_and_mixing_refuse_them_by_name():
    model = llama()
    with_rows(model)
    with pytest.raises(ConfigError, match="'default' has rows for some tokens"):
        combine_adapters(model, ["default"], [1.0], "new")
    with pytest.raises(StateError, match="'default' trains tokens of 'model.embed_tokens'"), mixed_batch(model, [None]):
        pass


def test_copies_and_pickles_compute_the_same_and_share_the_rows_of_a_tie():
    model = llama()
    with_rows(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), logits(model))
        assert other.lm_head.lora_tokens["default"] is other.model.embed_tokens.lora_tokens["default"]
        assert other.lm_head.lora_tokens["default"] is not model.lm_head.lora_tokens["default"]


def test_on_a_4_bit_base(tmp_path):
    model = llama(False)
    quantize_nf4(model, skip=["lm_head"])
    with_rows(model)
    save_adapter(model, tmp_path)
    again = llama(False)
    quantize_nf4(again, skip=["lm_head"])
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


REFUSED = {
    "no such token": ({"trainable_token_indices": [99]}, r"has 99 rows, and none for the token 99; call model.resize_token"),
    "no such module": ({"trainable_token_indices": {"embed_token": [1]}}, "matched no module; closest: 'embed_tokens'"),
    "no embeddings": ({"trainable_token_indices": {"model.norm": [1]}}, "'model.norm' is a LlamaRMSNorm"),
    "adapted too": ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "carries A and B"),
    "whole too": ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "carries A and B or is trained whole"),
    "tied to one that is adapted": (
        {"trainable_token_indices": [1], "target_modules": ["lm_head"]},
        "'lm_head', which is tied to 'model.embed_tokens', carries A and B",
    ),
    "a tie that can't be kept": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        "'model.embed_tokens' and 'lm_head' are tied and have other tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_is_refused_and_leaves_the_model_as_it_was(case):
    settings, message = REFUSED[case]
    model = llama()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=message):
        inject(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))
    assert tiny.snapshot(model) == before


def test_a_packed_head_and_one_that_another_adapter_has_whole_are_refused():
    model = llama(False)
    quantize_nf4(model)
    with pytest.raises(TargetError, match="dense linear layers"):
        inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"q_proj": [1]}))
    model = llama(False)
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(TargetError, match="trained whole by another adapter"):
        inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]), "rows")


def test_loading_over_an_adapter_of_other_tokens_is_refused(tmp_path):
    model = llama()
    with_rows(model)
    save_adapter(model, tmp_path)
    other = llama()
    with_rows(other, 2)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    third = llama()
    with_rows(third, tokens=[8, 5, 41])
    with pytest.raises(AdapterNameError, match="of other layers or ranks"):
        load_adapter(third, tmp_path)


def test_rows_that_two_names_of_one_tensor_have_otherwise_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = llama()
    with_rows(model)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (key,) = [k for k in tensors if "token_adapter" in k]
    tensors[key.replace("model.embed_tokens", "lm_head")] = tensors[key] + 1
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match="differ, and the model ties them"):
        load_adapter(llama(), tmp_path)


def test_the_rows_of_other_tokens_are_not_saved_under_these(tmp_path):
    """A state dict has the ids of its tokens too, and strict=True finds nothing wrong with others."""
    model, other = llama(), llama()
    with_rows(model)
    with_rows(other, tokens=TOKENS[::-1])
    other.load_state_dict(model.state_dict())
    with pytest.raises(StateError, match="names others: it got the state dict of another adapter"):
        save_adapter(other, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
