"""Which formats there are: a file's, found by what is in it."""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigError, FileFormatError
from ..adapter import CONFIG_FILE, LEGACY_WEIGHTS_FILE, WEIGHTS_FILE
from ..disk import is_directory, is_file
from .base import FORMATS, AdapterFormat
from .diffusers import Diffusers
from .gguf import Gguf
from .kohya import Kohya, other_method
from .litgpt import Litgpt
from .loralib import Loralib
from .mlx import Mlx
from .peft import PEFT
from .source import SUFFIXES, Source
from .torchtune import Torchtune
from .vllm import Vllm

#: In the order in which they are asked: litgpt's names end as loralib's do.
FORMATS.update({form.name: form for form in (Kohya(), Diffusers(), Mlx(), Torchtune(), Litgpt(), Loralib(), Gguf(), Vllm())})


def format_named(name: str) -> AdapterFormat:
    """The format of this name. Raises a ConfigError if there is none."""
    if name not in FORMATS:
        raise ConfigError(f"no format {name!r}; there are {', '.join((PEFT, *FORMATS))}")
    return FORMATS[name]


def is_peft(path: Path) -> bool:
    """Whether it is a directory with a weights file of PEFT's."""
    return is_directory(path) and any(is_file(path / name) for name in (WEIGHTS_FILE, LEGACY_WEIGHTS_FILE))


def is_foreign(path: Path) -> bool:
    """Whether it is another tool's adapter."""
    return not is_peft(path) and find_format(path) is not None


def find_format(path: Path) -> tuple[AdapterFormat, Source] | None:
    """Whose file it is, and the file; None if it is a directory without a file of any format.

    Args:
        path: the file, or a directory with it.

    Raises:
        FileFormatError: the file is of no format that is known, is broken, or there are several.
    """
    if is_directory(path):
        return _in_directory(path)
    if not is_file(path):
        return None
    source = Source(path)
    found = _recognised(source)
    if found is None:
        _refuse_other_methods(source)
        known = ", ".join(form.tool for form in FORMATS.values() if not isinstance(form, Vllm))
        names = ", ".join(source.names[:3]) or "no tensors that can be read"
        raise FileFormatError(
            f"{path} is not a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, nor a file of {known}: it holds {names}"
        )
    return found, source


def _in_directory(directory: Path) -> tuple[AdapterFormat, Source] | None:
    named = dict.fromkeys(name for form in FORMATS.values() for name in form.files)
    sources = [Source(directory / name) for name in named if is_file(directory / name)]
    if not sources:
        others = sorted(p for p in directory.iterdir() if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
        sources = [source for source in map(Source, filter(is_file, others)) if _can_be_read(source)]  # a pipe is no file
    for source in sources:
        _refuse_other_methods(source)
    hits = [(form, source) for source in sources if (form := _recognised(source)) is not None]
    if len(hits) > 1:
        listed = ", ".join(f"{source.path.name} ({form.tool})" for form, source in hits)
        raise FileFormatError(f"{directory} holds several adapters: {listed}; name one of the files")
    return hits[0] if hits else None


def _refuse_other_methods(source: Source) -> None:
    """Raises a FileFormatError for a file of LyCORIS' that has no LoRA in it."""
    if _recognised(source) is None and (method := other_method(source.names)):
        raise FileFormatError(
            f"{source} is an adapter of LyCORIS, and no LoRA: it is {method}, which has no A and B; merge it with LyCORIS' own "
            "tools, and extract_adapter makes LoRA of the difference"
        )


def _can_be_read(source: Source) -> bool:
    """Whether it is a file of tensors, which what stands beside a model need not be."""
    try:
        return bool(source.names)
    except FileFormatError:
        return False


def _recognised(source: Source) -> AdapterFormat | None:
    return next((form for form in FORMATS.values() if form.recognises(source)), None)
