"""Several adapters on one base: switch them, use a different one for each row of a batch, make one of two.

Example:

    python examples/many_adapters.py
"""

import torch
from torch import nn

from lora_core import LoraConfig, combine_adapters, disable_adapters, inject, mixed_batch, set_adapter, trainable_parameters


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    for name, r in (("film", 4), ("food", 8)):
        inject(model, LoraConfig(r=r, target_modules=["0", "2"]), name)
        set_adapter(model, name)
        with torch.no_grad():  # stands for training
            for parameter in trainable_parameters(model):
                parameter.normal_(std=0.3)

    x, alone = torch.randn(3, 16), []
    for name in ("film", "food"):
        set_adapter(model, name)
        alone.append(model(x))
    with disable_adapters(model):
        alone.append(model(x))

    with mixed_batch(model, ["film", "food", None]):  # a row each; the last with the base alone
        mixed = model(x)
    for row, expected in enumerate(alone):
        torch.testing.assert_close(mixed[row], expected[row])
    print("each row of the batch is what its own adapter gives")

    print(combine_adapters(model, ["film", "food"], [0.5, 0.5], "both"))
    set_adapter(model, "both")
    print("both:", [round(value, 3) for value in model(x)[0].tolist()])


if __name__ == "__main__":
    main()
