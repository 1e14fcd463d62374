"""Which tensor of a base each name of an adapter means, and what the merged checkpoint's config.json says.

An adapter names the layers of the model that it was trained on; a checkpoint may have been saved from another model around
the same backbone. So names may differ by a prefix (all of them by the same one), heads come and go with the task, and tied
weights stand in the file once:

    adapter of BertForSequenceClassification     bert.encoder.layer.0.attention.self.query
    checkpoint of BertModel                           encoder.layer.0.attention.self.query.weight

Where transformers has renamed modules, and the files have the names of then, `moved.py` has brought the adapters to these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StateError, WrongBaseError
from ..files.checkpoint import Checkpoint
from ..integrations.model_class import ModelClass, known_class
from ..integrations.tied_names import OUTPUT_LAYER, may_be_tied, tied_groups
from ..model.replicate import refuse_replicated
from ..spec.targets import is_embedding, match_saved_modules, select_targets
from .updates import AdapterUpdates

#: {task: how the class of a model for it is called}, for the tasks that bring a head.
CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_CLASS = re.compile(r"(\w+?)(Model|LMHeadModel|For[A-Z]\w*)")
_LABELS = re.compile(r"(?:.*\.)?(?:classifier|score|qa_outputs)(?:\.out_proj)?\.(?:weight|bias)")
_IN_A_BLOCK = re.compile(r"(?:^|\.)\d+\.")


@dataclass(frozen=True)
class Placement:
    """What the merged checkpoint holds.

    Attributes:
        names: {name of a tensor in it: name of the base's tensor that it is, or is made from}.
        added: names of tensors that only the adapters have.
        aliases: {name that is not in it, since its tensor is there under another: that tensor of the base}.
        config: its config.json, but for what the dtype and 4-bit weights change there.
        tied: groups of names that the base has as one tensor each.
        vocabulary: how many tokens there are, if not as many as in the base.
    """

    names: dict[str, str]
    added: tuple[str, ...]
    aliases: dict[str, str]
    config: dict[str, Any]
    tied: tuple[tuple[str, ...], ...] = ()
    vocabulary: int | None = None

    def modules(self) -> list[str]:
        """Paths of the modules with a weight."""
        return [name.removesuffix(".weight") for name in (*self.names, *self.added) if name.endswith(".weight")]

    @property
    def architecture(self) -> str:
        """The class of the model, as transformers calls it."""
        return architecture_of(self.config)


def place(base: Checkpoint, adapters: Sequence[AdapterUpdates]) -> Placement:
    """Matches the adapters' names with the base's.

    Raises:
        WrongBaseError: the base lacks a layer that an adapter updates, or has one that an adapter should update and
            does not.
        StateError: two adapters have a tensor of their own for the same path, or tied weights can't be told apart.
        ConfigError: an adapter is for a model of replicated layers.
    """
    for adapter in adapters:
        refuse_replicated(adapter.config, adapter.directory)
    layers = list(dict.fromkeys(path for adapter in adapters for path in adapter.layers))
    if inside := next((path for path in layers if ".base_layer." in path), None):
        raise StateError(
            f"{inside.partition('.base_layer.')[0]} is an nn.MultiheadAttention, whose adapter is merged in memory: "
            "load_adapter, then merge_and_unload"
        )
    weights = {path: update.weight for adapter in adapters for path, update in adapter.layers.items()}
    copies = _copies(adapters)
    rows = {f"{path}.weight" for adapter in adapters for path in adapter.tokens}
    touched = {*weights.values(), *copies, *rows}
    config = _config(base, adapters)
    # Numbered blocks are never tied, nor are heads of labels; for the rest it is worth the seconds that transformers takes.
    named = touched | {name for adapter in adapters for name in adapter.base_tensors}
    ask = not all(_IN_A_BLOCK.search(name) or _LABELS.fullmatch(name) for name in named)
    known = known_class(base.directory, architecture_of(config)) if ask else None
    groups = known.tied if known else ()
    tied = {name for group in groups for name in group}
    sure = [name for name in weights.values() if name not in tied and not may_be_tied(name)]  # to be in the files
    names, backbone = _prefixed(base, sure, adapters), _common_root(sure)
    same_class = config.get("architectures") == base.config.get("architectures")
    if not same_class and backbone:
        # Another task's heads have no place beside the adapter's: transformers would call them unexpected.
        names = {name: source for name, source in names.items() if name in copies or name.startswith(f"{backbone}.")}
    one: tuple[tuple[str, ...], ...] = ()
    if tied or any(map(may_be_tied, touched)):
        names, config, one = _untied(names, config, touched, base, adapters, known)
    if same_class and known is not None:
        _check_renamed(names, copies, base, known)
    missing = [path for path in layers if weights[path] not in names]
    if missing:
        raise WrongBaseError(
            f"{base.directory} has no weight for {missing[0]!r} and {len(missing) - 1} more of the adapter's {len(layers)} "
            "layers; use the base it was trained on"
        )
    added = tuple(name for name in copies if name not in names)
    sources = {name: names[other] for group in groups for other in group if other in names for name in group}
    aliases = {name: source for name, source in sources.items() if name not in names and name not in added}
    placement = Placement(names, added, aliases, config, one)
    for adapter in adapters:
        _check_complete(placement, base, adapter)
    return placement


def _copies(adapters: Sequence[AdapterUpdates]) -> dict[str, AdapterUpdates]:
    owners: dict[str, AdapterUpdates] = {}
    for adapter in adapters:
        for name in adapter.copies:
            if name in owners:
                raise StateError(
                    f"{owners[name].directory} and {adapter.directory} both have a {name!r} of their own; "
                    "merge one of them, or train the second on the merged model"
                )
            owners[name] = adapter
    return owners


def _prefixed(base: Checkpoint, known: Sequence[str], adapters: Sequence[AdapterUpdates]) -> dict[str, str]:
    """The same as `prefixed`.

    Raises:
        WrongBaseError: there is no such prefix.
    """
    if (names := prefixed(base, known)) is not None:
        return names
    missing = next(name for name in known if name not in base.tensors)
    raise WrongBaseError(
        f"{base.directory} has no weight for the layer {missing.removesuffix('.weight')!r} of {adapters[0].directory}, with "
        f"or without a prefix; its tensors are called like {max(base.tensors, key=len, default='')!r}; use the base it was "
        "trained on, and for a model whose tensors transformers renames as it loads them, merge_and_unload"
    )


def prefixed(base: Checkpoint, known: Sequence[str]) -> dict[str, str] | None:
    """{name as adapters have it: name in the base}, for one prefix that may have to be added or taken off; None: there is none.

    `known` are names of tensors that must be in the files.
    """
    if all(name in base.tensors for name in known):
        return {name: name for name in base.tensors}
    first = known[0]
    for at in (i for i, letter in enumerate(first) if letter == "."):
        prefix = first[: at + 1]
        if all(n.startswith(prefix) and n.removeprefix(prefix) in base.tensors for n in known):
            return {f"{prefix}{name}": name for name in base.tensors}
    for name in base.tensors:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            if all(f"{prefix}{other}" in base.tensors for other in known):
                return {n.removeprefix(prefix): n for n in base.tensors if n.startswith(prefix)}
    return None


def _common_root(layers: Sequence[str]) -> str | None:
    """The module at the top that holds all the layers."""
    roots = {path.partition(".")[0] for path in layers}
    return roots.pop() if len(roots) == 1 else None


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class of the model that a config.json is of, as transformers calls it; "" if it does not say."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _config(base: Checkpoint, adapters: Sequence[AdapterUpdates]) -> dict[str, Any]:
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    for adapter in adapters:
        suffix = CLASSES.get(adapter.config.task_type or "")
        if suffix and (match := _CLASS.fullmatch(architecture_of(config))) and match[2] != suffix:
            config["architectures"] = [match[1] + suffix]
        rows = label_rows([adapter])
        labels = adapter.labels if adapter.labels and len(set(adapter.labels)) == rows else None
        if suffix and rows and (labels or rows != _label_count(config)):
            labels = labels or [f"LABEL_{i}" for i in range(rows)]
            config["id2label"] = {str(i): label for i, label in enumerate(labels)}
            config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config


def label_rows(adapters: Sequence[AdapterUpdates]) -> int | None:
    """How many labels the adapters' own head tells apart; None if they have none."""
    copies = (pair for adapter in adapters for pair in adapter.copies.items())
    return next((len(tensor) for name, tensor in copies if _LABELS.fullmatch(name)), None)


def _label_count(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # transformers' own default


def _untied(
    names: dict[str, str],
    config: dict[str, Any],
    touched: Collection[str],
    base: Checkpoint,
    adapters: Sequence[AdapterUpdates],
    known: ModelClass | None,
) -> tuple[dict[str, str], dict[str, Any], tuple[tuple[str, ...], ...]]:
    """With what is tied apart, if the adapters change a part of it; and the groups of names that the base ties.

    An adapter changes the tensors that it names, and no other: so it was trained, and so the merged model computes. What the
    base has once is then there under each of its names, since no library ties some of them and not the rest.
    """
    architecture, tie = architecture_of(config), config.get("tie_word_embeddings")
    if tie is False or (tie is None and OUTPUT_LAYER in names):
        return names, config, ()
    groups = tied_groups(known, architecture, names)
    if groups is None:
        raise StateError(
            f"{base.directory}: the adapter changes weights that a {architecture} ties to others, whose names are not known "
            "here; install transformers, which knows them, or merge in memory: load_adapter, then merge_and_unload"
        )
    hit = [group for group in groups if not touched.isdisjoint(group)]
    if all(_stays_tied(group, adapters) for group in hit):
        return names, config, groups
    names = dict(names)
    for group in groups:
        source = next((names[name] for name in group if name in names), None)
        names |= {name: source for name in group if name not in names and source is not None}
    return names, config | {"tie_word_embeddings": False}, groups


def _stays_tied(group: Sequence[str], adapters: Sequence[AdapterUpdates]) -> bool:
    """Whether an adapter has what this group of names means as one tensor: trained so (`ensure_weight_tying`), not trained, or
    with the same rows for some tokens."""
    for adapter in adapters:
        own = [adapter.copies[name] for name in group if name in adapter.copies]
        whole = adapter.config.ensure_weight_tying and len(own) == len(group)
        whole = whole or all(name in adapter.kept for name in group if name in adapter.copies)
        rows = {path: adapter.tokens[path] for path in (n.removesuffix(".weight") for n in group) if path in adapter.tokens}
        if rows and not any(map(is_embedding, rows)):
            return False
        if any(a[0] != b[0] or not torch.equal(a[1], b[1]) for a, b in zip(rows.values(), [*rows.values()][1:], strict=False)):
            return False
        if any(f"{path}.weight" in group for path in adapter.layers) or (own and not whole):
            return False
        if any(not torch.equal(own[0], other) for other in own):
            return False
    return True


def _check_renamed(names: Collection[str], copies: Iterable[str], base: Checkpoint, known: ModelClass) -> None:
    """Raises a WrongBaseError if the base has under another name what an adapter trained whole: it would be there twice."""
    absent = [name for name in copies if name not in names and name in known.tensors]
    other = [name for name in names if name not in known.tensors and known.renamed(name) in absent]
    if absent and other:
        raise WrongBaseError(
            f"{base.directory} has no {absent[0]!r}, which the adapter trained whole, and tensors that transformers renames as "
            f"it loads them, such as {other[0]!r}; merge in memory: load_adapter, then merge_and_unload"
        )


def _check_complete(placement: Placement, base: Checkpoint, adapter: AdapterUpdates) -> None:
    """Raises a WrongBaseError if the base has a layer that the configuration targets and the adapter has nothing for."""
    modules = placement.modules()
    above = {".".join(path.split(".")[:n]) for path in modules for n in range(1, path.count(".") + 2)}
    saved = match_saved_modules(adapter.config.saved_module_patterns, adapter.config.saved_module_patterns, sorted(above))
    wide = [path for path in modules if len(_shape(placement, base, f"{path}.weight")) > 1]
    matrices = [name for name in placement.names if len(_shape(placement, base, name)) > 1]
    targets = select_targets(adapter.config, wide, wide, saved, strict=False, parameters=matrices)
    if absent := [path for path in targets.paths if not {path, path.removesuffix(".weight")} & adapter.layers.keys()]:
        raise WrongBaseError(
            f"{adapter.directory} has nothing for {absent[0]!r} and {len(absent) - 1} more of the base's layers, which its "
            "target_modules mean; use the base it was trained on"
        )


def _shape(placement: Placement, base: Checkpoint, name: str) -> tuple[int, ...]:
    return base.tensors[placement.names[name]].shape if name in placement.names else ()
