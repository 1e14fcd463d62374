"""4-bit NF4 weights: pack, dequantise, multiply, count bytes. The only file that touches bitsandbytes.

NF4 (Dettmers et al., "QLoRA", arXiv 2305.14314, section 3) cuts a weight into blocks of 64 values, divides each block
by its largest magnitude, and stores for each value the index of the nearest of 16 quantiles of a normal distribution.
Double quantisation stores the block scales in 8 bits too, with one float32 for 256 of them:

    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a parameter

A layer's weight stays packed; it is dequantised for each product, in the forward and again in the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cpu.products import frozen_linear
from ..errors import MissingDependencyError, QuantizationError
from ..maths.lora import autocast_dtype
from .forwards import change_class

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def to_4bit(linear: nn.Linear, compute_dtype: torch.dtype | None, double_quant: bool, block_size: int) -> nn.Module:
    """A 4-bit layer in the place of `linear`, on its device; compute_dtype None: the weight's."""
    weight, bias = linear.weight, linear.bias
    layer = linear_4bit_class()(
        linear.in_features,
        linear.out_features,
        bias=bias is not None,
        compute_dtype=compute_dtype or weight.dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",  # no memory for a weight that is replaced on the next line
    )
    packed = bitsandbytes().nn.Params4bit(
        weight.detach(),
        requires_grad=False,
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = packed.to(weight.device)  # bitsandbytes quantises when the parameter is moved
    layer.bias = bias
    return layer.train(linear.training)


# --- one layer ------------------------------------------------------------------------------------------------------


@functools.cache
def bitsandbytes() -> Any:
    """The bitsandbytes library, imported when 4-bit weights are first asked for."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingDependencyError(f"4-bit weights need bitsandbytes ({error}); pip install bitsandbytes") from None
    return bnb


@functools.cache
def linear_4bit_class() -> type[nn.Linear]:
    """The class of a frozen NF4 layer: a `bitsandbytes.nn.Linear4bit` with a forward of its own.

    bitsandbytes' own forward repacks the weight for inference on some CPUs, rounding its scales to bfloat16: evaluating
    a model would change it. This one always computes with exactly the dequantised weight.
    """

    class Linear4bit(bitsandbytes().nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:  # ... d_in -> ... d_out
            return frozen_forward(self, x, self.bias)

        def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
            return follow_cast(super()._apply(fn, recurse), fn)

    Linear4bit.__qualname__ = "Linear4bit"  # pickle finds it by this name, below
    return Linear4bit


def __getattr__(name: str) -> Any:
    if name == "Linear4bit":
        return linear_4bit_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def follow_cast(layer: nn.Module, fn: Callable[[Tensor], Tensor]) -> nn.Module:
    """Notes on a 4-bit layer that the model around it was cast by `fn`, as `nn.Module.half` does; returns the layer."""
    if is_quantized(layer):
        _undo_repacking(layer)  # else the dtype that it notes would be taken for the one from before
        set_dense_dtype(layer.weight, fn(torch.empty(0, dtype=dense_dtype(layer), device=layer.weight.device)).dtype)
    return layer


def set_dense_dtype(weight: nn.Parameter, dtype: torch.dtype) -> None:
    """Makes a 4-bit weight one that becomes `dtype` when it is dense."""
    weight.quant_state.dtype, weight.quant_state.original_dtype = _known_dtype(dtype), dtype


def _known_dtype(dtype: torch.dtype) -> torch.dtype:
    """What bitsandbytes packs from and unpacks to for a dense weight of `dtype`."""
    return dtype if dtype in COMPUTE_DTYPES else torch.float32


def frozen_forward(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, (..., d_out), with the dequantised weight W of a 4-bit layer."""
    dtype, result_dtype = compute_dtypes(layer, x)
    y = frozen_linear(x, layer.weight, bias, dequantizer(layer, dtype), dtype)
    return y.to(result_dtype)


def replace_forward(model: nn.Module) -> list[nn.Module]:
    """Gives bitsandbytes' own 4-bit layers in `model` the forward of `linear_4bit_class`; returns them.

    Besides changing the weight their forward stops passing gradients on, in training too, once it has repacked it.
    """
    layers = [m for m in model.modules() if is_quantized(m) and type(m).__module__.startswith("bitsandbytes.")]
    layers = [m for m in layers if type(m) is bitsandbytes().nn.Linear4bit]
    for layer in layers:
        change_class(layer, linear_4bit_class())
    return layers


def restore_forward(layers: Sequence[nn.Module]) -> None:
    """The reverse of `replace_forward`."""
    for layer in layers:
        change_class(layer, bitsandbytes().nn.Linear4bit)


def compute_dtypes(layer: nn.Module, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What a 4-bit layer computes in and what it returns, given x: autocast's dtype for both if that is on; else the
    layer's compute dtype (that of x if it has none), and the dtype of x.

    Raises:
        QuantizationError: x holds no floating-point numbers.
    """
    if not x.is_floating_point():
        raise QuantizationError(
            f"a 4-bit layer got an input of {x.dtype}: the model casts it to the dtype of the layer's weight, which is packed; "
            "name the layer in quantize_nf4's skip"
        )
    if torch.is_autocast_enabled(x.device.type):
        return (autocast_dtype(x),) * 2
    return layer.compute_dtype or x.dtype, x.dtype


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a 4-bit layer of bitsandbytes: ours, or one that transformers loaded."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def dequantizer(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function from the layer's packed weight to the dense one: (d_out, d_in), of `dtype`, a new tensor."""
    state = _undo_repacking(layer)
    return lambda packed: bitsandbytes().functional.dequantize_4bit(packed, state).to(dtype)


def _undo_repacking(layer: nn.Module) -> Any:
    """The layer's quantisation state, with its weight packed as it was before a forward of bitsandbytes in eval mode."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        message = "a 4-bit weight has lost its scales; shard with fully_shard(..., ignored_params=packed_parameters(model))"
        raise QuantizationError(message)
    if getattr(state, "packing_format_for_cpu", False):  # see `linear_4bit_class`
        functional, scales = bitsandbytes().functional, state.absmax
        layer.weight.data, state = functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
        if state.absmax is scales:  # without double quantisation it leaves them transposed, in bfloat16
            state.absmax = scales.t().reshape(-1).float()
    return state


def packed_form(layer: nn.Module) -> tuple[str, torch.Size, list[Tensor]]:
    """(format, shape of the dense weight, [packed values, block scales]) of a 4-bit layer."""
    state = _undo_repacking(layer)
    form = f"{state.quant_type}/{state.blocksize}{'/double' if state.nested else ''}"
    return form, state.shape, [layer.weight.data, state.absmax]


def packed_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """{"weight": packed values, "weight.absmax": ...}: what a file holds for a 4-bit layer, by transformers' names."""
    state = _undo_repacking(layer).as_dict(packed=True)
    return {"weight": layer.weight.data} | {f"weight.{name}": tensor for name, tensor in state.items()}


def repack(layer: nn.Module, W: Tensor) -> nn.Parameter:
    """W, (d_out, d_in), packed as the weight of the 4-bit `layer` is: a parameter for it. The layer is left alone."""
    state, dtype = layer.weight.quant_state, dense_dtype(layer)
    packed = bitsandbytes().nn.Params4bit(
        W.to(_known_dtype(dtype)),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
    )
    packed = packed.to(W.device)
    set_dense_dtype(packed, dtype)
    return packed


def dense_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a 4-bit layer's weight had before it was packed, or that the model around it was cast to since."""
    state = layer.weight.quant_state
    # Repacking for a CPU says bfloat16 and keeps the true one here; so does `set_dense_dtype`, where the two differ.
    return getattr(state, "original_dtype", state.dtype)


def dequantize(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight that a 4-bit layer computes with: (d_out, d_in), a new tensor."""
    return dequantizer(layer, dtype)(layer.weight.detach())


def to_dense(layer: nn.Module) -> nn.Linear:
    """A plain `nn.Linear` with the weight that a 4-bit layer computes with, in the dtype it had before it was packed.

    `layer` may be one whose weight is dense already, a merged one: then the new layer shares it.
    """
    weight = layer.weight
    if is_quantized(layer):
        weight = nn.Parameter(dequantize(layer, dense_dtype(layer)), requires_grad=False)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight, linear.bias = weight, layer.bias
    if linear.bias is not None:
        linear.bias.data = linear.bias.data.to(weight.dtype)  # bitsandbytes' forward casts it to the compute dtype
    return linear.train(layer.training)


def parameter_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter holds: of a 4-bit one the packed values and their scales.

    The format's two lookup tables (16 and 256 constants) are not counted: they do not grow with the weight.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.nbytes
    scales = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
    return parameter.nbytes + sum(t.nbytes for t in scales)
