"""LoRA on a model of your own: inject, train, save, load, merge. Nothing but torch is needed.

Example:

    python examples/adapt_your_model.py
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from lora_core import LoraConfig, inject, load_adapter, merge_and_unload, save_adapter, trainable_parameters


def pretrained() -> nn.Module:
    """Stands for yours: any `nn.Module` will do."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def main() -> None:
    torch.manual_seed(1)
    x = torch.randn(256, 20)
    y = (x[:, 0] * x[:, 1] > 0).long()  # the new task

    model = pretrained()
    print(inject(model, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"], modules_to_save=["4"])))

    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for step in range(201):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)  # PEFT's two files
        other = pretrained()
        load_adapter(other, directory)
    merged = merge_and_unload(other)
    print(merged)
    difference = (other(x) - model(x)).abs().max().item()
    print(f"saved, loaded and merged, it differs by {difference:.1e}")
    assert loss < 0.4 and difference < 1e-4


if __name__ == "__main__":
    main()
