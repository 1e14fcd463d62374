"""A tiny Llama in llama.cpp itself: its GGUF file, and the logits that its library gives with an adapter."""

import numpy as np
import pytest
import torch

#: {path in transformers: name in llama.cpp} of what is not in a block, and of one block.
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def need():
    """Skips the test where llama.cpp's library can't be used."""
    bindings = pytest.importorskip(
        "llama_cpp_py_sync._cffi_bindings", reason="llama-cpp-py-sync is not installed", exc_type=ImportError
    )
    try:
        bindings.get_lib()
    except RuntimeError as error:
        pytest.skip(f"llama.cpp's library can't be loaded: {error}")


def write_model(path, model):
    """The GGUF file of an untied Llama without a tokenizer, in float32, as conversion/llama.py of llama.cpp makes it."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("no_vocab")
    for name, W in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner not in OUTER:
            _, _, block, inner = owner.split(".", 3)
            n = {"self_attn.q_proj": heads, "self_attn.k_proj": kv}.get(inner)
            W = W if n is None else W.reshape(n, 2, -1, W.shape[1]).swapaxes(1, 2).reshape(W.shape)
            owner = f"blk.{block}.{INNER[inner]}"
        writer.add_tensor(f"{OUTER.get(owner, owner)}.weight", W.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model_path, tokens, adapter_path=None):
    """Logits at every token, (T, V), by llama.cpp; an adapter that it refuses is a RuntimeError."""
    from llama_cpp_py_sync import Llama

    llama = Llama(str(model_path), n_ctx=64, n_threads=1, type_k="f32", type_v="f32", flash_attn_type=0)
    ffi, lib = llama._ffi, llama._lib
    adapter = None
    if adapter_path is not None:
        adapter = lib.llama_adapter_lora_init(llama._model, str(adapter_path).encode())
        if adapter == ffi.NULL:
            raise RuntimeError(f"llama.cpp refuses {adapter_path}")
        adapters, scales = ffi.new("struct llama_adapter_lora *[]", [adapter]), ffi.new("float[]", [1.0])
        lib.llama_set_adapters_lora(llama._ctx, adapters, 1, scales)
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert lib.llama_decode(llama._ctx, batch) == 0
    size = 4 * llama.n_vocab
    rows = [np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(llama._ctx, i), size), np.float32) for i in range(len(tokens))]
    found = torch.tensor(np.stack(rows))
    lib.llama_batch_free(batch)
    llama.close()
    return found
