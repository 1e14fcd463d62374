"""Checkpoints and adapters made of random numbers, straight into files: no model is built, whatever their size."""

import json

import torch

from lora_core.files.disk import to_safetensors
from lora_core.files.shards import Entry, new_directory, write_index, write_shard

#: The shape of TinyLlama 1.1B.
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
#: The same architecture, 0.1 MB.
LLAMA_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(shape):
    """{name: shape} of the tensors of a Llama, in the order of transformers."""
    d, inner, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"]
    kv *= d // shape["num_attention_heads"]
    found = {"model.embed_tokens.weight": (shape["vocab_size"], d)}
    for i in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows, columns in (("q", d, d), ("k", kv, d), ("v", kv, d), ("o", d, d)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, columns)
        for name, rows, columns in (("gate", inner, d), ("up", inner, d), ("down", d, inner)):
            found[f"{layer}.mlp.{name}_proj.weight"] = (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (d,)
    return found | {"model.norm.weight": (d,), "lm_head.weight": (shape["vocab_size"], d)}


def llama(directory, shape=LLAMA_TINY, dtype=torch.bfloat16, shards=4, seed=0):
    """Writes a sharded checkpoint of random weights."""
    directory.mkdir(parents=True)
    names = shapes(shape)
    generator = torch.Generator().manual_seed(seed)

    def make(size):
        return lambda: (torch.randn(size, generator=generator) * 0.02 if len(size) > 1 else torch.ones(size)).to(dtype)

    entries = {name: Entry(dtype, size, make(size)) for name, size in names.items()}
    total, done, places = sum(e.nbytes for e in entries.values()), 0, {}
    for name, entry in entries.items():
        places[name] = f"model-{min(done * shards // total, shards - 1) + 1:05}-of-{shards:05}.safetensors"
        done += entry.nbytes
    for file in dict.fromkeys(places.values()):
        write_shard(directory / file, {name: entries[name] for name, place in places.items() if place == file})
    if shards > 1:
        write_index(directory, places, total)
    else:
        next(directory.iterdir()).rename(directory / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **shape}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return directory


def adapter(directory, shape=LLAMA_TINY, r=16, targets=PROJECTIONS, seed=1, **fields):
    """Writes a LoRA adapter with random A and B for `llama` of the same shape, in PEFT's format."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d_out, *rest) in shapes(shape).items():
        path = name.removesuffix(".weight")
        if path.endswith(tuple(f".{target}" for target in targets)):
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, *rest, generator=generator) * 0.02
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(d_out, r, generator=generator) * 0.02
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "target_modules": list(targets)}
    (directory / "adapter_model.safetensors").write_bytes(to_safetensors(tensors, {"format": "pt"}))
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))
    return directory


def copy_files(source, target):
    """Copies the files of a directory, synced as a merge's are."""
    with new_directory(target) as directory:
        for path in source.iterdir():
            with open(path, "rb") as before, open(directory / path.name, "wb") as after:
                while chunk := before.read(8 * 2**20):
                    after.write(chunk)
