"""Small language models, tied and not, whose heads and embeddings adapters may be on."""

import torch
import transformers

from tests.support import tiny

LLAMA = {**tiny.SMALL, "hidden_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}  # bitsandbytes packs 64 in a row
OPT = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
OPT |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64}
#: {name: (model, a projection, its embeddings)}; all have an lm_head.
MODELS = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), "q_proj", "embed_tokens"),
    "llama, tied": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **LLAMA)),
        "q_proj",
        "embed_tokens",
    ),
    "opt, tied": (lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**OPT)), "q_proj", "embed_tokens"),
    "gpt2, tied": (lambda: tiny.build("gpt2"), "c_attn", "wte"),
    "qwen2, tied": (
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(tie_word_embeddings=True, **LLAMA)),
        "q_proj",
        "embed_tokens",
    ),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def names_of(name, parts):
    return [{"head": "lm_head", "embeddings": MODELS[name][2]}[part] for part in parts]


def reloaded(name, directory):
    model, loading = type(build(name)).from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def close(found, expected, relative=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())
