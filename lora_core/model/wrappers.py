"""The module that a verb is about: what is inside of wrappers, and that it is a module at all."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and DistributedDataParallel, which rename every path.

    Raises:
        ConfigError: it is no module.
    """
    check_model(model)
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def check_model(model: object) -> None:
    """Raises a ConfigError that says what to pass if `model` is no module."""
    if isinstance(model, nn.Module):
        return
    remedy = ""
    if isinstance(model, str):
        remedy = f" (given {model!r}); load the model first, with transformers' AutoModel.from_pretrained, say, and pass that"
    elif hasattr(model, "peft_type"):
        remedy = "; the model comes first, then its configuration"
    raise ConfigError(f"model must be a torch.nn.Module, not {type(model).__name__}{remedy}")
