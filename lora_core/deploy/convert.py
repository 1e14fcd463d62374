"""An adapter directory into another: plain LoRA, which every reader knows, another dtype, or another tool's format.

    convert_adapter("adapter/", "plain/", plain=True, base="base/", r=32)   # DoRA: the nearest plain LoRA of rank 32
    convert_adapter("pissa/", "plain/", plain=True, initial="pissa-start/") # PEFT's PiSSA and OLoRA: exact, rank 2r
    convert_adapter("adapter/", "small/", dtype=torch.float16)
    convert_adapter("adapter/", "mlx/", to="mlx", base="base/")             # another tool's format: see `exchange.py`

A scaling of alpha / sqrt(r) becomes one of alpha / r, exactly. DoRA's update, f (W + s B A) - W, needs the base, and is not
of low rank: the report says what share of it is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, FileFormatError
from ..files.adapter import CONFIG_FILE, FINGERPRINT, WEIGHTS_FILE, config_path, read_weights, weights_path
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.config import HARMLESS_INITIALISERS, MAX_BYTES
from ..files.disk import to_safetensors, write_whole
from ..files.fingerprint import settings_hash
from ..files.formats.peft import PEFT
from ..files.formats.registry import is_foreign
from ..files.keys import base_path, layer_keys_of, parse_key
from ..files.reading import parse_json, read_object
from ..files.shards import new_directory
from ..files.started import other_base
from ..maths.loss import cast
from ..maths.lowrank import best_of_matrix
from ..methods.base import refuse_unmergeable
from ..methods.registry import all_tables, method_of
from ..methods.start import start
from ..spec.checks import check_alpha, check_rank
from ..spec.config import ALL_LINEAR, LoraConfig
from ..spec.starts import SUBTRACTED, starts_from_weight
from .companions import companions, copy_companions
from .exchange import ConversionReport, exchange, named
from .layer_update import carrier
from .placement import place
from .updates import AdapterUpdates, read_updates

#: The files that go along with an adapter: the tokenizer and the like. A probe's logits would be another adapter's.
BESIDE = ("*.json", "*.txt", "*.md", "*.model", "*.spm", "*.jinja")
PLAIN = LoraConfig(target_modules=ALL_LINEAR)  # what decides the keys of plain LoRA


def convert_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    plain: bool = False,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    r: int | None = None,
    initial: str | Path | None = None,
    to: str | None = None,
    hints: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes an adapter anew, in the directory `output`; as safetensors, also one that torch has pickled.

    Args:
        adapter: directory of the adapter, or another tool's file.
        output: directory to make.
        plain: whether to make it plain LoRA.
        dtype: what to cast floating-point tensors to; None: as they are.
        base: directory of the base; needed for DoRA, for what else is not plain LoRA, and for most of other tools' formats; of
            PiSSA and OLoRA instead of `initial`.
        r: for those, the rank of the new one; None: that of the old.
        initial: for an adapter of PEFT that moved a part of the base into A and B when it started (PiSSA, OLoRA, CorDA):
            directory of the adapter as it was before training.
        to: name of the format to write (see `files/formats/`); None: PEFT's.
        hints: what another tool's file does not say, as for `load_adapter`.

    Raises:
        LoraError: the files are broken, or there is nothing to convert, or something that it takes is not given.
    """
    directory = Path(adapter)
    if to is not None or hints or is_foreign(directory):
        if plain or r is not None or initial is not None:
            raise ConfigError("--plain, --rank and --initial are for adapters in PEFT's format; convert one after the other")
        return exchange(directory, output, to or PEFT, base=base, dtype=dtype, hints=hints)
    fields = read_object(config_path(directory), MAX_BYTES)
    pickled = weights_path(directory).name != WEIGHTS_FILE  # to be written as safetensors
    if not plain and dtype is None and not pickled:
        raise ConfigError("say what to convert to: --to, --plain, --dtype, or the last two")
    if r is not None:
        check_rank("r", r)
    energy: dict[str, float] = {}
    if plain and (fields.get("init_lora_weights") or True) not in HARMLESS_INITIALISERS:
        tensors, fields = _without_start(directory, fields, initial, base)
        metadata = {"format": "pt"}
    else:
        updates = read_updates(directory)
        tensors, metadata = read_weights(directory)
        method = method_of(updates.config)
        if plain:
            refuse_unmergeable(method, directory)
        if plain and not method.is_plain:
            if base is None:
                raise ConfigError(f"{directory} is {method.label}, {method.needs_base}; name it with --base")
            tensors, fields, energy = _approximated(updates, open_checkpoint(Path(base)), tensors, fields, r)
        elif plain and updates.config.use_rslora:
            fields = _with_scalings(fields, updates)
        elif plain and dtype is None and not pickled:
            raise ConfigError(f"{directory} is plain LoRA already")
    beside = [path for path in companions(directory, BESIDE) if path.name != CONFIG_FILE]
    with new_directory(Path(output)) as new:
        copy_companions(beside, new)
        write_whole(new / CONFIG_FILE, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())
        write_whole(new / WEIGHTS_FILE, to_safetensors(tensors, {"format": "pt"}))
        made = read_updates(new)
        if dtype is not None:
            # Cast, they would be another base's.
            stored = {key for key in tensors if base_path(parse_key(key).path) in made.base_tensors}
            cast_too = {key for key, t in tensors.items() if t.is_floating_point() and key not in stored}
            tensors = {key: cast(t, dtype, key) if key in cast_too else t for key, t in tensors.items()}
        if mark := parse_json(metadata.get(FINGERPRINT, "null"), once=False):
            mark["settings"] = settings_hash(made.config, made.settings)
            metadata[FINGERPRINT] = json.dumps(mark)
        write_whole(new / WEIGHTS_FILE, to_safetensors(tensors, metadata | {"format": "pt"}))
    return ConversionReport(str(output), PEFT, PEFT, len(made.layers), named(dtype), energy)


def _with_scalings(fields: dict[str, Any], updates: AdapterUpdates) -> dict[str, Any]:
    """The fields of plain LoRA with the same scalings: alpha = s r for each layer."""
    alphas = {path: update.scaling * update.rank for path, update in updates.layers.items()}
    common = max(set(alphas.values()), key=list(alphas.values()).count)
    others = {path.replace(".", r"\."): alpha for path, alpha in alphas.items() if alpha != common}
    return fields | {"use_rslora": False, "lora_alpha": common, "alpha_pattern": others}


def _approximated(
    updates: AdapterUpdates, base: Checkpoint, tensors: Mapping[str, Tensor], fields: dict[str, Any], r: int | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
    """Any adapter as plain LoRA: on each layer the best factors of rank r for its whole update."""
    placement = place(base, [updates])
    kept = {key: t for key, t in tensors.items() if parse_key(key).table is None}
    fields = method_of(updates.config).as_plain(fields)
    energy, ranks = {}, {}
    for path, update in updates.layers.items():
        layer = carrier(update.plain_layer(base.tensors[placement.names[f"{path}.weight"]].read(), updates.transposed))
        update.put_on(layer, "default")
        D = layer.as_matrix(layer.folded_weight(["default"])) - layer.as_matrix(layer.dense_weight())
        ranks[path] = min(r or update.rank, *D.shape)
        A, B, energy[path] = best_of_matrix(D, ranks[path])
        old, shapes = next(iter(update.tensors.values())), layer.file_shapes(layer, len(A))
        keys = layer_keys_of(path, update.embedding, PLAIN)
        kept[keys["lora_A"]] = A.to(old.dtype).reshape(shapes["A"])
        kept[keys["lora_B"]] = B.to(old.dtype).reshape(shapes["B"])
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    patterns = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != common}
    fields = fields | {"use_rslora": False, "r": common, "lora_alpha": common}  # scaling 1
    return kept, fields | {"rank_pattern": patterns, "alpha_pattern": patterns}, energy


def _without_start(
    directory: Path, fields: dict[str, Any], initial: str | Path | None, base: str | Path | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """B A - B0 A0 as one product of rank 2r, for the base that the start was taken from."""
    kind = fields["init_lora_weights"]
    if kind not in SUBTRACTED and not starts_from_weight(kind):
        raise FileFormatError(f"{directory}: {other_base(kind)}")
    again = base is not None and starts_from_weight(kind)
    if initial is None and not again:
        or_base = ", or the base with --base" if starts_from_weight(kind) else ""
        raise ConfigError(
            f"{directory} started as {kind!r}, which changed the base; name the adapter as it was then with --initial{or_base}"
        )
    now, _ = read_weights(directory)
    then = _start_again(directory, base) if initial is None else read_weights(Path(initial))[0]
    tensors, tables = dict(now), {key: parsed.table for key in now if (parsed := parse_key(key))}
    if fields.get("use_rslora") or any(table and all_tables()[table].form == "scale" for table in tables.values()):
        raise ConfigError(f"{directory} is DoRA or rank-stabilised besides {kind!r}; only plain {kind!r} is converted")
    check_rank("r", fields.get("r"))
    check_alpha("lora_alpha", fields.get("lora_alpha"))
    for key in (key for key, table in tables.items() if table in ("lora_A", "lora_B")):
        if key not in then or then[key].shape != now[key].shape or now[key].dim() < 2:
            raise FileFormatError(f"{initial} has no {key} of the same shape; it is not the start of {directory}")
        is_A = tables[key] == "lora_A"
        tensors[key] = torch.cat([now[key], then[key]]) if is_A else torch.cat([now[key], -then[key]], dim=1)
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        for value in pattern.values() if isinstance(pattern, dict) else [pattern]:
            check_alpha(name, value)
    doubled = {name: {k: 2 * v for k, v in pattern.items()} for name, pattern in patterns.items()}
    return tensors, fields | doubled | {
        "init_lora_weights": True,
        "r": 2 * fields["r"],
        "lora_alpha": 2 * fields["lora_alpha"],
    }


def _start_again(directory: Path, base: str | Path) -> dict[str, Tensor]:
    """A and B as they started from the weights of the base."""
    updates, checkpoint = read_updates(directory, started=True), open_checkpoint(Path(base))
    placement, init = place(checkpoint, [updates]), updates.config.init_lora_weights
    then = {}
    for path, update in updates.layers.items():
        weight = checkpoint.tensors[placement.names[f"{path}.weight"]].read()
        layer = carrier(update.plain_layer(weight, updates.transposed))
        W = layer.as_matrix(layer.dense_weight())
        A, B, _ = start(init, W.new_empty(0), layer.matrix_shape(layer), update.rank, update.scaling, lambda W=W: W)
        keys, shapes = layer_keys_of(path, update.embedding, PLAIN), layer.file_shapes(layer, update.rank)
        then |= {keys["lora_A"]: A.reshape(shapes["A"]), keys["lora_B"]: B.reshape(shapes["B"])}
    return then
