"""Another tool's adapter, looked at without its base: by the tool's own names, and told what a program would refuse of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..files.formats.base import Base
from ..files.formats.exchange import read_contents
from ..files.formats.peft import as_peft
from ..files.formats.registry import find_format
from .updates import AdapterUpdates, updates_of


class Foreign(NamedTuple):
    """What another tool's file holds.

    Attributes:
        tool: the tool.
        file: the file.
        updates: its layers, by the tool's own names.
        notes: what it does not say.
    """

    tool: str
    file: Path
    updates: AdapterUpdates
    notes: tuple[str, ...]


def read_as_it_is(path: Path) -> Foreign | None:
    """Another tool's adapter, with nothing mapped; None if it is none.

    Raises:
        FileFormatError: the file is broken, or of no format that is known.
    """
    found = find_format(path)
    if found is None:
        return None
    form, source = found
    contents, notes = read_contents(form, source, Base()), ()
    if any(layer.alpha is None for layer in contents.layers.values()):
        notes = ("the file does not say lora_alpha, so scaling 1 is shown; say it when the file is loaded",)
        layers = {p: replace(v, alpha=float(v.alpha or v.rank)) for p, v in contents.layers.items()}
        contents = replace(contents, layers=layers)
    return Foreign(form.tool, source.path, updates_of(path, as_peft(source, contents, Base())), notes)
