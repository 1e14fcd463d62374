"""A fine-tuned model as an adapter: on each target the best s B A of rank r for the difference of the weights.

    extract_adapter(base, tuned, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))

    D = W_tuned - W_base = U S V^T,   s B A = U_r S_r V_r^T            (see `maths/lowrank.py`)

Heads and biases that the configuration trains whole are copied. What else differs is listed in the report, not dropped in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..bases import base_of, dense_weight, is_packed
from ..errors import ConfigError, StateError
from ..layers import LoraLayer, lora_class
from ..maths.lowrank import best_of_matrix
from ..methods.base import refuse_foreign_factors
from ..methods.registry import configuration, method_of
from ..progress import watched
from ..spec.config import LoraConfig
from ..spec.starts import subtracts_start
from .copies import CHILD, original_of, submodule
from .defaults import settle_targets
from .inject import attach
from .notices import warn_of_untied
from .plan import plan
from .registry import adapter_layers, check_new_name, copies_of, find_adapter, has_adapters, unwrap
from .report import FitReport
from .verbs import changes_adapters

Tuned = nn.Module | Mapping[str, Tensor]


@changes_adapters
def extract_adapter(model: nn.Module, tuned: Tuned, config: LoraConfig, adapter_name: str = "default") -> FitReport:
    """Adds to `model` the adapter that brings it nearest to `tuned`, in place; as with `inject`, the first one is active.

    The weight of a 4-bit layer is the dequantised one, so the adapter of a dense `tuned` also takes up what it can of the
    quantisation's error, and 4-bit layers that are not targets are listed as changed. Differences are taken in float32
    (float64 if either weight is).

    Args:
        model: the base.
        tuned: the fine-tuned model, of the same structure and without adapters; or {name: tensor}, its state dict. Of tied
            tensors one name is enough.
        config: the adapter's settings. `modules_to_save`, a classification `task_type` and `bias` say what is copied from
            `tuned`; with `lora_bias` the adapter holds the differences of the targets' biases.
        adapter_name: letters, digits, "_" and "-".

    Returns:
        The energy kept, and the names of the tensors that differ and are not in the adapter.

    Raises:
        TargetError, AdapterNameError: as `inject`. The model is as it was, here and below.
        ConfigError: `tuned` lacks tensors or has them in other shapes, or `config` asks for DoRA or a start from the weight.
        StateError: adapters are folded into the base's weights, or a weight has NaN or infinite values.
    """
    root, source = unwrap(model), unwrap(tuned) if isinstance(tuned, nn.Module) else tuned
    config = settle_targets(root, configuration(config)).config
    _check_arguments(root, source, config)
    check_new_name(root, adapter_name)
    found = plan(root, config)
    names = _match_names(root, source)

    updates, biases, energy = {}, {}, {}
    for path, settings in watched(found.targets.layers.items(), "extracting"):
        layer, s = submodule(root, path), settings.scaling
        if not lora_class(layer).any_factors:
            raise ConfigError(f"{path} is a {type(layer).__name__} that no adapter can be extracted for; exclude it")
        D = _difference(root, source, f"{path}.weight", names[f"{path}.weight"])
        *updates[path], energy[path] = best_of_matrix(lora_class(layer).as_matrix(layer, D), settings.r, s)
        if method_of(config).bias_table and layer.bias is not None:
            biases[path] = _difference(root, source, f"{path}.bias", names[f"{path}.bias"]) / s
    copies = {path: _read(source, names[path]).detach() for path in found.copies}
    for path, tensor in copies.items():
        _check_finite(path, tensor)
    taken = {f"{path}.weight" for path in updates} | {f"{path}.bias" for path in biases} | copies.keys()
    missed = [path for path, name in names.items() if path not in taken and _differs(root, source, path, name)]
    missed += _tensors(source).keys() - _tensors(root).keys()

    warn_of_untied(found)
    attach(root, config, adapter_name, found, trainable=not config.inference_mode)
    adapter = find_adapter(root, adapter_name)
    for path, layer in adapter_layers(root, adapter):
        A, B = updates[path]
        layer.lora_A[adapter_name].data[: len(A)] = A  # fewer than r where the shape allows no more: the rest meets zeros in B
        layer.lora_B[adapter_name].data.zero_()[:, : len(A)] = B
        if path in biases:
            getattr(layer, method_of(config).bias_table)[adapter_name].data.copy_(biases[path])
    for path, copy in copies_of(root, adapter_name).items():
        copy.data = copies[path].to(copy, copy=True)
    ranks = {path: settings.r for path, settings in adapter.layers.items()}
    return FitReport(adapter_name, "the difference", ranks, energy, adapter.saved_modules, tuple(sorted(missed)))


# --- the tensors of a model, or of a state dict, by name --------------------------------------------------------------


def _tensors(source: Tuned) -> dict[str, bool]:
    """{name of each of its own tensors, under every path: whether its state dict has it}."""
    if isinstance(source, Mapping):
        return dict.fromkeys(source, True)
    added = {getattr(m, table) for m in source.modules() if isinstance(m, LoraLayer) for table in m.lora_tables}
    return {
        f"{path}.{name}" if path else name: name not in module._non_persistent_buffers_set
        for path, module in source.named_modules(remove_duplicate=False)
        if module not in added and CHILD not in path.split(".")
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _packed(source: Tuned, name: str) -> nn.Module | None:
    """The quantised layer whose weight has this name, if that is one."""
    path, _, leaf = name.rpartition(".")
    layer = source.get_submodule(path) if leaf == "weight" and isinstance(source, nn.Module) else None
    return layer if is_packed(layer) else None


def _read(source: Tuned, name: str) -> Tensor:
    """A tensor by its name: the base's own in place of an adapter's copy, and dense if it is a 4-bit layer's weight."""
    if isinstance(source, Mapping):
        return source[name]
    layer = _packed(source, name)
    return _own(source, name) if layer is None else dense_weight(layer)


def _own(model: nn.Module, name: str) -> Tensor:
    return original_of(model, name)


def _shape(source: Tuned, name: str) -> torch.Size:
    layer = _packed(source, name)
    return _read(source, name).shape if layer is None else base_of(layer).shape_of(layer.weight)


def _match_names(base: nn.Module, tuned: Tuned) -> dict[str, str]:
    """{name in the base: name in `tuned`}: the same, or one that is tied to it in the base.

    Raises:
        ConfigError: one is missing, or of another shape.
    """
    there, tied = _tensors(tuned), {}
    for name in _tensors(base):
        tied.setdefault(id(_own(base, name)), []).append(name)
    names, missing = {}, []
    for name, stored in _tensors(base).items():
        found = [other for other in (name, *tied[id(_own(base, name))]) if other in there]
        if found:
            names[name] = found[0]
        elif stored:
            missing.append(name)
    wrong = [
        f"{name} is {tuple(_shape(tuned, other))}, not {tuple(_shape(base, name))}"
        for name, other in names.items()
        if _shape(tuned, other) != _shape(base, name)
    ]
    problems = [f"{len(missing)} missing tensors ({_listed(missing)})"] if missing else []
    problems += [f"{len(wrong)} wrong shapes ({_listed(wrong)})"] if wrong else []
    if problems:
        raise ConfigError(f"tuned does not fit this base: {'; '.join(problems)}; pass a model that was tuned from it")
    return names


def _difference(base: nn.Module, tuned: Tuned, name: str, other: str) -> Tensor:
    W, V = _read(base, name).detach(), _read(tuned, other).detach()
    if W.is_meta or V.is_meta:
        raise StateError(f"{name} is on the meta device; load the models' weights first; nothing was extracted")
    dtype = torch.promote_types(torch.promote_types(W.dtype, V.dtype), torch.float32)
    D = (V.to(W.device, dtype) - W.to(dtype)).contiguous()
    _check_finite(name, D)
    return D


def _differs(base: nn.Module, tuned: Tuned, name: str, other: str) -> bool:
    W, V = _read(base, name), _read(tuned, other)
    dtype = torch.promote_types(W.dtype, V.dtype)
    return not torch.equal(W.to(dtype), V.to(W.device, dtype))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_arguments(model: nn.Module, tuned: Tuned, config: LoraConfig) -> None:
    method = method_of(config)
    if not method.is_product:
        raise ConfigError(f"{method.asked}: a difference of weights is extracted as plain LoRA; leave it out")
    refuse_foreign_factors(method, "extract_adapter")
    if config.layer_replication is not None:
        raise ConfigError("layer_replication: tuned has the layers that model has; leave it out")
    if subtracts_start(config.init_lora_weights):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} subtracts its start, and an extracted adapter has none; leave it"
        )
    if isinstance(tuned, nn.Module):
        if has_adapters(tuned):
            raise ConfigError(
                "tuned holds adapters; call merge_and_unload(tuned) first, so that its weights have what they add"
            )
    elif not isinstance(tuned, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tuned.values()):
        raise ConfigError(f"tuned must be a module or a mapping of names to tensors, not {type(tuned).__name__}")
    if any(isinstance(m, LoraLayer) and m.lora_folded for m in model.modules()):
        raise StateError("adapters are folded into the base's weights; call unmerge_adapter(model) before extracting")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise StateError(f"{name} has NaN or infinite values, or its difference from the base's has; nothing was extracted")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
