"""8-bit weights of bitsandbytes (LLM.int8, Dettmers et al., arXiv 2208.07339): made here, or loaded so by transformers.

Each row of a weight is divided by its largest value and rounded to one of 255 steps:

    W[o, :] = C[o, :] S[o] / 127        C: int8, (d_out, d_in);  S: float32, (d_out,), the largest |w| of each row

The paper multiplies in 8 bits too, but for the columns of outliers among the inputs. Here the product is one with exactly W, in
the layer's compute dtype, as with 4-bit weights: what is trained, evaluated and merged is then one model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..maths.loss import is_finite
from .base import Base, Format, PackedLayer
from .bnb import bitsandbytes
from .forwards import change_class


@dataclass(frozen=True)
class Int8Format(Format):
    """8-bit values with a scale for each row: "int8"."""

    def __str__(self) -> str:
        return "int8"

    @classmethod
    def parse(cls, text: str) -> Int8Format | None:
        return cls() if text == "int8" else None


class Int8(Base):
    """Weights that bitsandbytes holds in 8 bits: in layers made here, or in its own, which transformers loads."""

    name, label, library = "int8", "int8", "bitsandbytes"
    Format = Int8Format

    def holds(self, weight: Any) -> bool:
        return isinstance(weight, Tensor) and weight.dtype == torch.int8 and hasattr(weight, "SCB")

    def format_of(self, layer: nn.Module) -> Int8Format:
        return Int8Format()

    def shape_of(self, weight: Tensor) -> torch.Size:
        return weight.shape

    def parts(self, layer: nn.Module) -> list[Tensor]:
        return [layer.weight.data, _scales(layer)]

    def state(self, layer: nn.Module) -> dict[str, Tensor]:
        row_major = torch.tensor(0, dtype=torch.uint8, device=layer.weight.device)
        return {"weight": layer.weight.data, "SCB": _scales(layer), "weight_format": row_major}

    def nbytes(self, weight: Tensor) -> int:
        return weight.nbytes + len(weight) * torch.float32.itemsize

    def dequantizer(self, layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        scales = (_scales(layer) / 127)[:, None]  # d_out 1
        return lambda values: torch.mul(values, scales).to(dtype)

    def dense_dtype(self, layer: nn.Module) -> torch.dtype:
        return getattr(layer, "weight_dtype", torch.float16)  # bitsandbytes packs from float16

    def set_dense_dtype(self, layer: nn.Module, dtype: torch.dtype) -> None:
        layer.weight_dtype = dtype

    def follow(self, layer: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        # torch moves the values and not what bitsandbytes keeps beside them.
        device = layer.weight.device
        for holder in (layer.weight, getattr(layer, "state", None)):
            if getattr(holder, "SCB", None) is not None:
                holder.SCB = holder.SCB.to(device)
            if getattr(holder, "CB", None) is not None:
                holder.CB = layer.weight.data
        super().follow(layer, fn)

    def pack(self, linear: nn.Linear, form: Int8Format, compute_dtype: torch.dtype | None = None) -> nn.Module:
        weight, bias = linear.weight, linear.bias
        layer = linear_8bit_class()(linear.in_features, linear.out_features, bias is not None, False, device="meta")
        layer.weight, layer.bias = _pack(weight.detach()), bias
        layer.weight_dtype, layer.compute_dtype = weight.dtype, compute_dtype or weight.dtype
        return layer.train(linear.training)

    def repack(self, layer: nn.Module, W: Tensor) -> nn.Parameter:
        return _pack(W)

    def quantization_config(self, form: Int8Format, skipped: Sequence[str], compute_dtype: str) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": list(skipped),
        }

    def revive(self, weight: nn.Parameter) -> None:
        if self.holds(weight):
            weight.__class__ = bitsandbytes().nn.Int8Params

    def adopt(self, layer: nn.Module) -> bool:
        if not type(layer).__module__.startswith("bitsandbytes.") or type(layer) is not bitsandbytes().nn.Linear8bitLt:
            return False
        change_class(layer, linear_8bit_class())
        return True

    def release(self, layer: nn.Module) -> None:
        change_class(layer, bitsandbytes().nn.Linear8bitLt)


@functools.cache
def linear_8bit_class() -> type[nn.Linear]:
    """The class of a frozen 8-bit layer: a `bitsandbytes.nn.Linear8bitLt` that multiplies by exactly the dequantised weight."""

    class Linear8bit(PackedLayer, bitsandbytes().nn.Linear8bitLt):
        base = Int8()

    Linear8bit.__qualname__ = "Linear8bit"  # pickle finds it by this name, below
    return Linear8bit


def __getattr__(name: str) -> Any:
    if name == "Linear8bit":
        return linear_8bit_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _pack(W: Tensor) -> nn.Parameter:
    """W, (d_out, d_in), in 8 bits, on its device.

    Raises:
        StateError: it has values beyond those of float16, from which bitsandbytes packs.
    """
    if not is_finite(W.half()):
        raise StateError("a weight has values beyond 65504, the largest of float16, from which 8-bit weights are packed")
    packed = bitsandbytes().nn.Int8Params(W.cpu(), requires_grad=False, has_fp16_weights=False)
    return packed.to(W.device)  # bitsandbytes quantises when the parameter is moved


def _scales(layer: nn.Module) -> Tensor:
    """S, (d_out,), which a forward of bitsandbytes moves from the weight to the layer.

    Raises:
        StateError: it is in neither.
    """
    for holder in (layer.weight, getattr(layer, "state", None)):
        if (scales := getattr(holder, "SCB", None)) is not None:
            return scales
    raise StateError(
        "an 8-bit weight has lost its scales; shard with fully_shard(..., ignored_params=packed_parameters(model))"
    )
