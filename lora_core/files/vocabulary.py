"""A vocabulary that grew: embeddings and output layers in an adapter's file, beside A and B, as PEFT has them.

    model.resize_token_embeddings(len(tokenizer))         # tokens were added; their rows are random
    inject(model, config); ...; save_adapter(model, "out/")

The new rows are on no disk but in this file, so both layers are stored whole when the base's own configuration, where it is on
disk, has another size. On another base that has grown as much they are the adapter's own, in place while it is active; they are
not trained. Where nothing tells that a vocabulary grew, the fingerprint does that its rows are others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import is_packed
from ..errors import FileFormatError, StateError
from ..layers import LoraLayer
from ..model.conventions import configs, input_layer, output_layer
from ..model.copies import original_of
from ..model.plan import Plan, base_modules, tied_paths
from ..model.registry import Adapter, find_adapter
from ..model.sharding import values_at, whole
from .fingerprint import hash_of, same_values
from .keys import base_path, copy_key, parse_key


def grown_tensors(model: nn.Module, name: str, save: bool | str) -> dict[str, Tensor]:
    """{key: tensor} of the base's embeddings and output layer that an adapter's file is to hold; none if it needs none.

    Args:
        model: the module at the root.
        name: of the adapter.
        save: True: all that it has not as its own; False: none; "auto": those of a vocabulary that is not the base's on disk,
            unless it has trained every row that is new.

    Raises:
        StateError: one of them is packed.
    """
    adapter = find_adapter(model, name)
    before = _size_on_disk(model, adapter) if save == "auto" else None
    if not save or (save == "auto" and before in (None, _sizes(model))):
        return {}
    tensors = {}
    for path, layer in _layers(model).items():
        new = range(before[0] if before else 0, len(layer.weight))
        if is_packed(layer):
            raise StateError(
                f"{path} is packed, and can't be stored beside A and B; quantise with skip=[{path!r}], or save with "
                "save_embedding_layers=False, without the rows of new tokens"
            )
        for own in _tensors(path, layer):
            trained = own == f"{path}.weight" and set(new) <= _trained(layer, path, name, adapter)
            if own not in adapter.copied and not trained:
                tensors[copy_key(own, adapter.layers, adapter.tokens)] = whole(_of_the_base(model, own).detach())
    return tensors


def with_kept(model: nn.Module, tensors: Mapping[str, Tensor], found: Plan, source: object, strict: bool) -> Plan:
    """The plan with the embeddings and output layers that a file holds of a base that had other rows for new tokens.

    Another base has other rows for all tokens. So the rows that differ must be among the last half, unless not `strict`.

    Raises:
        FileFormatError: they are of a vocabulary of another size.
    """
    layers, ties = _layers(model), tied_paths(model)
    kept, held = dict[str, object](), set[str]()
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        path = base_path(parsed.path) if parsed is not None and parsed.table is None else ""
        layer = layers.get(path.rpartition(".")[0])
        if layer is None or path not in _tensors(path.rpartition(".")[0], layer) or is_packed(layer):
            continue
        own = _of_the_base(model, path)
        held.add(path)
        if own.shape[1:] == tensor.shape[1:] and len(own) != len(tensor):
            raise FileFormatError(
                f"{source} has {path} for {len(tensor)} tokens, and this model has {len(own)}; call "
                f"model.resize_token_embeddings({len(tensor)}) first"
            )
        if path in found.copies or own.shape != tensor.shape or own.is_meta or same_values(own, tensor):
            continue
        if strict and _first_difference(own, tensor) < len(own) // 2:
            continue  # another base's: it has no home here
        group = ("kept", id(own))
        kept |= {p: group for p in (path, *ties.get(id(original_of(model, path)), ())) if p not in found.copies}
    found = dataclasses.replace(found, copies={**found.copies, **kept}, kept=tuple(kept))
    there = {*held, *kept, *(f"{path}.weight" for path in found.tokens)}
    if absent := [f"{path}.weight" for path in layers if kept and f"{path}.weight" not in there]:
        warnings.warn(
            f"{source} holds {next(iter(kept))} with rows of new tokens, and no {absent[0]}, whose new rows stay this model's",
            stacklevel=7,
        )
    return found


def describe_vocabulary(model: nn.Module, name: str, stored: Collection[str]) -> dict[str, str]:
    """{path of a weight: what it is, in one line}, of the embeddings and the output layer that an adapter was trained beside.

    The hash is of one value of each row, but for rows that the adapter trains. What it has all of its own, or its file does
    (`stored`, by keys), is left out.
    """
    adapter, lines = find_adapter(model, name), {}
    for path, layer in _layers(model).items():
        own = f"{path}.weight"
        if own not in adapter.copied and copy_key(own, adapter.layers, adapter.tokens) not in stored and not is_packed(layer):
            weight = _of_the_base(model, own)
            if not weight.is_meta:
                lines[own] = _line(weight, _trained(layer, path, name, adapter))
    return lines


def vocabulary_differs(model: nn.Module, stored: Any, found: Plan) -> str | None:
    """What differs between the lines of a file and this model's vocabulary, in half a line; None: nothing.

    Raises:
        ValueError: `stored` is not as written here.
    """
    if not isinstance(stored, dict) or not all(isinstance(line, str) and len(line.split(" ")) == 3 for line in stored.values()):
        raise ValueError("the fingerprint of the base's embeddings is not as written here")
    for path, layer in _layers(model).items():
        own, rows = f"{path}.weight", found.tokens.get(path)
        if own not in stored or own in found.copies or is_packed(layer) or (weight := _of_the_base(model, own)).is_meta:
            continue
        was, now = stored[own].split(" "), _line(weight, set(rows.ids) if rows else set()).split(" ")
        if was[1] != now[1]:
            return f"{own} was {was[1]}, is {now[1]}"
        if was[0] == now[0] and was[2] != now[2]:
            return f"{own} has other rows, as after resize_token_embeddings"
    return None


# --- what a vocabulary is --------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of what transformers calls the model's input embeddings, and its output layer."""
    ends = [m for m in (input_layer(model), output_layer(model)) if isinstance(m, (nn.Embedding, nn.Linear))]
    return {path: module for path, module in base_modules(model).items() if any(module is end for end in ends)}


def _tensors(path: str, layer: nn.Module) -> list[str]:
    """The paths of a layer's own parameters."""
    return [f"{path}.{name}" for name, parameter in layer._parameters.items() if parameter is not None]


def _of_the_base(model: nn.Module, path: str) -> Tensor:
    """The base's own tensor at `path`, also while adapters are folded in or another's is in its place."""
    owner, _, name = path.rpartition(".")
    layer, own = model.get_submodule(owner), original_of(model, path)
    if isinstance(layer, LoraLayer) and layer.lora_folded and own is layer._parameters.get(name):
        return layer.lora_unfolded[0 if name == layer.weight_name else 1]
    return own


def _trained(layer: nn.Module, path: str, name: str, adapter: Adapter) -> set[int]:
    """The tokens whose rows the adapter trains there."""
    return set(layer.lora_token_ids[name].tolist()) if path in adapter.tokens else set()


def _first_difference(own: Tensor, tensor: Tensor) -> int:
    differs = (own != tensor.to(own)).reshape(len(own), -1).any(1)
    return int(differs.nonzero()[0])


def _line(weight: Tensor, trained: Collection[int]) -> str:
    rows, d = torch.arange(len(weight), device=weight.device), weight.shape[1]
    rows = rows[~torch.isin(rows, torch.tensor(sorted(trained), device=weight.device))] if trained else rows
    values = values_at(weight.detach(), rows * d + rows * 31 % d).cpu().contiguous()
    shape = "x".join(map(str, weight.shape))
    return f"{str(weight.dtype).removeprefix('torch.')} {shape} {hash_of([values.view(torch.uint8).numpy().tobytes()])}"


def _sizes(model: nn.Module) -> list[int]:
    """The size of the vocabulary, as the configuration has it."""
    sizes = (getattr(config, "vocab_size", None) for config in reversed(configs(model)))
    return [size for size in sizes if isinstance(size, int)][:1]


def _size_on_disk(model: nn.Module, adapter: Adapter) -> list[int] | None:
    """The same of the base's own files; None if there are none here that say so."""
    name, sizes = getattr(model, "name_or_path", None) or adapter.config.base_model_name_or_path, _sizes(model)
    if not name or not sizes:
        return None
    path = _config_file(str(name), model)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (AttributeError, OSError, ValueError):
        warnings.warn(
            f"no configuration of {name!r} is on this machine, so it can't be told whether the vocabulary grew since; if it "
            "did, pass save_embedding_layers=True, or its new rows are lost",
            stacklevel=4,
        )
        return None
    parts = (fields.get("text_config"), fields, *fields.values()) if isinstance(fields, dict) else ()
    found = [part["vocab_size"] for part in parts if isinstance(part, dict) and type(part.get("vocab_size")) is int]
    return found[:1] or None


def _config_file(name: str, model: nn.Module) -> Path | None:
    """config.json of a base: in its directory, or as the Hub's client has cached it."""
    if (path := Path(name) / "config.json").is_file():
        return path
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    repo = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{name.replace('/', '--')}"
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    if commit is None and (main := repo / "refs" / "main").is_file():
        commit = main.read_text(encoding="utf-8").strip()
    path = repo / "snapshots" / str(commit) / "config.json"
    return path if path.is_file() else None
