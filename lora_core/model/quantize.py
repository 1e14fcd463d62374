"""The linear layers and the fused experts of a model, packed in place.

Example:

    report = quantize_nf4(model, skip=["classifier"])     # then inject(...): QLoRA
    report = quantize(model, form, skip=["classifier"])   # in any format that a base has: see `bases/`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..bases import base_for, base_of_weight, is_packed, weight_bytes, weight_shape
from ..bases.base import COMPUTE_DTYPES, Base, Format
from ..bases.int8 import Int8Format
from ..bases.nf4 import NF4Format
from ..errors import StateError
from ..layers import LoraLayer
from ..layers.experts import LoraHost
from ..layers.kinds import packs
from ..layers.packed import pack_parameters
from ..progress import watched
from ..spec.targets import EXPERTS, is_head, match_patterns
from .atomic import all_or_nothing
from .conventions import kept_in_float32, output_layer
from .left_out import is_stack


@dataclass(frozen=True)
class QuantizationReport:
    """What quantising did.

    Attributes:
        layers: paths of the layers that are now packed, and of the parameters that hold experts.
        skipped: paths of the linear layers that were left as they are.
        dense: {path of a parameter with several matrices that was left as it is: why}.
        bytes_dense: bytes of those.
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
    dense: Mapping[str, str] = field(default_factory=dict)
    bytes_dense: int = 0

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes_after / self.parameters

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        path, why = next(iter(self.dense.items()), ("", ""))
        size = f"{self.bytes_dense / 2**20:.1f} MiB"
        dense = f"; {len(self.dense)} parameters with several matrices left dense, {size}: {path} ({why})" if path else ""
        return (
            f"{len(self.layers)} layers to {self.label}: {before:.1f} -> {after:.1f} MiB, "
            f"{self.bits_per_parameter:.3f} bits a parameter; {len(self.skipped)} linear layers left as they are{dense}"
        )


def quantize_nf4(
    model: nn.Module,
    skip: Sequence[str] = (),
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    block_size: int = 64,
) -> QuantizationReport:
    """Packs the linear layers and the fused experts of `model` in 4 bits, in place, on whatever device they are (CPU or CUDA).

    See `quantize`.

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
    """Replaces the linear layers of `model` by 8-bit ones (LLM.int8), in place; fused experts stay dense. See `quantize`.

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
    """Replaces the linear layers of `model` by ones whose weight is packed, and packs its fused experts, in place.

    Experts are parameters of three dimensions with the names that transformers gives them (`spec/targets.py`); their module
    keeps its forward. Only NF4 has a form for them.

    Left as they are: layers that `skip` names; heads (HEAD_NAMES), which are usually new; what transformers keeps in float32
    (T5's `wo`); layers that carry an adapter or are trained whole; layers whose weight is empty, or computed from others
    (pruned, say); and, once anything in the model has been frozen, every layer whose weight is not. (In a model as loaded
    everything still requires gradients, so there the flag says nothing.)

    Args:
        model: any module; candidates are its layers of type `nn.Linear`, and of subclasses that compute the same, and experts.
        form: how to pack.
        skip: names to leave dense: a whole path or the end of one, after a dot. Name newly initialised layers here; "experts"
            leaves those.
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
    several = {path: place for path, place in stacks(modules).items() if not base_of_weight(_parameter(place)).packed}
    named = set().union(*match_patterns("skip", skip, [*modules, *several]).values())
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
        else:
            _check_weight(path, module.weight)
            chosen[path] = module
    dense: dict[str, str] = {}
    for path, (host, name) in several.items():
        parameter = host._parameters[name]
        apart = path in wide or path.rpartition(".")[0] in wide or _named(path, named)
        why = "trained" if freezing and parameter.requires_grad else "skipped" if apart else _why_dense(host, name, base, form)
        if why:
            dense[path] = why
        else:
            _check_weight(path, parameter)
    packed = {path: place for path, place in several.items() if path not in dense}
    if not chosen and not packed:
        raise StateError("found no dense nn.Linear layer to quantise: all are packed already, skipped or trained")

    experts = {(id(host), name): (host, name) for host, name in packed.values()}.values()
    before = sum(m.weight.nbytes for m in set(chosen.values())) + sum(_parameter(place).nbytes for place in experts)
    quantized: dict[nn.Module, nn.Module] = {}  # a layer used under two paths stays one layer
    for path, module in watched(chosen.items(), f"packing layers in {base.label}"):
        if module not in quantized:
            quantized[module] = base.pack(module, form, compute_dtype)
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, quantized[module])
    for host, name in watched(experts, f"packing experts in {base.label}"):
        pack_parameters(host, [name], base, form, compute_dtype)
    weights = [*(m.weight for m in quantized.values()), *map(_parameter, experts)]
    return QuantizationReport(
        layers=(*chosen, *packed),
        skipped=tuple(left),
        parameters=sum(weight_shape(w).numel() for w in weights),
        bytes_before=before,
        bytes_after=sum(map(weight_bytes, weights)),
        label=base.label,
        dense=dense,
        bytes_dense=sum(_parameter(several[path]).nbytes for path in dense),
    )


def stacks(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """{path of a parameter that is several matrices: its module and its name there}."""
    return {
        f"{path}.{name}".lstrip("."): (module, name)
        for path, module in modules.items()
        if not isinstance(module, (nn.modules.conv._ConvNd, LoraLayer))
        for name, parameter in module._parameters.items()
        if not is_lazy(parameter) and is_stack(parameter) and parameter.numel()
    }


def _parameter(place: tuple[nn.Module, str]) -> nn.Parameter:
    host, name = place
    return host._parameters[name]


def _why_dense(host: nn.Module, name: str, base: Base, form: Format) -> str:
    """Why a parameter with several matrices can't be packed; "" if it can."""
    if name not in EXPERTS:
        return "not known to be experts"
    if isinstance(host, LoraHost):
        return "it carries an adapter"
    if is_parametrized(host):
        return "parametrised"
    if not base.packs_stack(form, host._parameters[name].shape):
        return f"{base.label} has no form for several matrices of this shape in one parameter"
    return ""


def _check_weight(path: str, weight: torch.Tensor) -> None:
    """Raises a StateError if it can't be packed."""
    if weight.dtype not in COMPUTE_DTYPES or weight.is_meta:
        kind = "meta device" if weight.is_meta else str(weight.dtype)
        raise StateError(f"{path}: can't quantise a weight of {kind}; load it as float32, bfloat16 or float16")
    if not torch.stack(weight.detach().aminmax()).isfinite().all():
        raise StateError(f"{path} has NaN or infinite weights; nothing was quantised")


def _named(path: str, names: set[str]) -> bool:
    """Whether `path` is one of `names` or inside one."""
    return any(path == n or path.startswith(f"{n}.") for n in names)
