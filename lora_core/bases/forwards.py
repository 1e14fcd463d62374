"""A forward that someone put on the instance of a module, where it hides the forward of the class.

accelerate does so for its hooks (`device_map` over several devices, offloading): `module.forward` becomes a wrapper that calls
`module._old_forward`, the method of the class as it was bound then. A module that is given another class must call the new
class's method there, or the adapter would have no effect. What any other forward on the instance would call can't be known.
"""

from __future__ import annotations

import functools
from types import MethodType

import torch
from torch import Tensor, nn

from ..errors import StateError, TargetError

#: accelerate's names on a hooked module: the hook, and the forward inside it.
HOOK, INSIDE = "_hf_hook", "_old_forward"


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Gives `module` another class, whose forward is then called, inside accelerate's hook if there is one.

    Raises:
        TargetError: its forward is hidden by one that can't be seen through; nothing is changed.
    """
    slot = _slot(module)
    module.__class__ = kind
    if slot:
        vars(module)[slot] = MethodType(kind.forward, module)


def is_hidden(module: nn.Module) -> bool:
    """Whether the forward of the class of `module` is hidden by one that can't be seen through."""
    try:
        _slot(module)
    except TargetError:
        return True
    return False


def refuse_hidden_forward(path: str, module: nn.Module, field: str = "target_modules") -> None:
    """Raises a TargetError if the forward of the class of `module` is hidden by one that can't be seen through."""
    try:
        _slot(module)
    except TargetError as error:
        raise TargetError(f"{field}: {path!r} {error}") from None


def _slot(module: nn.Module) -> str | None:
    """Which attribute of the instance is the bound forward of its class: none if only the class has it."""
    own = vars(module)
    if "forward" not in own:
        return None
    wrapper = own["forward"]  # accelerate's is a partial function of the module
    hooked = isinstance(wrapper, functools.partial) and wrapper.args[:1] == (module,) and HOOK in own and INSIDE in own
    slot = INSIDE if hooked else "forward"
    method = own[slot]
    if getattr(method, "__func__", None) is not type(module).forward or method.__self__ is not module:
        raise TargetError(
            "has a forward of its own on the instance (a compiled or patched one), which would hide the adapter; "
            "inject first, then compile or patch the model, or call model.compile()"
        )
    return slot


# --- offloaded weights ------------------------------------------------------------------------------------------------


def execution_device(module: nn.Module) -> torch.device:
    """The device that the module computes on: its weight's, or the one that accelerate's hook brings that to."""
    for hook in _offloading(module):
        return torch.device("cpu" if hook.execution_device is None else hook.execution_device)
    return module.weight.device


def stored_weight(module: nn.Module, path: str = "", name: str = "weight") -> Tensor:
    """The module's weight, its parameter `name`, from where accelerate keeps it between two calls if it is offloaded.

    Raises:
        StateError: it is on the meta device, and nowhere else.
    """
    weight = getattr(module, name)
    if not weight.is_meta:
        return weight
    for hook in _offloading(module):
        return hook.weights_map[name]
    raise StateError(f"{path or type(module).__name__}: its weight is on the meta device; load the model's weights first")


def stored_entry(table: nn.ParameterDict, name: str) -> Tensor:
    """An entry of a table of adapters, from where accelerate keeps it if it offloaded the model after the injection.

    Raises:
        StateError: it is to be trained, and what is there is not the parameter.
    """
    entry = table._parameters.get(name)  # `table[name]` takes ten times as long to find it there
    entry = table[name] if entry is None else entry
    for hook in _offloading(table) if entry.is_meta else ():
        if entry.requires_grad and torch.is_grad_enabled():
            raise StateError(
                f"the tensors of adapter {name!r} were offloaded with the model, and can't be trained; offload first, and "
                "inject afterwards"
            )
        return hook.weights_map[name].to("cpu" if hook.execution_device is None else hook.execution_device)
    return entry


def refuse_offloaded(path: str, module: nn.Module, what: str) -> None:
    """Raises an StateError if accelerate keeps weights of `module` elsewhere, where `what` would not reach them."""
    if any(_offloading(m) for m in module.modules()):
        raise StateError(f"{path}: accelerate offloads its weights, and {what} would not reach them; load the model whole")


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own weights elsewhere between two calls."""
    return bool(_offloading(module))


def _offloading(module: nn.Module) -> list:
    """accelerate's hooks on `module` that keep its weights elsewhere between two calls."""
    hook = vars(module).get(HOOK)
    hooks = () if hook is None else getattr(hook, "hooks", (hook,))
    return [h for h in hooks if getattr(h, "offload", False)]
