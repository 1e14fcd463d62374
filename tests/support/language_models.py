"""Small language models, tied and not, whose heads and embeddings adapters may be on."""

import json

import tokenizers
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


#: A turn each, as chat templates of real models have them.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def small_tokenizer(template=TEMPLATE):
    """A token a byte, and one for each special word."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    tokens.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


def small_llama(directory, template=TEMPLATE, **settings):
    """A directory with a Llama of two layers and width 64, random weights, and a tokenizer of bytes."""
    tokenizer = small_tokenizer(template)
    shape = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    shape |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 256}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | settings)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def questions(path, size=24):
    """A file of `size` rows of either form; the answer to a letter is the letter, doubled."""
    letters = [chr(ord("a") + i % 4) for i in range(size)]
    rows = [
        {"prompt": letter * (1 + i % 3), "completion": letter * 2}
        if i % 2
        else {"messages": [{"role": "user", "content": letter * (1 + i % 3)}, {"role": "assistant", "content": letter * 2}]}
        for i, letter in enumerate(letters)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
