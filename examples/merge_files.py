"""From an adapter's files to a checkpoint for any library, without loading the model; then: is it still the same model?

Needs `pip install 'lora-core[hf]'`.

    python examples/merge_files.py
"""

import tempfile
from pathlib import Path

import torch
import transformers

from lora_core import LoraConfig, Recipe, inject, inspect_adapter, merge_checkpoint, save_adapter, trainable_parameters


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
    ids = torch.arange(12).view(1, -1)
    with tempfile.TemporaryDirectory() as directory:
        base, adapter, merged = (Path(directory, name) for name in ("base", "adapter", "merged"))
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()  # stands for a pretrained one
        model.save_pretrained(base)
        inject(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():  # stands for training
            for parameter in trainable_parameters(model):
                parameter.normal_(std=0.05)
        save_adapter(model, adapter)

        print(inspect_adapter(adapter))
        merge_checkpoint(base, [adapter], merged, Recipe())
        plain = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
        with torch.no_grad():
            difference = (plain(ids).logits - model(ids).logits).abs().max().item()
    print(f"logits of the merged files differ by {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
