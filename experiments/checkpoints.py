"""Checkpoints: all that a run needs to go on as if it had never stopped, and nothing of the frozen base.

    OUTPUT/checkpoints/step-00000040/tensors.safetensors    what is trained, the optimiser's moments, the random states
                                     trainer_state.json     step, epoch and history, as the Trainer writes them
                                     checkpoint.json        the run's settings, other numbers, hashes of the two files above

Such a directory is there whole or not at all, and believed only if its hashes are right. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.errors import FileFormatError
from lora_core.files.disk import read_safetensors, to_safetensors
from lora_core.files.shards import new_directory

from .errors import ExperimentError
from .record import file_hash, read_json, write_json

CHECKPOINTS = "checkpoints"
TENSORS, STATE, NUMBERS = "tensors.safetensors", "trainer_state.json", "checkpoint.json"


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written and how many are kept.

    Attributes:
        every: after so many steps; None: only when the run is told to stop.
        keep: so many of the newest.
    """

    every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        for flag, value in (("--save-steps", self.every), ("--keep-checkpoints", self.keep)):
            if value is not None and value < 1:
                raise ExperimentError(f"{flag} must be at least 1, not {value}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are as they were written.

    Attributes:
        path: its directory.
        step: optimiser steps that had been done.
        numbers: what checkpoint.json holds.
    """

    path: Path
    step: int
    numbers: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """{name: tensor} of everything that is stored as one, on the CPU."""
        return read_safetensors(self.path / TENSORS)[0]


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` goes below `directory`."""
    return directory / f"step-{step:08d}"


def write(path: Path, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], state: str) -> None:
    """Writes a checkpoint, in place of one that is there already; `state` is the Trainer's.

    Raises:
        OutputError: it can't be written; nothing was left.
    """
    files = {TENSORS: to_safetensors(tensors, {"format": "pt"}), STATE: state.encode()}
    if path.exists():  # the run went on from an older one, or this one is broken
        shutil.rmtree(path)
    with new_directory(path) as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        write_json(staging / NUMBERS, {"step": step, "sha256": hashes, **numbers})


def read(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`.

    Raises:
        ExperimentError: there is none, or a file is not as it was written.
    """
    if not (path / NUMBERS).exists():
        raise ExperimentError(f"{path} is no checkpoint: it has no {NUMBERS}; name a step-N/ of a run's {CHECKPOINTS}/")
    numbers = read_json(path / NUMBERS)
    try:
        step, hashes = int(numbers["step"]), {name: numbers["sha256"][name] for name in (TENSORS, STATE)}
        settings, seconds = dict(numbers["settings"]), float(numbers["seconds"])
        peaks = {name: float(peak) for name, peak in numbers["peaks"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ExperimentError(f"{path / NUMBERS} is not as written here ({error!r}); remove {path}") from None
    for name, expected in hashes.items():
        try:
            found = file_hash(path / name)
        except FileFormatError as error:
            raise ExperimentError(f"{error}; remove {path}") from None
        if found != expected:
            raise ExperimentError(f"{path / name} is not what was written (its hash differs); remove {path}")
    return Checkpoint(path, step, numbers | {"settings": settings, "seconds": seconds, "peaks": peaks})


def newest(directory: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `directory`; None if there is none. What is broken is passed over, with a note."""
    for path in _paths(directory):
        try:
            return read(path)
        except (ExperimentError, FileFormatError) as error:
            print(f"note: passed over: {error}", file=sys.stderr)
    return None


def prune(directory: Path, keep: int) -> None:
    """Removes all but the `keep` newest, and what processes that were killed left half-written."""
    for path in [*list(_paths(directory))[keep:], *directory.glob(".step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)
    if not keep and directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def any_in(directory: Path) -> bool:
    """Whether there is a checkpoint below `directory`, whole or not."""
    return next(_paths(directory), None) is not None


def _paths(directory: Path) -> Iterator[Path]:
    """What is called like a checkpoint, newest first."""
    if directory.is_dir():
        named = (p for p in directory.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))
        yield from sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def check_same(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Refuses to go on with other settings than the checkpoint's.

    Raises:
        ExperimentError: some differ; names each, with both values.
    """
    was, now = dict(_flat(checkpoint.numbers["settings"])), dict(_flat(json.loads(json.dumps(settings))))
    differing = [
        f"{name} ({was.get(name, 'not set')} then, {now.get(name, 'not set')} now)"
        for name in dict.fromkeys((*was, *now))
        if was.get(name) != now.get(name)
    ]
    if differing:
        raise ExperimentError(
            f"--resume: {checkpoint.path} is of a run with other settings: {', '.join(differing)}; give the same ones, or "
            "--overwrite instead of --resume to start anew"
        )


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings, each under its own name, or its parents' too where they would mix up."""
    for name, value in settings.items():
        if not isinstance(value, dict):
            yield name, value
        elif name == "hyperparameters":
            yield from _flat(value)
        else:
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in _flat(value))
