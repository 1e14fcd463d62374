"""Which rows of which layers `trainable_token_indices` means on one model, and what can't be. Changes nothing.

A list means the input embeddings. A layer that the base ties to embeddings with trained rows goes with them, as in PEFT, and
so stays tied. One is trained apart that is named with other tokens, or alone, or with the same tokens by less than its whole
path, for PEFT knows it as tied by that alone (`ensure_weight_tying` does not).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..bases.forwards import refuse_hidden_forward
from ..errors import TargetError
from ..layers import lora_class
from ..spec.config import LoraConfig
from ..spec.targets import closest
from ..spec.tokens import FIELD
from .conventions import input_layer


@dataclass(frozen=True)
class Rows:
    """The rows that are trained of one layer.

    Attributes:
        ids: the tokens.
        owner: path of the layer whose rows they are: of what is tied to others, the embeddings.
    """

    ids: tuple[int, ...]
    owner: str


def plan_tokens(
    model: nn.Module,
    config: LoraConfig,
    modules: Mapping[str, nn.Module],
    taken: Collection[str],
    ties: Iterable[Collection[str]],
    strict: bool = True,
) -> dict[str, Rows]:
    """{path of a layer: its rows that are trained}, owners first.

    Args:
        model: the module at the root.
        config: the settings.
        modules: {path: module} of the base.
        taken: paths of the layers and parameters that get A and B, or are trained whole.
        ties: paths of tensors that are one parameter.
        strict: raise for a name that means no module.

    Raises:
        TargetError: a name means no module, or one of which no rows can be trained, or that has no such token.
    """
    names, tied = _named(model, config, modules, strict), _tied_layers(ties)
    named = {path: ids for path, (_, ids) in names.items()}
    found: dict[str, Rows] = {}
    for path, ids in named.items():
        others = tied.get(path, ())
        unlike = next((other for other in others if named.get(other, ids) != ids), None)
        if unlike and config.ensure_weight_tying:
            raise TargetError(f"{FIELD}: {path!r} and {unlike!r} are tied and have other tokens; name the same for both")
        if unlike is None and isinstance(modules[path], nn.Embedding) and path not in found:
            apart = () if config.ensure_weight_tying else [p for p in others if p in names and names[p][0] != p]
            found |= {p: Rows(ids, path) for p in (path, *others) if p not in apart}
    found |= {path: Rows(ids, path) for path, ids in named.items() if path not in found}
    for path, rows in found.items():
        _check(path, modules[path], rows, taken)
    return found


def _named(
    model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module], strict: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{path: (name that means it, tokens)}."""
    tokens = config.trainable_token_indices
    if tokens is None:
        return {}
    if not isinstance(tokens, Mapping):
        module = input_layer(model)
        paths = [path for path, m in modules.items() if m is module] or [p for p in modules if p.endswith("embed_tokens")]
        if not paths:
            raise TargetError(f"{FIELD}: this model does not say which its embeddings are; name them: {{'path': {[*tokens]}}}")
        return {paths[0]: (paths[0], tokens)}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, ids in tokens.items():
        hits = [path for path in modules if path.endswith(name)]  # PEFT's rule, as for modules_to_save
        if strict and not hits:
            raise TargetError(f"{FIELD}: {name!r} matched no module{closest(name, list(modules))}")
        found |= dict.fromkeys(hits, (name, ids))
    return found


def _tied_layers(ties: Iterable[Collection[str]]) -> dict[str, list[str]]:
    """{path of a layer: the others whose weight is the same parameter}."""
    layers = [[p.removesuffix(".weight") for p in paths if p.endswith(".weight")] for paths in ties]
    return {path: [other for other in tied if other != path] for tied in layers for path in tied}


def _check(path: str, module: nn.Module, rows: Rows, taken: Collection[str]) -> None:
    kind = lora_class(module)
    if kind is None or kind.token_dim is None:
        raise TargetError(
            f"{FIELD}: {path!r} is a {type(module).__name__}, and rows can be trained of embeddings and dense linear layers"
        )
    refuse_hidden_forward(path, module)
    if any(t in (path, f"{path}.weight") or path.startswith(f"{t}.") for t in taken):
        also = f", which is tied to {rows.owner!r}," if rows.owner != path else ""
        raise TargetError(f"{FIELD}: {path!r}{also} carries A and B or is trained whole by the same adapter; leave one out")
    if max(rows.ids) >= len(module.weight):
        raise TargetError(
            f"{FIELD}: {path!r} has {len(module.weight)} rows, and none for the token {max(rows.ids)}; "
            f"call model.resize_token_embeddings({max(rows.ids) + 1}) first"
        )
