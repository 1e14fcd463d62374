"""A causal language model and its tokenizer, loaded from the files of a base."""

from __future__ import annotations

from .errors import ExperimentError
from .models import LOCAL, BaseModel, Loaded


def load_language_model(base: BaseModel) -> Loaded:
    """Load `base` in float32, with its head, which stays as it is when the rest is quantised.

    Raises:
        ExperimentError: the files are broken, lack weights, or are of no causal language model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.directory, **LOCAL)
        model, loading = AutoModelForCausalLM.from_pretrained(
            base.directory, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **LOCAL
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExperimentError(f"model {base.name}: it can't be loaded as a causal language model: {reason}") from None
    if absent := sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"]))):
        listed = ", ".join(absent[:3])
        raise ExperimentError(f"model {base.name}: its files lack {listed}; is it a causal language model?")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    head = model.get_output_embeddings()
    keep = tuple(path for path, module in model.named_modules() if module is head)
    return Loaded(model, tokenizer, keep=keep, new=())
