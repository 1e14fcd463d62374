"""What transformers knows of a class of model: which tensors it has, and what becomes of each.

    known_class("t5/", "T5ForConditionalGeneration").tied       (("shared.weight", ..., "lm_head.weight"),)

A model without weights is built to ask it, which takes no memory for them; where transformers is not installed, or does not
know the class, the answer is None.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..layers.kinds import packs
from ..model.conventions import kept_in_float32, output_layer, renaming

#: A model's directory may bring code of its own, which is not run; if this were not said, transformers would ask.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class ModelClass:
    """A class of model, with its configuration.

    Attributes:
        tensors: names of its tensors in memory.
        tied: groups of names that are one tensor each. A checkpoint holds that once, under one of them.
        linear: paths of linear layers that quantising takes: not the output layer, what is tied or kept in float32, nor those
            with a forward of their own (a router).
        renamed: from what files call a module or a tensor to what it is called in memory.
    """

    tensors: frozenset[str]
    tied: tuple[tuple[str, ...], ...]
    linear: frozenset[str]
    renamed: Callable[[str], str] = str


def known_class(directory: Path, architecture: str) -> ModelClass | None:
    """What transformers knows of the class `architecture`, configured as in `directory`; None if nothing."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(directory, **LOCAL)
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config)
        ties = model.all_tied_weights_keys
    except Exception:  # not installed, a class that it does not know, a configuration that it can't read
        return None
    groups: dict[str, list[str]] = defaultdict(list)
    for target, source in ties.items():
        groups[source].append(target)
    dense = {name.removesuffix(".weight") for name in (*ties, *ties.values())}
    linear = [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if packs(module) and module is not output_layer(model) and path not in dense
    ]
    return ModelClass(
        tensors=frozenset(model.state_dict()),
        tied=tuple((source, *targets) for source, targets in groups.items()),
        linear=frozenset(linear).difference(kept_in_float32(model)),
        renamed=renaming(model),
    )
