"""How strongly an adapter changes the model, set while it runs.

Example:

    scale_adapter(model, "film", 0.5)              # half of its updates, from now on
    with scale_adapter(model, "film", 1.5):        # or for a while
        model(**inputs)
"""

from __future__ import annotations

from types import TracebackType

from torch import nn

from ..errors import StateError
from ..spec.checks import check_finite
from .registry import adapter_layers, find_adapter, registry_of
from .verbs import changes_adapters


class Scaled:
    """What `scale_adapter` gives back: leaving it as a context puts back the factor from before.

    Attributes:
        before: that factor.
    """

    def __init__(self, model: nn.Module, name: str, before: float) -> None:
        self._model, self._name, self.before = model, name, before
        self._adapter = find_adapter(model, name)

    def __enter__(self) -> Scaled:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if registry_of(self._model).adapters.get(self._name) is self._adapter:  # not another one in its place
            scale_adapter(self._model, self._name, self.before)


@changes_adapters
def scale_adapter(model: nn.Module, adapter_name: str, factor: float) -> Scaled:
    """Multiplies the updates of an adapter by `factor`: s B A becomes factor s B A, with the s that its configuration says.

    It is no product with a factor that was set before: 1 is the adapter as it was trained. The factor goes into merges, into
    combinations, and into the `lora_alpha` of files. Modules that the adapter trains whole, biases of the base and rows of
    tokens are not scaled.

    Args:
        model: the model that holds it.
        adapter_name: which adapter; active or not.
        factor: any finite number; 0 turns its updates off, and a negative one subtracts them.

    Returns:
        A context that puts the factor from before back when it is left, also through an error. It need not be entered.

    Raises:
        AdapterNameError: it is not on the model.
        ConfigError: `factor` is no finite number.
        StateError: it is folded into the weights now; a thread is in a mixed batch, or in `disable_adapters`.
    """
    check_finite("factor", factor)
    adapter = find_adapter(model, adapter_name)
    layers = dict(adapter_layers(model, adapter))
    if any(adapter_name in layer.lora_folded for layer in layers.values()):
        raise StateError(f"adapter {adapter_name!r} is folded into the weights; call unmerge_adapter(model) before scaling it")
    before, adapter.scale = adapter.scale, float(factor)
    for path, layer in layers.items():
        layer.lora_scaling[adapter_name] = adapter.scale * layer.scale * adapter.layers[path].scaling
    return Scaled(model, adapter_name, before)
