"""Merging over files where the names of a model's tensors don't tell what they are: transformers is asked."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_core import LoraConfig, inject, quantize_nf4, save_adapter
from lora_core.deploy.recipe import Recipe, choices
from lora_core.deploy.stream import merge_checkpoint
from lora_core.errors import WrongBaseError
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*trains it apart:UserWarning")

WIDE = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MODERN = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
CTRL = {"vocab_size": 99, "n_embd": 64, "dff": 64, "n_layer": 1, "n_head": 2}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
#: {class: (its configuration, a projection, its embeddings, its head)}, tied, with names that no list has.
TIED = {
    "ModernBertForMaskedLM": (
        transformers.ModernBertConfig(**WIDE, **MODERN), "Wqkv", "model.embeddings.tok_embeddings", "decoder"
    ),
    "CTRLLMHeadModel": (transformers.CTRLConfig(**CTRL), "Wq", "transformer.w", "lm_head"),
    "BioGptForCausalLM": (transformers.BioGptConfig(**WIDE), "q_proj", "biogpt.embed_tokens", "output_projection"),
    "T5ForConditionalGeneration": (transformers.T5Config(**T5), "q", "shared", "lm_head"),
}  # fmt: skip
IDS = torch.arange(5, 17).view(2, 6)


def build(name):
    torch.manual_seed(0)
    return getattr(transformers, name)(TIED[name][0]).eval()


@torch.no_grad()
def logits(model):
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    return model.eval()(**inputs).logits


def trained(model, directory, **settings):
    """An adapter on `model` whose update is large, in a directory; the logits with it."""
    inject(model, LoraConfig(r=2, **settings))
    save_adapter(tiny.randomize(model), directory)
    return logits(model)


def reloaded(name, directory):
    model, loading = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model


def close(found, expected, relative=1e-5):  # float32 sums in another order
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("part", ["adapter on the embeddings", "adapter on the head", "embeddings whole", "head whole"])
@pytest.mark.parametrize("name", TIED)
def test_ties_are_known_whatever_the_names(name, part, tmp_path):
    _, projection, embeddings, head = TIED[name]
    if name == "BioGptForCausalLM" and part == "adapter on the embeddings":
        pytest.skip("scaled embeddings, with a forward of their own")
    build(name).save_pretrained(tmp_path / "base")
    path = embeddings if "embeddings" in part else head
    targets, whole = ([projection, path], None) if part.startswith("adapter") else ([projection], [path])
    expected = trained(build(name), tmp_path / "adapter", target_modules=targets, modules_to_save=whole)
    assert (expected - logits(build(name))).abs().max() > 0.1 * expected.abs().max()
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    close(logits(reloaded(name, tmp_path / "merged")), expected)


@pytest.mark.parametrize("base_as", choices(["nf4"]))
@pytest.mark.parametrize("name", [name for name in TIED if name != "CTRLLMHeadModel"])
def test_only_what_transformers_loads_in_4_bits_is_packed(name, base_as, tmp_path):
    """T5 computes in the dtype of its `wo`, which stays in float32."""
    build(name).save_pretrained(tmp_path / "base")
    model = build(name)
    quantize_nf4(model)
    expected = trained(model, tmp_path / "adapter", target_modules=[TIED[name][1]])
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", Recipe(base_as=base_as))
    merged = reloaded(name, tmp_path / "merged")
    packed = {path for path, module in merged.named_modules() if type(module).__name__ == "Linear4bit"}
    assert packed == set(report.requantized) and bool(packed) == (base_as == "nf4")
    # Into other weights the model differs by what 4 bits move a weight by, about a tenth; with `wo` in uint8 it was 1.2.
    close(logits(merged), expected, 1e-5 if base_as == "nf4-dequantized" else 0.3)


def test_embeddings_of_any_name_stay_dense(tmp_path):
    """CTRL calls them `w`, a matrix by name; bitsandbytes would pack it, and transformers not load it."""
    build("CTRLLMHeadModel").save_pretrained(tmp_path / "base")
    model = build("CTRLLMHeadModel")
    quantize_nf4(model)
    trained(model, tmp_path / "adapter", target_modules=["Wq"])
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", Recipe(base_as="nf4"))
    assert "transformer.w" not in report.requantized and "transformer.h.0.multi_head_attention.Wq" in report.requantized
    stored = load_file(tmp_path / "merged" / "model.safetensors")["transformer.w.weight"]
    assert torch.equal(stored, build("CTRLLMHeadModel").transformer.w.weight)
    logits(reloaded("CTRLLMHeadModel", tmp_path / "merged"))


def test_a_head_that_has_another_name_in_the_files_is_refused(tmp_path):
    """GPT-NeoX: `embed_out` there, `lm_head` in memory. Both in one file, and transformers takes the base's."""
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE)).eval()
    model.save_pretrained(tmp_path / "base")
    if "embed_out.weight" not in load_file(tmp_path / "base" / "model.safetensors"):
        pytest.skip("this version of transformers has one name for it")
    trained(model, tmp_path / "adapter", target_modules=["query_key_value"], modules_to_save=["lm_head"])
    with pytest.raises(WrongBaseError, match=r"no 'lm_head.weight', which the adapter trained .* such as 'embed_out.weight'"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
