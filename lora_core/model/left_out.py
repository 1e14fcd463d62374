"""What `target_modules` passes over, and why: products that are no `nn.Linear` of their own, or may not be one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from ..bases import weight_shape
from ..layers import lora_class, why_not
from ..spec.config import LoraConfig
from ..spec.targets import FUSED, is_head

HEAD = "the head"
#: The projections that attention holds itself: in one parameter, or in three where keys and values have widths of their own.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def left_out(
    modules: Mapping[str, nn.Module], head: nn.Module | None, named: Collection[str] = (), targets: Collection[str] = ()
) -> dict[str, str]:
    """{path of a module or parameter: why "all-linear" does not mean it}.

    Args:
        modules: {path: module} of the base, the root's path being "".
        head: the model's output layer, if it says which that is.
        named: paths of modules that the configuration trains whole or excludes; they and what is inside them are not listed.
        targets: paths of layers and parameters that it adapts.
    """
    found = {}
    for path, module in modules.items():
        if any(path == outer or path.startswith(f"{outer}.") for outer in named):
            continue
        if path and isinstance(module, nn.MultiheadAttention) and lora_class(module) is not None:
            found[path] = "attention, which is adapted where it is named itself"
            continue
        kind, parent = type(module), modules.get(path.rpartition(".")[0])
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Linear):
            if module is head or is_head(path):
                found[path] = HEAD
            elif isinstance(parent, nn.MultiheadAttention) and module is parent.out_proj:
                if parent is not modules[""] and lora_class(parent) is not None:
                    continue  # said of the attention
                found[path] = "attention reads its weight without calling it"
            elif lora_class(module) is None:
                found[path] = f"a {kind.__name__}: {why_not(module)}"
        elif re.search("linear", kind.__name__, re.IGNORECASE) and not module._modules and lora_class(module) is None:
            found[path] = f"a {kind.__name__}, which is not known here"
        elif not isinstance(module, _CONVOLUTIONS):
            for name, parameter in module._parameters.items():
                if is_stack(parameter) and f"{prefix}{name}" not in targets:
                    found[f"{prefix}{name}"] = _several(f"{prefix}{name}")
        for name in _PROJECTIONS if isinstance(module, nn.MultiheadAttention) else ():
            if module._parameters.get(name) is not None:
                found[f"{prefix}{name}"] = "attention's own parameter, and no layer"
    return found


def unnamed_experts(config: LoraConfig, modules: Mapping[str, nn.Module], targets: Collection[str]) -> dict[str, str]:
    """{path of a parameter with the experts of a mixture: why it is no target, although a name in `target_modules` meant such
    layers in transformers 4}: where a model has other layers of that name, it would be missed without a word."""
    names = () if isinstance(config.target_modules, str) else config.target_modules or ()
    fused = dict.fromkeys(FUSED[leaf] for name in names if (leaf := name.rpartition(".")[2]) in FUSED)
    held = ((path, name, module._parameters.get(name)) for path, module in modules.items() for name in fused)
    found = (f"{path}.{name}" for path, name, parameter in held if is_stack(parameter))
    return {path: _several(path) for path in found if path not in targets}


def is_stack(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter is several matrices, as fused experts are."""
    shape = () if parameter is None else weight_shape(parameter)
    return len(shape) == 3 and shape[0] > 1  # one: a row of embeddings


def _several(path: str) -> str:
    short = ".".join(path.split(".")[-2:])
    return f"several matrices in one parameter, as fused experts are: target_parameters=[{short!r}]"
