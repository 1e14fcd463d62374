"""The linear layers of a model, packed in place.

Example:

    report = quantize_nf4(model, skip=["classifier"])     # then inject(...): QLoRA
    report = quantize(model, form, skip=["classifier"])   # in any format that a base has: see `bases/`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..bases import base_for, is_packed, weight_bytes
from ..bases.base import COMPUTE_DTYPES, Format
from ..bases.int8 import Int8Format
from ..bases.nf4 import NF4Format
from ..errors import StateError
from ..layers.kinds import packs
from ..spec.targets import is_head, match_patterns
from .atomic import all_or_nothing
from .conventions import kept_in_float32, output_layer


@dataclass(frozen=True)
class QuantizationReport:
    """What quantising did.

    Attributes:
        layers: paths of the layers that are now packed.
        skipped: paths of the linear layers that were left as they are.
        parameters: number of weights quantised.
        bytes_before, bytes_after: bytes of those weights, before and after, quantisation constants included.
        label: what the format is called.
    """

    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    parameters: int
    bytes_before: int
    bytes_after: int
    label: str = "NF4"

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes_after / self.parameters

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        return (
            f"{len(self.layers)} layers to {self.label}: {before:.1f} -> {after:.1f} MiB, "
            f"{self.bits_per_parameter:.3f} bits a parameter; {len(self.skipped)} linear layers left as they are"
        )


def quantize_nf4(
    model: nn.Module,
    skip: Sequence[str] = (),
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    block_size: int = 64,
) -> QuantizationReport:
    """Replaces the linear layers of `model` by 4-bit ones, in place, on whatever device they are (CPU or CUDA): see `quantize`.

    Args:
        model: any module.
        skip: names to leave dense.
        compute_dtype: dtype that the products are computed in; None: that of the weight before.
        double_quant: store the block scales in 8 bits too.
        block_size: values that share a scale: 64, 128, 256, ..., 4096.
    """
    return quantize(model, NF4Format(block_size, double_quant), skip, compute_dtype=compute_dtype)


def quantize_int8(
    model: nn.Module, skip: Sequence[str] = (), *, compute_dtype: torch.dtype | None = None
) -> QuantizationReport:
    """Replaces the linear layers of `model` by 8-bit ones (LLM.int8), in place: see `quantize`.

    Args:
        model: any module.
        skip: names to leave dense.
        compute_dtype: dtype that the products are computed in; None: that of the weight before.
    """
    return quantize(model, Int8Format(), skip, compute_dtype=compute_dtype)


@all_or_nothing
def quantize(
    model: nn.Module, form: Format, skip: Sequence[str] = (), *, compute_dtype: torch.dtype | None = None
) -> QuantizationReport:
    """Replaces the linear layers of `model` by ones whose weight is packed, in place.

    Left as they are: layers that `skip` names; heads (HEAD_NAMES), which are usually new; what transformers keeps in float32
    (T5's `wo`); layers that carry an adapter or are trained whole; layers whose weight is empty, or computed from others
    (pruned, say); and, once anything in the model has been frozen, every layer whose weight is not. (In a model as loaded
    everything still requires gradients, so there the flag says nothing.)

    Args:
        model: any module; candidates are its layers of type `nn.Linear`, and of subclasses that compute the same.
        form: how to pack.
        skip: names to leave dense: a whole path or the end of one, after a dot. Name newly initialised layers here.
        compute_dtype: dtype that the products are computed in; None: that of the weight before.

    Returns:
        A report of layers and bytes.

    Raises:
        TargetError: a name in `skip` matches nothing.
        StateError: nothing is left to quantise, a setting or a weight's dtype is not supported, or a weight has NaN or
            infinite values, which would spread over others. The model is as it was.
        MissingDependencyError: the library that the format needs is not installed.
    """
    if not isinstance(form, Format) or not base_for(form).packed:
        raise StateError(f"form must be the format of a base that packs weights, such as NF4Format(), not {form!r}")
    base = base_for(form)
    if compute_dtype not in (None, *COMPUTE_DTYPES):
        raise StateError(f"compute_dtype must be float32, bfloat16 or float16, not {compute_dtype}")
    if isinstance(skip, str):
        raise StateError(f"skip must be a list of names, not the string {skip!r}; pass [{skip!r}]")

    modules = dict(model.named_modules(remove_duplicate=False))
    named = set().union(*match_patterns("skip", skip, list(modules)).values())
    freezing = any(not p.requires_grad for p in model.parameters())
    head, wide = output_layer(model), kept_in_float32(model)
    chosen, left = {}, []
    for path, module in modules.items():
        if not isinstance(module, nn.Linear) or is_packed(module):
            continue
        trained = freezing and module.weight.requires_grad
        plain = packs(module)
        empty = plain and not module.weight.numel()
        apart = module is head or is_head(path) or path in wide or _named(path, named)
        if not plain or empty or apart or trained:
            left.append(path)
        elif module.weight.dtype not in COMPUTE_DTYPES or module.weight.is_meta:
            kind = "meta device" if module.weight.is_meta else str(module.weight.dtype)
            raise StateError(f"{path}: can't quantise a weight of {kind}; load it as float32, bfloat16 or float16")
        elif not torch.stack(module.weight.detach().aminmax()).isfinite().all():
            raise StateError(f"{path} has NaN or infinite weights; nothing was quantised")
        else:
            chosen[path] = module
    if not chosen:
        raise StateError("found no dense nn.Linear layer to quantise: all are packed already, skipped or trained")

    before = sum(m.weight.nbytes for m in set(chosen.values()))
    quantized: dict[nn.Module, nn.Module] = {}  # a layer used under two paths stays one layer
    for path, module in chosen.items():
        if module not in quantized:
            quantized[module] = base.pack(module, form, compute_dtype)
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, quantized[module])
    return QuantizationReport(
        layers=tuple(chosen),
        skipped=tuple(left),
        parameters=sum(m.in_features * m.out_features for m in quantized.values()),
        bytes_before=before,
        bytes_after=sum(weight_bytes(m.weight) for m in quantized.values()),
        label=base.label,
    )


def _named(path: str, names: set[str]) -> bool:
    """Whether `path` is one of `names` or inside one."""
    return any(path == n or path.startswith(f"{n}.") for n in names)
