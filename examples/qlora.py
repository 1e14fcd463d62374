"""QLoRA: the frozen base in 4 bits, the adapter in float32. Needs `pip install 'lora-core[nf4]'`.

Example:

    python examples/qlora.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from lora_core import LoraConfig, base_weight_bytes, inject, merge_and_unload, quantize_nf4, trainable_parameters


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 4))
    x = torch.randn(512, 64)
    y = x[:, :4].argmax(1)

    before = base_weight_bytes(model)
    print(quantize_nf4(model, skip=["4"]))  # the head is new: it is trained, and stays as it is
    print(f"base: {before:,} -> {base_weight_bytes(model):,} bytes")
    print(inject(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", modules_to_save=["4"])))

    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=5e-3)
    for step in range(151):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    model.eval()
    adapted = model(x)
    print(merge_and_unload(model))  # dense again: what 4 bits would lose of the update is not lost
    difference = (model(x) - adapted).abs().max().item()
    print(f"merged, it differs by {difference:.1e}")
    assert loss < 0.3 and difference < 1e-3


if __name__ == "__main__":
    main()
