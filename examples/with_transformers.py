"""A model of transformers in your own loop: autocast, accumulated gradients, LoRA+, a checkpoint of the adapter alone.

Needs `pip install 'lora-core[hf]'`.

    python examples/with_transformers.py
"""

import tempfile

import torch
import transformers

from lora_core import LoraConfig, inject, load_adapter, lora_plus_groups, print_trainable_parameters, save_adapter

ACCUMULATE = 2


def pretrained() -> transformers.PreTrainedModel:
    """Stands for `AutoModelForCausalLM.from_pretrained(...)`."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def main() -> None:
    model = pretrained()
    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    print_trainable_parameters(model)

    optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=2e-3, ratio=4))
    rows = torch.arange(8)[:, None] + torch.arange(12)  # each token is the one before it and one
    for step in range(40):
        for ids in rows.chunk(ACCUMULATE):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / ACCUMULATE
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 13 == 0:
            print(f"step {step:2d}  loss {loss.item() * ACCUMULATE:.3f}")

    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)
        again = pretrained()
        load_adapter(again, directory, trainable=True)  # to train on; without it, to be used
    prompt = torch.tensor([[3, 4, 5]])
    found = again.eval().generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    print("3 4 5 ->", *found[0, 3:].tolist())
    assert found[0, 3:].tolist() == [6, 7, 8, 9]


if __name__ == "__main__":
    main()
