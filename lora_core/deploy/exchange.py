"""An adapter's files from one tool's format into another's.

    exchange("adapter/", "mlx/", "mlx", base="llama/")               # PEFT's files into those of MLX
    exchange("lora.safetensors", "adapter/", "peft", base="unet/")   # another tool's into PEFT's

The update of each layer stays as it is, but for a rounding where a format has one alpha for all layers. What a format has no
place for, and layers whose names can't be mapped, are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.adapter import CONFIG_FILE
from ..files.formats.base import Contents
from ..files.formats.exchange import base_of_directory, check_holds, read_any
from ..files.formats.peft import PEFT, contents_of, write_peft
from ..files.formats.registry import format_named, is_foreign
from ..files.reading import read_object
from ..files.shards import check_free, new_directory
from ..maths.loss import cast


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_adapter` did.

    Attributes:
        output: the new directory.
        read, written: the tools whose formats the files have.
        layers: number of adapted layers.
        dtype: of its tensors, if they were cast.
        energy: {path: share of the update's squared Frobenius norm that is kept}, where it is not all but rounding.
        others: what the file held for other models, and was not written.
    """

    output: str
    read: str
    written: str
    layers: int
    dtype: str | None = None
    energy: Mapping[str, float] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        tools = "" if self.read == self.written else f", read from {self.read} and written for {self.written}"
        cast = f" in {self.dtype}" if self.dtype else ""
        kept = f", keeping at least {min(self.energy.values()):.4%} of an update's squared norm" if self.energy else ""
        others = f"; left out: {', '.join(self.others)}" if self.others else ""
        return f"wrote {self.output}: {self.layers} layers{cast}{tools}{kept}{others}"


def named(dtype: torch.dtype | None) -> str | None:
    """A dtype's name, as it stands in a report: "bfloat16"."""
    return str(dtype).removeprefix("torch.") if dtype else None


def exchange(
    adapter: str | Path,
    output: str | Path,
    to: str,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    hints: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes an adapter in a tool's format, in the directory `output`.

    Args:
        adapter: a directory with PEFT's files, or another tool's file or the directory with it.
        output: directory to make.
        to: name of a format, or "peft".
        base: directory of the base; names and the order of rows are those of its architecture.
        dtype: what to cast the tensors to; None: as they are.
        hints: as `load_adapter` has them.

    Raises:
        LoraError: the files are broken; a layer can't be mapped, or the format has no place for it; `output` exists.
    """
    adapter, output = Path(adapter), Path(output)
    target = None if to == PEFT else format_named(to)
    check_free(output)
    known = base_of_directory(Path(base) if base else None, hints)
    foreign = is_foreign(adapter)
    if not foreign and known.hints.keys() - {"component"}:  # which is for writing, too
        raise ConfigError(f"lora_alpha and enable_lora are hints for other tools' files, and {adapter} is none")
    of_file = known if foreign else replace(known, hints={})
    form, (config, tensors, _), others = read_any(adapter, of_file.hints, lambda: of_file)
    if form is None and target is None:
        raise ConfigError(f"{adapter} has PEFT's format already; say what to convert to (--to, --plain or --dtype)")
    contents = contents_of(adapter, config, tensors)
    if form is None:
        contents = replace(contents, transposed=read_object(adapter / CONFIG_FILE).get("fan_in_fan_out") is True)
    if dtype is not None:
        contents = _cast(contents, dtype)
    if target is not None:
        check_holds(target, contents, adapter)
        contents = target.from_base(contents, known)
    with new_directory(output) as directory:
        if target is None:
            write_peft(directory, contents, known)
        else:
            target.write(directory, contents, known)
    tools = [PEFT if f is None else f.tool for f in (form, target)]
    return ConversionReport(str(output), *tools, len(contents.layers), named(dtype), others=others)


def _cast(contents: Contents, dtype: torch.dtype) -> Contents:
    layers = {
        path: replace(layer, tensors={table: cast(t, dtype, f"{path} {table}") for table, t in layer.tensors.items()})
        for path, layer in contents.layers.items()
    }
    return replace(contents, layers=layers)
