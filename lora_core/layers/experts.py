"""LoRA on parameters that no layer has as its weight: the fused experts of a mixture, or a matrix that a module multiplies by.

    W_e + s B_e A_e        for each of the E matrices of a parameter;  A_e: (r, d_in);  B_e: (d_out, r)

transformers 5 holds the experts of a layer in two parameters, `experts.gate_up_proj` and `experts.down_proj`, and one forward
reads both: there is no layer to call. So each parameter is seen as a layer of its own, a slot, which carries adapters as any
layer does; and the module around it, the host, reads in its forward the sum above in the place of W, as in PEFT. The sum is
made once for each forward, and is seen there alone: elsewhere, and in other threads, it is the base's. In 16 bits it is
rounded to the dtype of W.

    model.layers.0.mlp.experts.gate_up_proj                               the base's, as before
    model.layers.0.mlp.experts.lora_weights.gate_up_proj.lora_A.NAME      the adapters'

A and B are kept as PEFT's files have them: the rows of A expert by expert, (E r, d_in), and the columns of B rank by rank,
(d_out, r E).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..bases import base_of_weight, weight_shape
from ..bases.forwards import change_class, is_offloaded
from ..errors import StateError
from ..maths.updated import UpdatedWeight, added
from ..methods.base import Method
from ..methods.registry import method_of
from ..spec.config import LoraConfig
from ..spec.starts import starts_from_weight
from .base import LoraLayer
from .packed import PackedFolding, PackedHost
from .slots import SLOTS, ParameterSlot, takes_stand_ins
from .subclass import subclass


class LoraHost(nn.Module):
    """A module some of whose parameters carry adapters: its forward, and nothing else, reads them with the updates added.

    Attributes:
        lora_weights: {name of a parameter: its slot}.
        lora_host_class: the module's own class.
        lora_read: {thread that is in the forward: {name: what it reads there}}.
    """

    lora_weights: nn.ModuleDict

    def __getattr__(self, name: str) -> Any:
        own = (self.__dict__.get("lora_read") or {}).get(_thread())
        if own and name in own:
            return own[name]
        slots = self._modules.get(SLOTS, ())
        if own is None and name in slots and _is_in_backward() and slots[name].applies:
            raise StateError(
                f"a checkpoint inside of the forward of a {self.lora_host_class.__name__} reads {name!r} again when that is "
                "over, and would miss its adapters; put the checkpoint around the module"
            )
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        thread = _thread()
        outer = self.lora_read.get(thread)  # of a forward that calls itself
        self.lora_read[thread] = {}
        try:
            slots = {name: slot for name, slot in self.lora_weights.items() if slot.applies}
            for slot in slots.values():
                slot.check_stored(())
            read = super().__getattr__
            self.lora_read[thread] = {name: slot.updated(read(name)) for name, slot in slots.items()}
            return super().forward(*args, **kwargs)
        finally:
            if outer is None:
                del self.lora_read[thread]
            else:
                self.lora_read[thread] = outer


def _is_in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()  # a compiler can't ask, and traces one at a time


class LoraParameter(PackedFolding, ParameterSlot):
    """A parameter that carries adapters: a matrix, (d_out, d_in), or E of them, (E, d_out, d_in).

    Where the host says `is_transposed`, it is (E, d_in, d_out). That is PEFT's rule: in one that stores it so and does not say
    so (Llama 4's) d_in and d_out have swapped names, and the update is of the same rank.
    """

    bias = None
    takes_bias = False
    any_factors = False
    mixes = False
    drops = False

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        host, name = layer.place
        weight = host._parameters.get(name)
        if weight is None:
            return "it is computed from other tensors (pruned, or parametrised)"
        base = base_of_weight(weight)
        if is_lazy(weight) or not (isinstance(host, PackedHost) if base.packed else weight.is_floating_point()):
            return f"it is held as {base.label} {weight.dtype}, and an update goes on dense floating-point values"
        if (dims := len(weight_shape(weight))) not in (2, 3):
            return f"it has {dims} dimensions; a matrix has 2, and several of them 3"
        if isinstance(host, LoraLayer):
            return f"the {host.lora_base_class.__name__} around it carries an adapter itself; target that alone"
        if isinstance(host, nn.RNNBase):
            return f"the {type(host).__name__} around it keeps a list of its weights"
        return "accelerate offloads it, and no update would reach it" if is_offloaded(host) else None

    @classmethod
    def unsupported(cls, layer: nn.Module, config: LoraConfig, r: int) -> str | None:
        init, method = config.init_lora_weights, method_of(config)
        here = "is a parameter, whose update is added to its values"
        if config.lora_dropout:
            return f"{here}: there is no input for lora_dropout={config.lora_dropout} to act on; set it to 0"
        if method.asked or not method.is_plain:
            return f"{here}: {method.label} does not go with that, nor in PEFT; leave {method.asked} out"
        if config.bias != "none":
            return f"{here}, and PEFT's files have no place for bias={config.bias!r} beside it; leave it out"
        if init == "orthogonal" or starts_from_weight(init):
            return f"{here}, where init_lora_weights={init!r} can't start; use True or 'gaussian'"
        return None

    @classmethod
    def caller(cls, layer: nn.Module) -> nn.Module:
        return layer.place[0]

    @classmethod
    def weight_path(cls, path: str) -> str:
        return path

    @classmethod
    def file_path(cls, path: str, layer: nn.Module, layers: Iterable[str]) -> str:
        """PEFT wraps a module once for each of its parameters, in their order: the last one is outermost."""
        outer, _, name = path.rpartition(".")
        names, layers = list(layer.place[0]._parameters), set(layers)
        later = [other for other in names[names.index(name) + 1 :] if f"{outer}.{other}" in layers]
        return ".".join([outer, *("base_layer" for _ in later)])

    @classmethod
    def matrices(cls, layer: nn.Module) -> int:
        shape = _shape(layer)
        return shape[0] if len(shape) == 3 else 1

    @classmethod
    def matrix_shape(cls, layer: nn.Module) -> tuple[int, int]:
        *several, d_out, d_in = _shape(layer)
        return (d_out, d_in) if several and _is_transposed(layer) else (d_in, d_out)

    @classmethod
    def file_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        return super().file_shapes(layer, cls.matrices(layer) * r)

    @classmethod
    def adopt(cls, module: nn.Module) -> LoraParameter:
        host, name = module.place
        if not isinstance(host, LoraHost):
            own = type(host)
            change_class(host, subclass(LoraHost, own))
            host.lora_host_class, host.lora_read = own, {}
            host.add_module(SLOTS, nn.ModuleDict())
        host._modules[SLOTS][name] = super().adopt(module)
        return module

    def release(self) -> nn.Module:
        host, name = self.place
        if is_parametrized(host):
            raise StateError(
                f"a {host.lora_host_class.__name__} was parametrised after a parameter of it got an adapter, and would lose "
                f"weights with that; call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) first"
            )
        super().release()
        del host._modules[SLOTS][name]
        if not host._modules[SLOTS]:
            del host._modules[SLOTS]
            change_class(host, host.lora_host_class)
            del host.lora_host_class, host.lora_read
        return self

    @property
    def applies(self) -> bool:
        """Whether the host's forward reads more than the base's values. In a mixed batch no row has an adapter here."""
        return bool(self.lora_active) and not self.lora_folded and not (self.lora_rows and self.lora_rows.get(get_ident()))

    def as_matrix(self, W: Tensor) -> Tensor:  # E ? ? -> E d_out d_in, a view
        return _upright(self, W)

    def started(self, method: Method, like: Tensor, r: int, scaling: float, init: Any) -> Mapping[str, Tensor]:
        """Each of the matrices starts by itself."""
        each = [super(LoraParameter, self).started(method, like, r, scaling, init) for _ in range(self.matrices(self))]
        return {table: torch.cat([one[table] for one in each], dim=int(table == "lora_B")) for table in each[0]}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B): (E, r, d_in) and (E, d_out, r), or (r, d_in) and (d_out, r) of a single matrix."""
        A, B = super().factors(name)
        shape = _shape(self)
        return (A, B) if len(shape) == 2 else unstack(A, B, shape[0])

    def updated(self, W: Tensor) -> UpdatedWeight | Tensor:
        """W + the sum of s B A of the active adapters, laid out as W, with gradients for A and B."""
        (name, *more), s = self.lora_active, 1.0
        if more:
            A, B = self.joined_factors(self.lora_active)
        else:
            (A, B), s = self.factors(name), self.lora_scaling[name]
        L, R = (B, A) if _upright(self, W) is W else (A.mT, B.mT)
        return UpdatedWeight(W, L, R, s) if takes_stand_ins(self.place[0]) else added(W, L, R, s)

    def check_stored(self, names: Iterable[str]) -> None:
        host, name = self.place
        if name not in host._parameters:
            raise StateError(
                f"the {name} of a {host.lora_host_class.__name__} is computed from other tensors (pruned, or parametrised); "
                f"make it a plain one first, as torch.nn.utils.prune.remove(module, {name!r}) or remove_parametrizations do"
            )


def unstack(A: Tensor, B: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """A, (E r, d_in), and B, (d_out, r E), as they are kept, as (E, r, d_in) and (E, d_out, r): views."""
    return A.view(E, -1, A.shape[-1]), B.view(len(B), -1, E).permute(2, 0, 1)


def _shape(layer: nn.Module) -> torch.Size:
    """Of the parameter, once it is dense."""
    return weight_shape(layer.weight)


def _is_transposed(layer: nn.Module) -> bool:
    return getattr(layer.place[0], "is_transposed", False)


def _upright(layer: nn.Module, W: Tensor) -> Tensor:
    """W, laid out as the parameter, with d_out before d_in: W itself, or a view."""
    return W.mT if W.dim() == 3 and _is_transposed(layer) else W
