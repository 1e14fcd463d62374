"""Interrupting a verb at one of its lines, and telling whether a model is as it was, or as it should be afterwards."""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

import lora_core

#: Lines of the files in here are where an interruption comes. In torch's own it might leave torch without gradients.
WATCHED = str(Path(lora_core.__file__).parent)


class Lines:
    """Runs a call and counts its lines in WATCHED; raises `error` at the line of number `stop`, once."""

    def __init__(self, stop=None, error=KeyboardInterrupt):
        self.count, self.stop, self.error, self.raised = 0, stop, error, False

    def _local(self, frame, event, arg):
        if event == "line" and not self.raised:
            if self.count == self.stop:
                self.raised = True
                raise self.error("injected")
            self.count += 1
        return self._local

    def _global(self, frame, event, arg):
        return self._local if frame.f_code.co_filename.startswith(WATCHED) else None

    def run(self, call):
        """Whether the call came to its end."""
        before = sys.gettrace()
        sys.settrace(self._global)
        try:
            call()
            return True
        except (self.error, lora_core.LoraError):  # reading a file turns what is raised there into one of ours
            assert self.raised
            return False
        finally:
            sys.settrace(before)


def _bytes(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def state(model, identity=False):
    """All that there is to a model: names, values, flags, classes, attributes, hooks and adapters; with the objects themselves
    if they are to be the same ones."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path, "class"] = type(module).__name__
        found[path, "training"] = module.training
        found[path, "attributes"] = tuple(sorted(vars(module)))
        found[path, "hooks"] = tuple(len(table) for name, table in vars(module).items() if name.endswith("_hooks"))
        found[path, "children"] = tuple(module._modules)
        for name, value in vars(module).items():
            if name.startswith("lora_") and not isinstance(value, nn.Module) and name != "lora_registry":
                found[path, name] = repr(value) if identity or name != "lora_unfolded" else len(value)
        if identity:
            found[path, "id"] = id(module)
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    found[path, name] = (type(tensor).__name__, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)
                    found[path, name, "values"] = _bytes(tensor)
                    found[path, name, "packed"] = getattr(tensor, "quant_state", None) is not None
                    if identity:
                        found[path, name, "id"] = id(tensor), tensor.data_ptr()
    registry = vars(model).get("lora_registry")
    if registry is not None:
        fields = {f.name: getattr(registry, f.name) for f in dataclasses.fields(registry)}
        found["registry"] = repr(fields | {"adopted": len(registry.adopted)})
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        found["config"] = repr(sorted(config.to_dict().items(), key=str))
        found["ties"] = dict(vars(model).get("all_tied_weights_keys") or {})
    return found


def difference(a, b):
    """The first entries that differ."""
    return [key for key in {**a, **b} if a.get(key) != b.get(key)][:4]
