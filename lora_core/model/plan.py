"""What a configuration means on one model: the layers to adapt, the modules to train whole, the biases. Changes nothing.

Everything that could keep an adapter from taking effect is found here, before the first change: layers that can't carry one, a
forward that would hide it, a module that another adapter or another part of the model has a hand in.

Tied tensors (a head that is the input embeddings) are trained apart, as in PEFT: each path gets a copy of its own, and the tie
is gone while the adapter is active. As long as it is on the model, `config.tie_word_embeddings` is False: transformers would
tie again what is trained. `ensure_weight_tying` trains one copy for all the paths of a tie.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..bases.forwards import refuse_hidden_forward, refuse_offloaded
from ..errors import TargetError
from ..layers import LoraLayer, lora_class, why_not
from ..layers.packed import holds_packed
from ..layers.slots import SLOTS
from ..methods.registry import method_of
from ..spec.config import ALL_LINEAR, TASK_HEADS, LoraConfig
from ..spec.patterns import limited
from ..spec.targets import Targets, excluded_paths, match_saved_modules, select_targets
from .conventions import output_layer
from .copies import CHILD, added_tables, base_tensors, original_of, own_keys, submodule
from .left_out import left_out, unnamed_experts
from .registry import changed_layers, has_adapters, registry_of, unwrap
from .replicate import first_of
from .tokens import Rows, plan_tokens


@dataclass(frozen=True)
class Plan:
    """The modules of one model that one configuration means.

    Attributes:
        targets: the layers to adapt, with rank and scaling, and how often each pattern hit.
        saved_modules: paths of the modules to train whole.
        copies: {path of a tensor of the base to train a copy of: what is equal for the paths that share one copy}.
        untied: {path of such a tensor: paths that the base ties it to, and the adapter does not}.
        left_out: {path of what `target_modules` might mean, and passes over: why}.
        tokens: {path of a layer of which some rows are trained: these}.
        kept: those of `copies` that are not trained, and come from a file: see `files/vocabulary.py`.
    """

    targets: Targets
    saved_modules: tuple[str, ...]
    copies: Mapping[str, object]
    untied: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, Rows] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


def plan(model: nn.Module, config: LoraConfig, strict: bool = True) -> Plan:
    """What `inject` would adapt, and train a copy of.

    With `strict=False` patterns that match nothing are left with zero hits instead of raising.

    Raises:
        TargetError: a pattern matches nothing, or a module on which an adapter could not take effect.
        StateError: a module to be trained whole is offloaded.
    """
    model = unwrap(model)
    _refuse_foreign_adapters(model)
    if lazy := next((path for path, p in model.named_parameters() if is_lazy(p)), None):
        raise TargetError(f"{lazy!r} has no shape yet (a lazy layer); run the model once before it gets adapters")
    modules, head = base_modules(model), output_layer(model)
    paths = list(modules)
    heads = TASK_HEADS.get(config.task_type or "", ())
    patterns = config.saved_module_patterns
    saved = match_saved_modules(patterns, optional=heads if strict else patterns, paths=paths)
    if heads and not saved and strict:
        raise TargetError(
            f"task_type {config.task_type!r}: found no head called {' or '.join(map(repr, heads))}; "
            "name the model's in modules_to_save, or leave task_type out"
        )
    ties = tied_paths(model)
    if config.ensure_weight_tying:
        saved = _with_tied_modules(model, saved, ties)
    linear = {p for p, m in modules.items() if m is not head and getattr(lora_class(m), "is_linear", False)}
    with limited():
        targets = select_targets(config, paths, linear, saved, strict, base_tensors(model))
        modules |= {path: submodule(model, path) for path in targets.paths if path not in modules}
        named = {*saved, *excluded_paths(config, paths, strict)}
        targets = _with_parts(modules, targets, named)
        _check_targets(model, modules, set(paths), config, targets)
    _check_used_once(model, modules, (*targets.paths, *saved))
    for path in targets.paths if config.ensure_weight_tying else ():
        if tied := ties.get(id(getattr(modules[path], lora_class(modules[path]).weight_name))):
            raise TargetError(
                f"ensure_weight_tying: {' and '.join(map(repr, tied))} are tied, and an adapter goes on one of them; two "
                "layers can't share A and B here: leave it out, or train them whole, in modules_to_save"
            )
    for path in saved:
        _check_saved(path, modules[path])
    found = plan_copies(model, targets, saved, _trained_biases(model, config, targets.paths, saved), config.ensure_weight_tying)
    tokens = plan_tokens(model, config, modules, (*targets.paths, *saved), ties.values(), strict)
    _check_whole(model, (*targets.paths, *tokens))
    passed = left_out({"": model, **modules}, head, named, targets.paths) if config.target_modules == ALL_LINEAR else {}
    return dataclasses.replace(found, left_out=passed | unnamed_experts(config, modules, targets.paths), tokens=tokens)


def plan_copies(
    model: nn.Module, targets: Targets, saved: Sequence[str], biases: Sequence[str] = (), keep_ties: bool = False
) -> Plan:
    """The plan with these modules trained whole, and these biases.

    Args:
        model: the module at the root.
        targets: the layers to adapt.
        saved: paths of the modules.
        biases: paths of the biases.
        keep_ties: whether what is tied to a tensor of theirs is trained with it, as one.

    Raises:
        TargetError: a bias is tied to one that would not be trained with it.
    """
    ties = tied_paths(model)
    whole = {f"{module}.{key}": module for module in saved for key in own_keys(model.get_submodule(module))}
    copies: dict[str, object] = {}
    for path in (*biases, *whole):
        # One module's own ties hold inside of it, as in PEFT's copy of the whole module.
        scope = None if keep_ties or path not in whole else whole[path]
        copies[path] = (scope, id(original_of(model, path)))
    for path in list(copies) if keep_ties else ():
        copies |= dict.fromkeys(ties.get(id(original_of(model, path)), ()), copies[path])
    untied = {}
    for path in copies:
        others = tuple(p for p in ties.get(id(original_of(model, path)), ()) if copies.get(p) != copies[path])
        if others and path in biases:
            raise TargetError(f"the bias {path!r} is tied to {others[0]!r}, which would not be trained too; use bias='none'")
        if others:
            untied[path] = others
    return Plan(targets, tuple(saved), copies, untied)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the model's own modules: without the root and without what adapters added."""
    tables = added_tables(model)
    return {p: m for p, m in model.named_modules() if p and p not in tables and not {CHILD, SLOTS} & set(p.split("."))}


def tied_paths(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """{id of a parameter of the base that has several paths, but for those of `replicate`: these}."""
    paths, first = defaultdict(list), first_of(model)
    for path in base_tensors(model):
        paths[id(original_of(model, path))].append(path)
    return {key: tuple(tied) for key, tied in paths.items() if len(set(map(first, tied))) > 1}


def _with_tied_modules(model: nn.Module, saved: Sequence[str], ties: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    """`saved` and the modules whose parameters are tied to one in them."""
    parameters = {f"{m}.{key}" for m in saved for key in own_keys(model.get_submodule(m))}
    tied = {path.rpartition(".")[0] for paths in ties.values() if parameters.intersection(paths) for path in paths}
    inside = {path for path in tied for m in saved if path == m or path.startswith(f"{m}.")}
    return (*saved, *sorted(tied - inside))


# --- what can't be adapted --------------------------------------------------------------------------------------------


def _refuse_foreign_adapters(model: nn.Module) -> None:
    """Raises a TargetError if a layer carries an adapter that this model's own list does not know."""
    adapters = registry_of(model).adapters.values() if has_adapters(model) else ()
    layers = {layer for adapter in adapters for _, layer in changed_layers(model, adapter)}
    owners = {path.rpartition(".")[0] for adapter in adapters for path in adapter.copied}
    for path, module in model.named_modules():
        if (isinstance(module, LoraLayer) and module not in layers) or (CHILD in module._modules and path not in owners):
            raise TargetError(
                f"{path or 'this module'!r} carries an adapter that was injected through another module: a part of this model, "
                "a larger one that it is a part of, or one that shares layers with it; call the verbs on that one, or unload it"
            )


def _with_parts(modules: Mapping[str, nn.Module], targets: Targets, excluded: Collection[str]) -> Targets:
    """The targets with the layers that carry an adapter whenever one of them does, each after the one that it goes with.

    Raises:
        TargetError: such a layer is a target without the other, or is excluded.
    """
    owners = {}
    for path in targets.paths:
        for part in getattr(lora_class(modules[path]), "parts", ()):
            owners[f"{path}.{part}"] = path
    for path, owner in owners.items():
        if path in excluded:
            raise TargetError(f"{path!r} is excluded or trained whole, and carries an adapter if {owner!r} does; leave both")
    for path in targets.paths:
        parent, _, name = path.rpartition(".")
        if isinstance(modules.get(parent), nn.MultiheadAttention) and name == "out_proj" and path not in owners:
            raise TargetError(
                f"target_modules: attention reads the weight of {path!r} without calling it; name the attention itself, "
                f"{parent!r}, which adapts both of its weights"
            )
    layers = {}
    for path, settings in targets.layers.items():
        if path not in owners:
            layers |= dict.fromkeys([path, *(part for part, owner in owners.items() if owner == path)], settings)
    return Targets(layers, targets.hits)


def _check_targets(
    model: nn.Module, modules: Mapping[str, nn.Module], paths: Container[str], config: LoraConfig, targets: Targets
) -> None:
    """Raises a TargetError for a target, one of `modules` or a parameter, on which an adapter could not take effect.

    `paths` are those of the model's modules: the other targets are parameters.
    """
    for path, settings in targets.layers.items():
        kind, outer = lora_class(modules[path]), path.rpartition(".")[0]
        field = "target_modules" if path in paths else "target_parameters"
        if kind is None and path not in paths:
            raise TargetError(f"{field}: {path!r} can't carry an adapter: {why_not(modules[path])}")
        if kind is None:
            raise TargetError(
                f"{field}: {path!r} is a {type(modules[path]).__name__}, which can't carry an adapter: "
                f"{why_not(modules[path])}; target nn.Linear, 4-bit linear, Conv1D, nn.Conv1d / 2d / 3d, "
                "nn.Embedding or nn.MultiheadAttention layers, or tell register_kind what it computes"
            )
        if path not in paths and outer in targets.paths:
            raise TargetError(f"{field}: {path!r} is in {outer!r}, which target_modules names too; leave one of them out")
        if not outer and path not in paths:
            raise TargetError(f"{field}: {path!r} is the model's own, and PEFT's files have no place for its adapter")
        parent = modules.get(outer if path in paths else outer.rpartition(".")[0], model)
        if path not in paths and isinstance(parent, nn.MultiheadAttention):
            raise TargetError(f"{field}: attention reads {path!r} by itself; name the attention, in target_modules")
        refuse_hidden_forward(path, kind.caller(modules[path]), field)
        method_of(config).check(config, path, modules[path], kind.matrix_shape(modules[path]), settings.r)
        if not 0 < settings.scaling < math.inf:
            raise TargetError(f"{field}: {path!r} would have a scaling of {settings.scaling}; check lora_alpha")
        if reason := kind.unsupported(modules[path], config, settings.r):
            raise TargetError(f"{field}: {path!r} {reason}")
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise TargetError(
                f"{field}: {path!r} is in an nn.TransformerEncoderLayer, which in eval mode reads the weights of "
                "its layers without calling them; call torch.backends.mha.set_fastpath_enabled(False) first"
            )


def _check_whole(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises a TargetError for a layer that another adapter trains whole, or has all of its own."""
    adapters = registry_of(model).adapters.values() if has_adapters(model) else ()
    whole = {path for adapter in adapters for path in adapter.saved_modules}
    for path in paths:
        if any(path == w or path.startswith(f"{w}.") for w in whole):
            raise TargetError(f"{path!r} is trained whole by another adapter, in its modules_to_save; leave it out")


def _check_used_once(model: nn.Module, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> None:
    """Raises a TargetError for a module that has two places in the model: an adapter would change both."""
    places = defaultdict(list)
    for parent, module in model.named_modules():
        for name, child in module._modules.items():
            places[id(child)].append(f"{parent}.{name}" if parent else name)
    for path in paths:
        kind = lora_class(modules[path])
        if len(found := places[id(kind.caller(modules[path]) if kind else modules[path])]) > 1:
            raise TargetError(
                f"{' and '.join(map(repr, found))} are one module, and an adapter on it would change all of these places; give "
                "each a module of its own (copy.deepcopy), or leave it out"
            )


def _check_saved(path: str, module: nn.Module) -> None:
    if any(map(holds_packed, module.modules())):
        raise TargetError(f"modules_to_save: {path!r} is quantised and can't be trained; name it in skip then")
    if any(isinstance(m, LoraLayer) for m in module.modules()):
        raise TargetError(f"modules_to_save: {path!r} carries an adapter and can't be trained whole as well")
    refuse_offloaded(f"modules_to_save: {path}", module, "a trained copy")


def _trained_biases(model: nn.Module, config: LoraConfig, layers: Sequence[str], saved: Sequence[str]) -> tuple[str, ...]:
    """Paths of the base's biases that `config.bias` trains; "all" means every parameter of that name."""
    if config.bias == "all":
        for path, module in base_modules(model).items():
            _check_bias(path, module)
        paths = [path for path in base_tensors(model) if path.rpartition(".")[2] == "bias"]
        return tuple(path for path in paths if not any(path.startswith(f"{s}.") for s in saved))
    if config.bias == "lora_only":
        found = {path: model.get_submodule(path) for path in layers}
        found = {path: module for path, module in found.items() if getattr(module, "bias", None) is not None}
        for path, module in found.items():
            _check_bias(path, module)
        return tuple(f"{path}.bias" for path in found)
    return ()


def _check_bias(path: str, module: nn.Module) -> None:
    if "bias" not in module._parameters and isinstance(getattr(module, "bias", None), Tensor):
        raise TargetError(f"{path}: its bias is computed from other tensors (pruned, say); make it plain, or use bias='none'")
