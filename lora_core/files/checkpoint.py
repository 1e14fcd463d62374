"""A base model's files, read tensor by tensor: one safetensors file, or shards and their index. Never a model.

Example:

    base = open_checkpoint("llama/")
    base.tensors["lm_head.weight"].read()          # one tensor in memory, straight from its place in the file
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from .disk import is_directory
from .reading import read_object
from .stored import StoredTensor, stored_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: The files that tokenizers of transformers are made of, and how a language model's texts are generated.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

#: The format's own limit for a header.
MAX_HEADER = 100_000_000
#: Bytes of config.json.
MAX_CONFIG = 2**23


@dataclass(frozen=True)
class Checkpoint:
    """The files of a base model.

    Attributes:
        directory: where they are.
        tensors: {name: where it is}, in the order of the files.
        shards: names of the files, in the index's order.
        config: what config.json says.
    """

    directory: Path
    tensors: dict[str, StoredTensor]
    shards: tuple[str, ...]
    config: dict[str, Any]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads config.json, the index if there is one, and every header; no values.

    Raises:
        FileFormatError: a file is missing, or says something that is not so; names the file and what is wrong.
    """
    if not is_directory(directory):
        raise FileFormatError(f"{directory} is not a directory; expected a saved model's, with {CONFIG_FILE} in it")
    config = read_config(directory)
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.exists():  # transformers too looks for it first
        return Checkpoint(directory, read_header(single), (WEIGHTS_FILE,), config)
    if not index.exists():
        if any((directory / name).exists() for name in PICKLES):
            raise FileFormatError(
                f"{directory} holds its weights as a pickle, which can run code and is not read; save it as safetensors"
            )
        raise FileFormatError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; is it a saved model?")
    return _open_sharded(directory, index, config)


def _open_sharded(directory: Path, index: Path, config: dict[str, Any]) -> Checkpoint:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileFormatError(f"{index} has no weight_map from the names of tensors to those of files")
    shards = tuple(dict.fromkeys(places.values()))
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):  # "../x", "/etc/x", "a/b"
            raise FileFormatError(f"{index} names the file {name!r}; only a *.safetensors file beside the index may be named")
        if not (directory / name).exists():
            raise FileFormatError(f"{index} names the shard {name}, which is not there; fetch the checkpoint again")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        held = read_header(directory / shard)
        listed = {name for name, place in places.items() if place == shard}
        if absent := sorted(listed - held.keys()):
            raise FileFormatError(f"{index} says that {shard} holds {absent[0]!r}, and it does not; fetch them again")
        if extra := sorted(held.keys() - listed):
            raise FileFormatError(f"{directory / shard} holds {extra[0]!r}, which the index does not place there")
        tensors |= held
    return Checkpoint(directory, tensors, shards, config)


def read_config(directory: Path) -> dict[str, Any]:
    """What a model's config.json says.

    Raises:
        FileFormatError: it is not there, or is no JSON object.
    """
    path = directory / CONFIG_FILE
    if not path.exists():
        raise FileFormatError(f"{path} is not there; expected a saved model's directory")
    return read_object(path, MAX_CONFIG, once=False)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """{name: where it is} of one safetensors file; see `stored_tensors`."""
    return stored_tensors(path, MAX_HEADER)[0]
