"""What `combine_adapters` takes: settings that go together, and adapters whose updates add up."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Real

from torch import nn

from ..errors import ConfigError
from ..maths.pruning import MAJORITIES, PRUNING
from ..methods.base import refuse_foreign_factors, refuse_no_product
from ..methods.registry import method_of
from ..spec.checks import check_rank
from .registry import Adapter, adapter_layers
from .verbs import as_names

METHODS = ("linear", "cat", "svd", *PRUNING)


def check_settings(method: str, r: int | None, density: float | None, majority: str, seed: int) -> None:
    for field, value, allowed in (("method", method, METHODS), ("majority", majority, MAJORITIES)):
        if value not in allowed:
            raise ConfigError(f"{field} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    if r is not None:
        check_rank("r", r)
        if method in ("linear", "cat"):
            raise ConfigError(f"method {method!r} is exact and finds its rank; leave r={r} out, or use method='svd'")
    if type(seed) is not int:
        raise ConfigError(f"seed must be an integer, not {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ConfigError("seed must be an integer of at most 64 bits, which is what torch's generators take")
    if density is None and method in PRUNING:
        raise ConfigError(f"method {method!r} needs a density, the share of values to keep, in (0, 1]")
    if density is not None:
        if method not in PRUNING:
            raise ConfigError(f"method {method!r} keeps every value; leave density={density!r} out")
        if not _is_finite(density) or not 0 < density <= 1:
            raise ConfigError(f"density must be a number in (0, 1], not {density!r}")


def weights_of(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """{name: weight}."""
    unique = as_names(names)
    listed = [weights] if isinstance(weights, Real) else list(weights)
    if not unique:
        raise ConfigError("names is empty; name at least one adapter to combine")
    if not isinstance(names, str) and len(unique) < len(names):
        raise ConfigError(f"names has an adapter twice: {', '.join(map(repr, names))}; add its weights up instead")
    if len(listed) != len(unique):
        raise ConfigError(f"weights must be one number for each of the {len(unique)} adapters, not {len(listed)}")
    for name, weight in zip(unique, listed, strict=True):
        if not _is_finite(weight):
            raise ConfigError(f"weights: that of {name!r} must be a finite number, not {weight!r}")
    return dict(zip(unique, map(float, listed), strict=True))


def check_records(model: nn.Module, records: Mapping[str, Adapter]) -> None:
    for name, record in records.items():
        method = method_of(record.config)
        refuse_no_product(method, name)
        refuse_foreign_factors(method, "combine_adapters")
        if record.tokens or record.kept:
            what = "rows for some tokens" if record.tokens else "the embeddings of a vocabulary that grew"
            raise ConfigError(f"adapter {name!r} has {what}, which do not add up with others; merge it into the base")
        if record.config.bias != "none":
            raise ConfigError(
                f"adapter {name!r} trains the base's biases (bias={record.config.bias!r}), which only one adapter of a model "
                "can; combine adapters of bias='none' or lora_bias=True"
            )
        for path, layer in adapter_layers(model, record):
            if not layer.any_factors:
                raise ConfigError(
                    f"adapter {name!r} is on {path}, a {layer.lora_base_class.__name__} whose A and B have a form that their "
                    "sums have not; combine adapters that leave it out"
                )
    biased = next((name for name, record in records.items() if record.config.lora_bias), None)
    for name, record in records.items() if biased else ():
        embedding = next((path for path, layer in adapter_layers(model, record) if not layer.takes_bias), None)
        if embedding:
            raise ConfigError(
                f"adapter {biased!r} has biases (lora_bias) and {name!r} is on the embedding {embedding!r}, which can't have "
                "one; one adapter can't hold both"
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
