"""What golden files say of tensors, files and refusals, in forms that are small and the same on every machine.

Tensors are filled with multiples of 1/64 below 1/2, which every dtype holds exactly. So what is stored is the same to the
byte everywhere, and only what kernels compute from it needs a tolerance.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_core import LoraError

FILES = ("adapter_config.json", "adapter_model.safetensors")


def pattern(shape: Iterable[int], shift: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values (7 i^2 + 3 i + 11 shift mod 61 - 30) / 64 of index i: every 61 in a row have the same extremes."""
    shape = tuple(shape)
    i = torch.arange(torch.Size(shape).numel())
    return (((7 * i * i + 3 * i + 11 * shift) % 61 - 30) / 64).view(shape).to(dtype)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor]) -> None:
    """Gives each tensor values of its own; what scales (norms, magnitudes) is near one."""
    for shift, (key, tensor) in enumerate(sorted(tensors.items())):
        scales = tensor.dim() == 1 and not key.endswith("bias") and "lora_bias" not in key
        tensor.copy_(pattern(tensor.shape, shift) + int(scales))


def fill_trained(model: nn.Module) -> None:
    fill({path: p for path, p in model.named_parameters() if p.requires_grad})


def layout(tensors: Mapping[str, Tensor]) -> str:
    """Sorted keys with dtype and shape, in one line."""
    lines = (f"{key} {str(t.dtype).removeprefix('torch.')} {'x'.join(map(str, t.shape))}" for key, t in tensors.items())
    return "; ".join(line.rstrip() for line in sorted(lines))


def numbers(tensor: Tensor, digits: int = 6) -> list[float]:
    """Norm, and a weighted sum that depends on the order of the values, rounded to so many significant digits."""
    values = tensor.detach().double().flatten()
    return [float(f"{v.item():.{digits}g}") for v in (values.norm(), values @ pattern(values.shape, 5, torch.float64))]


def gradients(model: nn.Module, output: Tensor, digits: int = 6) -> dict[str, list[float]]:
    """{path: numbers} of the gradients of a weighted sum of `output`, for every parameter that is trained."""
    model.zero_grad()
    (output * pattern(output.shape, 9, output.dtype)).sum().backward()
    trained = {path: p.grad for path, p in model.named_parameters() if p.requires_grad}
    return {path: numbers(gradient, digits) if gradient is not None else [] for path, gradient in trained.items()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def files(directory: Path, exact: bool = True) -> dict[str, str]:
    """What an adapter's files hold: the tensors, and hashes of the files; of the weights' metadata if they are not `exact`."""
    config, weights = (directory / name for name in FILES)
    with safe_open(weights, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        metadata = json.dumps(file.metadata(), sort_keys=True)
    found = {"tensors": layout(tensors), "config": digest(config.read_bytes())}
    return found | ({"weights": digest(weights.read_bytes())} if exact else {"metadata": digest(metadata.encode())})


def outcome(action: Callable[[], Any]) -> Any:
    """What the action returns, or which error of the package it raises; warnings are not its concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action()
        except LoraError as error:
            return f"refused: {type(error).__name__}"
