"""A vocabulary that grew, merged over files: embeddings that came with an adapter, and rows that are trained for some tokens.

An adapter's embeddings go before the base's, which have fewer rows; config.json says how many there are. Rows go into the
weight of their layer, and into what the base ties to it if that layer is the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import StateError, WrongBaseError
from ..files.checkpoint import Checkpoint
from ..files.fingerprint import same_values
from ..integrations.tied_names import may_be_tied
from ..layers import LoraLayer
from ..methods.registry import TOKENS
from ..spec.targets import is_embedding
from .basis import check_stored
from .placement import Placement, place
from .updates import AdapterUpdates


@dataclass(frozen=True)
class Rows:
    """The rows that an adapter has for some tokens of one layer, (k, d)."""

    ids: tuple[int, ...]
    rows: Tensor

    def put_on(self, layer: LoraLayer, name: str) -> None:
        """Gives the adapted `layer` these rows, as the adapter `name`."""
        layer.add_tables(table.name for table in TOKENS.tables)
        values = {"lora_tokens": self.rows, "lora_token_ids": torch.tensor(self.ids, device="cpu")}
        for table, value in values.items():
            getattr(layer, table)[name] = nn.Parameter(value, requires_grad=False)
        layer.put(name, TOKENS, 1.0, 0.0)


def place_grown(base: Checkpoint, adapters: Sequence[AdapterUpdates]) -> tuple[Placement, tuple[AdapterUpdates, ...]]:
    """Where the adapters' tensors go, as `place` says, with embeddings of a vocabulary that grew as the adapters' own.

    Raises:
        WrongBaseError: also if an adapter has new rows for a part of what has a row for each token, and not for the rest.
    """
    placement = place(base, adapters)
    taken = tuple(_with_grown(base, placement, adapter) for adapter in adapters)
    if any(adapter.kept for adapter in taken):
        placement = place(base, taken)
    check_stored(taken, placement, base)
    sizes = {name: _rows_in_base(base, placement, name) for name in (*placement.names, *placement.added)}
    own = {name: (tensor, name in adapter.kept) for adapter in taken for name, tensor in adapter.copies.items()}
    whole = {name: len(tensor) for name, (tensor, kept) in own.items() if kept or _is_by_token(name)}
    grown = {name: rows for name, rows in whole.items() if sizes.get(name) not in (None, rows)}
    for adapter in taken:
        for path, (ids, _) in adapter.tokens.items():
            before = _rows_in_base(base, placement, f"{path}.weight")
            if before is not None and f"{path}.weight" not in grown and (new := set(range(before, max(ids) + 1))):
                if not new <= set(ids):
                    raise WrongBaseError(
                        f"{adapter.directory} trains token {max(ids)} of {path}, and the base has {before} rows; those between "
                        "are in neither: save the adapter with save_embedding_layers=True"
                    )
                grown |= dict.fromkeys(_followers(placement, adapter, path), max(ids) + 1)
    if not grown:
        return placement, taken
    (size, *others), old = sorted(set(grown.values())), max(sizes[name] or 0 for name in grown)
    one = {name for group in placement.tied if not grown.keys().isdisjoint(group) for name in group}
    left = [name for name, rows in sizes.items() if rows == old and name not in grown and (name in one or _is_by_token(name))]
    if others or left:
        what = f"{left[0]} has {old} rows" if left else f"another part has {others[0]}"
        raise WrongBaseError(f"an adapter has {next(iter(grown))} for {size} tokens, and {what}; save the base resized first")
    return replace(placement, config=_resized(placement.config, size), vocabulary=size), taken


def rows_of(placement: Placement, adapters: Sequence[AdapterUpdates]) -> dict[str, dict[str, Rows]]:
    """{path of a layer: {adapter: the rows that it has there}}.

    Raises:
        StateError: two adapters have one for the same token.
    """
    found: dict[str, dict[str, Rows]] = {}
    for i, adapter in enumerate(adapters):
        for path, (ids, rows) in adapter.tokens.items():
            for name in _followers(placement, adapter, path):
                found.setdefault(name.removesuffix(".weight"), {})[f"rows{i}"] = Rows(ids, rows)
    for path, own in found.items():
        ids = [token for rows in own.values() for token in rows.ids]
        if len(set(ids)) < len(ids):
            raise StateError(f"two adapters train the same token of {path!r}; merge one of them, or train on the merged model")
    return found


def extended(W: Tensor, rows: Mapping[str, Rows]) -> Tensor:
    """W with rows, of zeros, for the tokens that have one in `rows` and none in W."""
    missing = max((max(own.ids) + 1 for own in rows.values()), default=0) - len(W)
    return torch.cat([W, W.new_zeros(missing, *W.shape[1:])]) if missing > 0 else W


def _followers(placement: Placement, adapter: AdapterUpdates, path: str) -> list[str]:
    """The names of tensors that rows trained at `path` go into: that layer's, and what is tied to it if it is embeddings."""
    name = f"{path}.weight"
    group = next((group for group in placement.tied if name in group), (name,))
    named = {other for other in group if other.removesuffix(".weight") in adapter.tokens}
    if not is_embedding(path) or any(not _same(adapter, path, other.removesuffix(".weight")) for other in named):
        return [name]
    return [other for other in group if other in placement.names or other in placement.added or other == name]


def _same(adapter: AdapterUpdates, a: str, b: str) -> bool:
    (ids, rows), (others, other_rows) = adapter.tokens[a], adapter.tokens[b]
    return ids == others and torch.equal(rows, other_rows)


def _with_grown(base: Checkpoint, placement: Placement, adapter: AdapterUpdates) -> AdapterUpdates:
    """The adapter with what it has stored of a base that grew as its own."""
    known, kept = placement.aliases | placement.names, {}
    for name, own in adapter.base_tensors.items():
        source = base.tensors.get(known.get(name, ""))
        if source is not None and _is_by_token(name) and source.shape[1:] == own.shape[1:]:
            W = source.read()
            n = min(len(W), len(own))
            # Another base has other rows for all tokens; see `files/vocabulary.py`.
            differs = (W[:n] != own[:n].to(W)).reshape(n, -1).any(1).nonzero()
            if not same_values(W, own) and (not len(differs) or int(differs[0]) >= n // 2):
                one = [other for other, its in placement.names.items() if its == known[name]]  # of a tie
                kept |= {other: own for other in (name, *one) if other not in adapter.copies}
    rest = {name: own for name, own in adapter.base_tensors.items() if name not in kept}
    return replace(adapter, copies=adapter.copies | kept, base_tensors=rest, kept=frozenset(kept)) if kept else adapter


def _is_by_token(name: str) -> bool:
    """Whether a tensor has a row for each token, by its name: embeddings, output layers, and the biases of those."""
    return may_be_tied(f"{name.rpartition('.')[0]}.weight")


def _rows_in_base(base: Checkpoint, placement: Placement, name: str) -> int | None:
    source = base.tensors.get((placement.aliases | placement.names).get(name, ""))
    return source.shape[0] if source is not None and source.shape else None


def _resized(config: dict, size: int) -> dict:
    """config.json with a vocabulary of another size, at the top or in the part that is about text."""
    if "vocab_size" in config or not isinstance(config.get("text_config"), dict):
        return config | {"vocab_size": size}
    return config | {"text_config": config["text_config"] | {"vocab_size": size}}
