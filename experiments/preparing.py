"""From a loaded base to a model that is ready to train, and a place for its results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_core import (
    LoraConfig,
    ParameterCount,
    base_weight_bytes,
    count_parameters,
    inject,
    quantize_int8,
    quantize_nf4,
    share_dropout_masks,
)
from lora_core.files.locks import alone
from lora_core.spec.config import ALL_LINEAR
from lora_core.spec.targets import is_head

from .errors import ExperimentError
from .job import Job, variants
from .methods import EVERYTHING, HEAD, NOTHING
from .models import Loaded
from .precision import cast_frozen


def prepare(loaded: Loaded, job: Job, task_type: str, besides: str) -> None:
    """Quantise the base, put the adapters on it and freeze the rest, as the method says; prints what was done.

    `task_type` is PEFT's name of the task, `besides` what it trains besides the adapter's layers, in words.
    """
    method, model = job.method, loaded.model
    if method.quantize:
        pack = quantize_int8 if method.quantize == "int8" else quantize_nf4
        report = pack(model, skip=loaded.keep)  # autocast says what products are computed in, and else they are as in float32
        print(f"quantised: {report}")
        leave_file(model)
    if not method.adapts:
        _unfreeze(model, method.trains)
        return
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=ALL_LINEAR if job.targets == (ALL_LINEAR,) else list(job.targets),
        task_type=task_type,
        base_model_name_or_path=job.base.reference,
        **variants(method),
    )
    inject(model, config)
    share_dropout_masks(model)
    for name in loaded.new:
        if not any(p.requires_grad for p in model.get_submodule(name).parameters()):
            print(f"note: the checkpoint has no weights for {name!r}; it stays random, since it is not part of the head")
    counts = count_parameters(model)
    rest = [name for name in ("biases" if method.bias != "none" else "", besides) if name]
    beside = f", {counts.trainable - counts.adapter:,} in {' and '.join(rest)}" if rest else ""
    print(f"{_training(counts)}: {counts.adapter:,} in LoRA{beside}")


def leave_file(model: Any) -> None:
    """Copies what is still as it was loaded: a file of weights stays mapped, and what was read of it in memory, while one
    tensor of it is in use."""
    for parameter in (p for p in model.parameters() if p.is_floating_point()):
        parameter.data = parameter.data.clone()


def hold_in_bf16(loaded: Loaded) -> tuple[str, ...]:
    """`cast_frozen`, for a run in bfloat16 after `prepare`; prints what it saved and returns the layers' paths."""
    before = base_weight_bytes(loaded.model)
    if cast := cast_frozen(loaded.model, loaded.keep):
        leave_file(loaded.model)
        after = base_weight_bytes(loaded.model)
        print(f"frozen weights of {len(cast)} layers held in bfloat16: {before / 2**20:.1f} -> {after / 2**20:.1f} MiB of base")
    return cast


def _unfreeze(model: Any, trains: str) -> None:
    """Leave gradients to what is trained where there is no adapter: nothing, the head or everything."""
    for path, parameter in model.named_parameters():
        parameter.requires_grad = trains == EVERYTHING or (trains == HEAD and is_head(path))
    counts = count_parameters(model)
    if trains == HEAD and not counts.trainable:
        raise ExperimentError("method: no head is known by its name in this model, so there is nothing to train; take another")
    if trains != NOTHING:
        print(f"{_training(counts)}: {trains}")


def _training(counts: ParameterCount) -> str:
    return f"training {counts.trainable:,} of {counts.total:,} parameters ({counts.trainable_percent:.3g} %)"


def check_length(loaded: Loaded, max_length: int) -> None:
    """Refuses to read more tokens of a text than the model can."""
    limit = min(loaded.tokenizer.model_max_length, getattr(loaded.model.config, "max_position_embeddings", math.inf))
    if max_length > limit:
        raise ExperimentError(f"max_length is {max_length}, and this model reads at most {limit} tokens; lower it")


@contextmanager
def new_output(path: Path) -> Iterator[None]:
    """`path` as an existing directory, for this run alone; what of it had to be made is gone again if the block fails and
    leaves it empty."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"--output-dir: {str(path)!r} can't be made: {error.strerror or error}") from None
    try:
        with alone(path):
            yield
    except BaseException:
        for directory in made:
            if any(directory.iterdir()):
                break
            directory.rmdir()
        raise
