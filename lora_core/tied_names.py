"""Which names of a transformers model mean one tensor. A checkpoint holds that once, under one of them.

    tied_groups("gpt2/", "GPT2LMHeadModel", names)      [("transformer.wte.weight", "lm_head.weight")]

transformers itself is asked, where it is installed and knows the class, of a model without weights. Else what its language
models have in common is known here: their output layer is tied to the input embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch

#: A model's directory may bring code of its own, which is not run; if this were not said, transformers would ask.
LOCAL = {"local_files_only": True, "trust_remote_code": False}

#: What input embeddings are called, and the output layers that are tied to them.
EMBEDDINGS = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|shared|embed_in)\.weight")
OUTPUT_LAYER = "lm_head.weight"
OUTPUT_LAYERS = (
    "lm_head",
    "embed_out",
    "vocab_projector",
    "generator_lm_head",
    "lm_head.decoder",
    "predictions.decoder",
    "cls.predictions.decoder",
)
_LANGUAGE_MODEL = re.compile(r"\w+(LMHeadModel|ForCausalLM|ForConditionalGeneration)")
_OTHERWISE_TIED = re.compile(r"\w+(ForMaskedLM|ForPreTraining)")


def may_be_tied(name: str) -> bool:
    """Whether a tensor is one that models tie to others, by its name."""
    path = name.rpartition(".")[0]
    return EMBEDDINGS.fullmatch(name) is not None or any(path == o or path.endswith(f".{o}") for o in OUTPUT_LAYERS)


def tied_groups(directory: Path, architecture: str, names: Collection[str]) -> list[tuple[str, ...]] | None:
    """The groups of names that are one tensor each; None if that can't be known for this class.

    Args:
        directory: of the base, with config.json.
        architecture: the class.
        names: of the tensors in the checkpoint, as the adapters have them.
    """
    found = _ask_transformers(directory, architecture)
    if found is not None:
        return found
    if _OTHERWISE_TIED.fullmatch(architecture):
        return None
    embeddings = next((name for name in names if EMBEDDINGS.fullmatch(name)), None)
    if embeddings is None or not _LANGUAGE_MODEL.fullmatch(architecture):
        return [] if embeddings else None
    group = [embeddings, OUTPUT_LAYER]
    if embeddings.endswith("shared.weight"):  # encoder and decoder have it as their own
        group += [embeddings.removesuffix("shared.weight") + f"{part}.embed_tokens.weight" for part in ("encoder", "decoder")]
    return [tuple(group)]


def _ask_transformers(directory: Path, architecture: str) -> list[tuple[str, ...]] | None:
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(directory, **LOCAL)
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config)
        sources = model.all_tied_weights_keys
    except Exception:  # not installed, a class that it does not know, a configuration that it can't read
        return None
    groups: dict[str, list[str]] = {}
    for target, source in sources.items():
        groups.setdefault(source, [source]).append(target)
    return [tuple(group) for group in groups.values()]
