"""Which names of a transformers model mean one tensor. A checkpoint holds that once, under one of them.

    tied_groups(known_class("gpt2/", "GPT2LMHeadModel"), "GPT2LMHeadModel", names)
    [("transformer.wte.weight", "lm_head.weight")]

Where transformers does not say it, what its language models have in common is known here: their output layer is tied to the
input embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .model_class import ModelClass

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


def tied_groups(known: ModelClass | None, architecture: str, names: Collection[str]) -> tuple[tuple[str, ...], ...] | None:
    """The groups of names that are one tensor each; None if that can't be known for this class.

    Args:
        known: what transformers knows of the class.
        architecture: its name.
        names: of the tensors in the checkpoint, as the adapters have them.
    """
    if known is not None:
        return known.tied
    if _OTHERWISE_TIED.fullmatch(architecture):
        return None
    embeddings = next((name for name in names if EMBEDDINGS.fullmatch(name)), None)
    if embeddings is None or not _LANGUAGE_MODEL.fullmatch(architecture):
        return () if embeddings else None
    group = [embeddings, OUTPUT_LAYER]
    if embeddings.endswith("shared.weight"):  # encoder and decoder have it as their own
        group += [embeddings.removesuffix("shared.weight") + f"{part}.embed_tokens.weight" for part in ("encoder", "decoder")]
    return (tuple(group),)
