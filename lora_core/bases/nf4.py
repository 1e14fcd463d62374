"""4-bit weights of bitsandbytes: NF4, and FP4 where transformers has loaded it.

NF4 (Dettmers et al., "QLoRA", arXiv 2305.14314, section 3) cuts a weight into blocks of 64 values, divides each block
by its largest value, and stores for each value the index of the nearest of 16 quantiles of a normal distribution.
Double quantisation stores the block scales in 8 bits too, with one float32 for 256 of them:

    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a parameter
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from .base import COMPUTE_DTYPES, Base, Format, PackedLayer
from .bnb import bitsandbytes, loaded_functional
from .forwards import change_class

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NF4Format(Format):
    """4-bit values in blocks: "nf4/64/double" has blocks of 64, and their scales in 8 bits too.

    Attributes:
        block_size: values that share a scale.
        double_quant: whether the scales are in 8 bits.
        quant_type: "nf4", or "fp4", which is read and not made here.

    Raises:
        StateError: there are no blocks of that size.
    """

    block_size: int = 64
    double_quant: bool = True
    quant_type: str = "nf4"

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise StateError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {self.block_size!r}")

    def __str__(self) -> str:
        return f"{self.quant_type}/{self.block_size}{'/double' if self.double_quant else ''}"

    @classmethod
    def parse(cls, text: str) -> NF4Format | None:
        kind, *rest = text.split("/")
        if kind not in ("nf4", "fp4") or not rest or not rest[0].isdecimal() or rest[1:] not in ([], ["double"]):
            return None
        return cls(int(rest[0]), len(rest) == 2, kind) if int(rest[0]) in BLOCK_SIZES else None


class NF4(Base):
    """Weights that bitsandbytes holds in 4 bits: in layers made here, or in its own, which transformers loads."""

    name, label, library = "nf4", "NF4", "bitsandbytes"
    Format = NF4Format

    def holds(self, weight: Any) -> bool:
        return getattr(weight, "quant_state", None) is not None

    def format_of(self, layer: nn.Module) -> NF4Format:
        state = _undo_repacking(layer)
        return NF4Format(state.blocksize, state.nested, state.quant_type)

    def shape_of(self, weight: Tensor) -> torch.Size:
        return weight.quant_state.shape

    def parts(self, layer: nn.Module) -> list[Tensor]:
        state = _undo_repacking(layer)
        return [layer.weight.data, state.absmax]

    def state(self, layer: nn.Module) -> dict[str, Tensor]:
        state = _undo_repacking(layer).as_dict(packed=True)
        return {"weight": layer.weight.data} | {f"weight.{name}": tensor for name, tensor in state.items()}

    def nbytes(self, weight: Tensor) -> int:
        """The format's two lookup tables (16 and 256 constants) are not counted: they do not grow with the weight."""
        state = weight.quant_state
        scales = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
        return weight.nbytes + sum(t.nbytes for t in scales)

    def dequantizer(self, layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        state = _undo_repacking(layer)
        return lambda packed: _unpacked(packed, state).to(dtype)

    def dense_dtype(self, layer: nn.Module) -> torch.dtype:
        state = layer.weight.quant_state
        # Repacking for a CPU says bfloat16 and keeps the true one here; so does `_note_dtype`, where the two differ.
        return getattr(state, "original_dtype", state.dtype)

    def set_dense_dtype(self, layer: nn.Module, dtype: torch.dtype) -> None:
        _note_dtype(layer.weight, dtype)

    def follow(self, layer: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        _undo_repacking(layer)  # else the dtype that it notes would be taken for the one from before
        super().follow(layer, fn)

    def pack(self, linear: nn.Linear, form: NF4Format, compute_dtype: torch.dtype | None = None) -> nn.Module:
        weight, bias = linear.weight, linear.bias
        layer = linear_4bit_class()(
            linear.in_features,
            linear.out_features,
            bias=bias is not None,
            compute_dtype=compute_dtype or weight.dtype,
            compress_statistics=form.double_quant,
            quant_type=form.quant_type,
            device="meta",  # no memory for a weight that is replaced on the next line
        )
        layer.weight, layer.bias = _pack(weight.detach(), form, module=layer), bias
        return layer.train(linear.training)

    def repack(self, layer: nn.Module, W: Tensor) -> nn.Parameter:
        dtype = self.dense_dtype(layer)
        packed = _pack(W.to(_known_dtype(dtype)), self.format_of(layer))
        _note_dtype(packed, dtype)
        return packed

    def packs_stack(self, form: NF4Format, shape: Sequence[int]) -> bool:
        """If no block has values of two matrices, each can be made dense by itself."""
        return math.prod(shape[1:]) % form.block_size == 0

    def pack_stack(self, W: Tensor, form: NF4Format) -> nn.Parameter:
        """As bitsandbytes' `replace_parameter_4bit` packs it."""
        return _pack(W, form)

    def matrix(self, layer: nn.Module, index: int, dtype: torch.dtype) -> Tensor:
        state, functional = _undo_repacking(layer), bitsandbytes().functional
        shape = state.shape[1:]
        size = math.prod(shape)
        packed = layer.weight.data.view(-1)[index * size // 2 :][: size // 2]
        blocks = torch.arange(index * size // state.blocksize, (index + 1) * size // state.blocksize, device=packed.device)
        scales = state.absmax[blocks]
        if state.nested:
            outer = state.state2
            scales = outer.code[scales.int()] * outer.absmax[blocks // outer.blocksize] + state.offset
        one = functional.QuantState(scales, shape, state.code, state.blocksize, state.quant_type, state.dtype)
        return _unpacked(packed[:, None], one).to(dtype)

    def quantization_config(self, form: NF4Format, skipped: Sequence[str], compute_dtype: str) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": form.quant_type,
            "bnb_4bit_use_double_quant": form.double_quant,
            "bnb_4bit_blocksize": form.block_size,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(skipped),
        }

    def revive(self, weight: nn.Parameter) -> None:
        if self.holds(weight):
            weight.__class__ = bitsandbytes().nn.Params4bit

    def adopt(self, layer: nn.Module) -> bool:
        """Besides changing the weight bitsandbytes' forward stops passing gradients on, once it has repacked it."""
        if not type(layer).__module__.startswith("bitsandbytes.") or type(layer) is not bitsandbytes().nn.Linear4bit:
            return False
        change_class(layer, linear_4bit_class())
        return True

    def release(self, layer: nn.Module) -> None:
        change_class(layer, bitsandbytes().nn.Linear4bit)


@functools.cache
def linear_4bit_class() -> type[nn.Linear]:
    """The class of a frozen 4-bit layer: a `bitsandbytes.nn.Linear4bit` with a forward of its own.

    bitsandbytes' own forward repacks the weight for inference on some CPUs, rounding its scales to bfloat16: evaluating
    a model would change it. This one always computes with exactly the dequantised weight.
    """

    class Linear4bit(PackedLayer, bitsandbytes().nn.Linear4bit):
        base = NF4()

    Linear4bit.__qualname__ = "Linear4bit"  # pickle finds it by this name, below
    return Linear4bit


def __getattr__(name: str) -> Any:
    if name == "Linear4bit":
        return linear_4bit_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _pack(W: Tensor, form: NF4Format, module: nn.Module | None = None) -> nn.Parameter:
    """W, (d_out, d_in), in 4 bits, on its device."""
    packed = bitsandbytes().nn.Params4bit(
        W,
        requires_grad=False,
        blocksize=form.block_size,
        compress_statistics=form.double_quant,
        quant_type=form.quant_type,
        module=module,
    )
    return packed.to(W.device)  # bitsandbytes quantises when the parameter is moved


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """The dense weight, in the dtype that the state says.

    On CPUs with AVX512 bitsandbytes 0.50 takes the wrong scales where a row has a multiple of 16 values and no whole number of
    blocks. As one row all is right.
    """
    functional, shape = loaded_functional(), state.shape
    if shape[-1] % state.blocksize:
        flat = torch.Size([math.prod(shape)])
        parts = state.absmax, flat, state.code, state.blocksize, state.quant_type, state.dtype, state.offset, state.state2
        state = functional.QuantState(*parts)
    return functional.dequantize_4bit(packed, state).view(shape)


def _note_dtype(weight: nn.Parameter, dtype: torch.dtype) -> None:
    weight.quant_state.dtype, weight.quant_state.original_dtype = _known_dtype(dtype), dtype


def _known_dtype(dtype: torch.dtype) -> torch.dtype:
    """What bitsandbytes packs from and unpacks to for a dense weight of `dtype`."""
    return dtype if dtype in COMPUTE_DTYPES else torch.float32


def _undo_repacking(layer: nn.Module) -> Any:
    """The layer's quantisation state, with its weight packed as it was before a forward of bitsandbytes in eval mode."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        message = "a 4-bit weight has lost its scales; shard with fully_shard(..., ignored_params=packed_parameters(model))"
        raise StateError(message)
    if getattr(state, "packing_format_for_cpu", False):  # see `linear_4bit_class`
        functional, scales = bitsandbytes().functional, state.absmax
        layer.weight.data, state = functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
        if state.absmax is scales:  # without double quantisation it leaves them transposed, in bfloat16
            state.absmax = scales.t().reshape(-1).float()
    return state
