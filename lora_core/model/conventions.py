"""What models of transformers say of themselves, read where they say it: no class of that library is needed for it."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import StateError

#: What a transformers model is saved by.
SAVING = ("save_pretrained", "push_to_hub")


def output_layer(model: object) -> object | None:
    """What a model of transformers calls its output embeddings: the head of a language model, whatever its name."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def input_layer(model: object) -> object | None:
    """What a model of transformers calls its input embeddings; None if it does not say."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None


def is_causal(model: object) -> bool:
    """Whether a model of transformers goes on from a prompt by itself: a language model, and none with an encoder."""
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can()) and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def end_tokens(model: object) -> set[int]:
    """The ids of the tokens that end an answer of a model of transformers; none if it does not say."""
    for name in ("generation_config", "config"):
        ids = getattr(getattr(model, name, None), "eos_token_id", None)
        if ids is not None:
            return set(ids if isinstance(ids, (list, tuple)) else [ids])
    return set()


def most_tokens(model: object) -> int | None:
    """How many tokens a model of transformers can read, its answer among them; None if it does not say."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((size for size in found if isinstance(size, int)), None)


def kept_in_float32(model: nn.Module) -> set[str]:
    """The paths of what models of transformers, `model` or parts of it, keep in float32 and dense, whatever the rest is.

    T5 computes in the dtype of its `wo`, which is uint8 in 4 bits.
    """
    found: set[str] = set()
    for outer, module in model.named_modules(remove_duplicate=False):
        for name in getattr(module, "_keep_in_fp32_modules", None) or ():
            named = re.compile(rf"(?:^|\.)(?:{name})(?:\.|$)")
            inner = (path for path, _ in module.named_modules(remove_duplicate=False) if named.search(path))
            found.update(f"{outer}.{path}" if outer else path for path in inner)
    return found


def renaming(model: nn.Module) -> Callable[[str], str]:
    """What models of this class call a module that files of older versions call by the path that is given.

    transformers has a table for that, by which it reads such files; before version 5 it is an attribute of the model. What is
    there split, joined or permuted besides is not renamed alone, and is left as it is.
    """
    table = getattr(model, "_checkpoint_conversion_mapping", None)
    if isinstance(table, dict) and table:
        renamings = [lambda key, old=old, new=new: re.sub(old, new, key) for old, new in table.items()]
    elif (library := sys.modules.get("transformers.conversion_mapping")) and hasattr(model, "base_model_prefix"):
        steps = [step for step in library.get_model_conversion_mapping(model) if not hasattr(step, "operations")]
        renamings = [lambda key, step=step: step.rename_source_key(key)[0] for step in steps]
    else:
        renamings = []

    def renamed(path: str) -> str:
        key = f"{path}.weight"  # the table is for tensors
        for step in renamings:
            key = step(key)
        return key.removesuffix(".weight")

    return renamed


def configs(root: nn.Module) -> list[Any]:
    """The configuration of a transformers model, and that of its language model if it has one of its own."""
    config = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return [c for c in (config, text) if hasattr(c, "__dict__")]


def own_config(root: nn.Module) -> None:
    """Gives a model a configuration of its own, in all parts that have it: another may be made from the same one."""
    copies: dict[int, Any] = {}
    copy.deepcopy(root.config, copies)
    for part in root.modules():
        config = vars(part).get("config")
        if id(config) in copies:
            part.config = copies[id(config)]


def forget_quantization(root: nn.Module) -> None:
    """Takes off a transformers model what says that its weights are quantised: it would save, move and load as such."""
    root.__dict__.pop("hf_quantizer", None)
    for flag in [name for name in vars(root) if name.startswith(("is_quantized", "is_loaded_in_", "quantization_method"))]:
        del vars(root)[flag]
    if hasattr(getattr(root, "config", None), "quantization_config"):
        del root.config.quantization_config


def hold_back(model: nn.Module) -> dict[str, Any]:
    """Keeps a transformers model from two mistakes while it holds adapters; returns what it was like, for `let_go`.

    Its Trainer refuses a model that says it is quantised, unless it believes that adapters of another library are attached;
    nothing else reads that flag of a loaded model but `half()` and `float()`. And the model would be saved as its base, with
    the adapters' tensors under names that nobody reads.
    """
    own = vars(model)
    before = {name: own[name] for name in ("is_quantized", *SAVING) if name in own}
    if own.get("is_quantized"):
        model.is_quantized = False
    refuse_saving(model)
    return before


def let_go(model: nn.Module, before: dict[str, Any]) -> None:
    """What `hold_back` did, undone; but a model that was made dense since does not say again that it is quantised."""
    allow_saving(model, before)
    if "is_quantized" in before and "is_quantized" in vars(model):
        model.is_quantized = before["is_quantized"]


def refuse_saving(model: nn.Module) -> None:
    """Makes a transformers model, and those inside, raise an error when told to save itself; `unfold_all` calls it too."""
    for module in model.modules():
        for name in SAVING:
            if callable(getattr(module, name, None)) and (module is model or name not in vars(module)):
                setattr(module, name, refuse_to_save)


def allow_saving(model: nn.Module, before: dict[str, Any]) -> None:
    """Lets it save itself again: its adapters are gone, or folded in, so that what is saved loads as it computes."""
    for module in model.modules():
        for name in SAVING:
            if vars(module).get(name) is refuse_to_save:
                delattr(module, name)
    vars(model).update({name: before[name] for name in SAVING if name in before})


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Stands in for those of `SAVING`.

    Raises:
        StateError: always; it says what to call instead.
    """
    raise StateError(
        "a model with adapters would be saved as its base, with tensors that nobody reads; "
        "call save_adapter(model, directory), or merge_and_unload(model) first for a merged model; "
        "in transformers' Trainer, add the callback lora_core.integrations.trainer.AdapterCheckpoint"
    )
