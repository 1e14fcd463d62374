"""A base with the adapter of a run, held as it was trained: in NF4 for a QLoRA adapter, in bfloat16 where products were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_core.files.disk import is_file

from . import models, record
from .errors import ExperimentError
from .methods import BF16


def load_adapted(
    adapter: Path, model: str | None, load: Callable[[models.BaseModel], models.Loaded]
) -> tuple[models.Loaded, record.AdapterNote]:
    """The model with the adapter on it, its tokenizer, and how it was used in training.

    Args:
        adapter: the adapter/ directory of a run.
        model: the base, if it is not where the adapter's file says.
        load: makes a model of a base.

    Raises:
        ExperimentError: `adapter` is none, or names no base, or that is not there.
        LoraError: the adapter's files are broken, or of another base.
    """
    from transformers import AutoTokenizer

    from lora_core import load_adapter, quantize_int8, quantize_nf4

    from .precision import cast_frozen

    if not is_file(adapter / "adapter_config.json"):
        raise ExperimentError(f"--adapter: {str(adapter)!r} has no adapter_config.json; give the adapter/ directory of a run")
    note = record.AdapterNote.read(adapter)
    reference = model or record.read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not reference:
        raise ExperimentError(f"--adapter: {str(adapter)!r} does not name its base model; name it with --model")
    loaded = load(models.resolve(reference))
    if note.quantize:
        pack = quantize_int8 if note.quantize == "int8" else quantize_nf4
        pack(loaded.model, skip=loaded.keep)
    load_adapter(loaded.model, adapter)
    if note.precision == BF16:
        cast_frozen(loaded.model, loaded.keep)
    if (adapter / "tokenizer_config.json").is_file():
        loaded.tokenizer = AutoTokenizer.from_pretrained(adapter, **models.LOCAL)
    return loaded, note
