"""What `target_modules="all-linear"` passes over, and why: products that are no `nn.Linear` of their own, or may not be one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .layers import lora_class
from .targets import is_head

HEAD = "the head"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def left_out(modules: Mapping[str, nn.Module], head: nn.Module | None) -> dict[str, str]:
    """{path of a module or parameter: why "all-linear" does not mean it}.

    Args:
        modules: {path: module} of the base.
        head: the model's output layer, if it says which that is.
    """
    found = {}
    for path, module in modules.items():
        kind, parent = type(module), modules.get(path.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            if module is head or is_head(path):
                found[path] = HEAD
            elif isinstance(parent, nn.MultiheadAttention):
                found[path] = "attention reads its weight without calling it"
            elif lora_class(module) is None:
                found[path] = f"a {kind.__name__}, which may compute something else than nn.Linear"
        elif re.search("linear", kind.__name__, re.IGNORECASE) and not module._modules and lora_class(module) is None:
            found[path] = f"a {kind.__name__}, which is not known here"
        elif not isinstance(module, _CONVOLUTIONS):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 3 and len(parameter) > 1:  # one: a row of embeddings
                    found[f"{path}.{name}"] = "several matrices in one parameter, as fused experts are"
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[f"{path}.in_proj_weight"] = "attention's own parameter, and no layer"
    return found
