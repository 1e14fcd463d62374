"""What a run leaves behind, and how to read it back.

The files of a run:

    OUTPUT/metrics.json                 every number of the run; written last, so it marks a finished run
    OUTPUT/predictions.txt              what the last epoch's model called each validation sentence (`predictions.py`)
    OUTPUT/adapter/                     the adapter in PEFT's format, with the tokenizer
    OUTPUT/adapter/experiment.json      what predict must know of the run: `AdapterNote`
    OUTPUT/model/                       instead, where no adapter holds what was trained: the whole model, and the same note
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import FileFormatError
from lora_core.files.disk import write_whole
from lora_core.files.reading import open_file, read_object

from .errors import ExperimentError
from .methods import FP32, PRECISIONS, QUANTIZE

METRICS = "metrics.json"
ADAPTER = "adapter"
MODEL = "model"
NOTE = "experiment.json"
LIBRARIES = ("torch", "transformers", "bitsandbytes", "tokenizers", "numpy")
#: What makes two runs the same run.
IDENTITY = ("method", "base_model", "data", "hyperparameters", "seed")
#: Those that are known by a hash of their content too, and not by their name and size alone. Older files have none: they are
#: reported and checked as ever, but no new run takes one for its own.
HASHED = ("base_model", "data")


@dataclass(frozen=True)
class AdapterNote:
    """How the adapter's base, or the model, was used in training: how it was held, as `Method.quantize` has it, how many tokens
    of a sentence it read, and what its products were computed in."""

    quantize: bool | str = False
    max_length: int = 128
    precision: str = FP32

    def write(self, directory: Path) -> None:
        write_json(directory / NOTE, dataclasses.asdict(self))

    @classmethod
    def read(cls, directory: Path) -> AdapterNote:
        """The note beside an adapter; the defaults for an adapter that was made elsewhere and has none."""
        path = directory / NOTE
        if not path.exists():
            return cls()
        fields = read_json(path)
        try:
            quantize = fields["quantize"]
            if quantize not in QUANTIZE.values():
                raise ValueError(f"quantize is {quantize!r}")
            precision = fields.get("precision", FP32)  # older notes do not say
            if precision not in PRECISIONS:
                raise ValueError(f"precision is {precision!r}")
            return cls(quantize, int(fields["max_length"]), precision)
        except (KeyError, TypeError, ValueError) as error:
            raise ExperimentError(f"{path} is not as written here ({error!r}); remove it to use the defaults") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, a line for each key, whole or not at all."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_whole(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ExperimentError: the file can't be read, or holds something else.
    """
    try:
        return read_object(path, once=False)
    except FileFormatError as error:
        raise ExperimentError(str(error)) from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        FileFormatError: it is no regular file, or can't be read.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def finished(output: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of an earlier run of `plan` in `output`; None when there is none and `output` is free.

    Raises:
        ExperimentError: `output` holds the results of another run, or is no directory.
    """
    try:
        taken = output.exists() and not output.is_dir()
    except OSError as error:  # a name that is too long, say
        raise ExperimentError(f"--output-dir: {str(output)!r} can't be used: {error.strerror or error}") from None
    if taken:
        raise ExperimentError(f"--output-dir: {str(output)!r} is a file; name a directory")
    path = output / METRICS
    if not path.exists():
        return None
    metrics = read_json(path)
    planned = json.loads(json.dumps(plan))
    if differing := [_named(key, metrics.get(key)) for key in IDENTITY if not _same(key, metrics.get(key), planned[key])]:
        raise ExperimentError(
            f"--output-dir: {str(output)!r} holds another run (its {', '.join(differing)} differ); pass --overwrite to "
            "replace it, or another directory"
        )
    return metrics


def _named(key: str, old: Any) -> str:
    """How a part of the identity is called that differs; older files do not tell data, or bases, of one name apart."""
    return f"{key} (no hash recorded)" if key in HASHED and isinstance(old, dict) and "sha256" not in old else key


def _same(key: str, old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        # How the choice fell on a base or on data does not matter once it is the same one, nor its directory's name.
        beside = {"why", "source"} | ({"name"} if key == "data" and "sha256" in old else set())
        old, new = ({name: value for name, value in d.items() if name not in beside} for d in (old, new))
    return old == new


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that the numbers depend on, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):  # a run without 4 bits needs no bitsandbytes
            found[name] = importlib.metadata.version(name)
    return found


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in MiB."""
    try:
        # Not getrusage: what that counts outlives an exec, and a run started by a larger process would begin with its peak.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return round(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024, 1)
    except (OSError, StopIteration):
        pass
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
