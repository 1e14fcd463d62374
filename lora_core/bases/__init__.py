"""How a frozen weight is held: dense or packed (NF4, int8), and where accelerate keeps it. `base.py` has the contract.

Nothing outside of this room knows one base from another; what it asks is here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Base, Format
from .dense import Dense
from .int8 import Int8
from .nf4 import NF4

DENSE = Dense()

#: Those that pack weights, by their names.
PACKED: dict[str, Base] = {base.name: base for base in (NF4(), Int8())}

#: How weights are packed where nobody says how.
DEFAULT: Format = NF4.Format()

#: {bits: (what PEFT's LoftQ quantises a base to, the call that does the same here)}.
OF_LOFTQ: dict[int, tuple[Format, str]] = {
    4: (NF4.Format(double_quant=False), "quantize_nf4(model, double_quant=False)"),
    8: (Int8.Format(), "quantize_int8(model)"),
}


def libraries() -> tuple[str, ...]:
    """The packages that packed weights need."""
    return tuple(dict.fromkeys(base.library for base in PACKED.values() if base.library))


def register_base(base: Base) -> None:
    """Makes the engine know a base of one's own; see `base.py`.

    Raises:
        ConfigError: it is no `Base`, or another base of this name is there.
    """
    if not isinstance(base, Base) or not base.packed:
        raise ConfigError(f"register_base takes a Base that packs weights, not {base!r}; derive from lora_core.bases.base.Base")
    if type(PACKED.get(base.name, base)) is not type(base) or base.name == DENSE.name:
        raise ConfigError(f"there is a base {base.name!r} already; give yours another name")
    PACKED[base.name] = base


def base_of_weight(weight: object) -> Base:
    """The base that holds a weight."""
    for base in PACKED.values():
        if base.holds(weight):
            return base
    return DENSE


def base_of(module: nn.Module) -> Base:
    """The base that holds the weight of a module; the dense one if it has none."""
    return base_of_weight(getattr(module, "weight", None))


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a module has to be made dense to be multiplied by."""
    return base_of(module).packed


def base_for(form: Format) -> Base:
    """The base that a format is of."""
    return next((base for base in PACKED.values() if isinstance(form, base.Format)), DENSE)


def parse_format(text: str) -> Format | None:
    """The format that prints as `text`; None if there is none."""
    found = (base.Format.parse(text) for base in (*PACKED.values(), DENSE))
    return next(filter(None, found), None)


def dense_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that a module computes with, (d_out, d_in), in `dtype`: a new tensor."""
    return base_of(module).dense(module, dtype)


def is_on_grid(weight: Tensor, form: Format) -> bool:
    """Whether a dense weight, (d_out, d_in), holds what it would in this format, but for the rounding of its dtype."""
    with torch.no_grad():
        linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
        base = base_for(form)
        again = base.dense(base.pack(linear, form))
    return torch.allclose(again, linear.weight, rtol=4 * torch.finfo(weight.dtype).eps, atol=0)


def weight_bytes(weight: Tensor) -> int:
    """Bytes that a parameter takes, scales included."""
    return base_of_weight(weight).nbytes(weight)


def weight_shape(weight: Tensor) -> torch.Size:
    """The shape of a parameter, once it is dense."""
    return base_of_weight(weight).shape_of(weight)


def adopt_layers(model: nn.Module) -> list[tuple[Base, nn.Module]]:
    """Makes other libraries' layers in `model` compute with exactly the dequantised weights.

    Returns:
        What `release_layers` takes.
    """
    return [(base, module) for module in model.modules() if (base := base_of(module)).packed and base.adopt(module)]


def release_layers(layers: Iterable[tuple[Base, nn.Module]]) -> None:
    """The reverse of `adopt_layers`."""
    for base, layer in layers:
        base.release(layer)
