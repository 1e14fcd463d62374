"""What a run leaves: the numbers, and what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from lora_core import ParameterCount, base_weight_bytes, save_adapter, save_probe
from lora_core.files.disk import write_whole

from . import provenance, record
from .cards import CARD, card
from .job import Job
from .methods import NOTHING
from .models import Loaded

#: Inputs that an adapter carries with the logits it gave for them, for `python -m lora_core verify`.
PROBES = 8


def metrics_of(
    job: Job,
    model: nn.Module,
    counts: ParameterCount,
    outcome: Mapping[str, Any],
    scores: Sequence[str],
    curves: Sequence[str],
    before: Mapping[str, Any],
    speed: str = "examples_per_second",
) -> dict[str, Any]:
    """The content of metrics.json, from what the trainer's `run` returned; `scores`, `curves` and `speed` are names in that.

    `before` is what `provenance.here` said before the run.
    """
    plan = job.plan()
    return {
        **{key: plan[key] for key in ("method", "base_model", "data")},
        **{key: outcome[key] for key in scores},
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "adapter_parameters": counts.adapter,
        "trainable_percent": round(counts.trainable_percent, 4),
        "base_weight_bytes": base_weight_bytes(model),
        "peak_rss_mb": outcome["peak_rss_mb"],
        "peak_cuda_mb": outcome["peak_cuda_mb"] if job.device == "cuda" else None,
        **{key: outcome[key] for key in ("train_seconds", speed)},
        **{key: plan[key] for key in ("hyperparameters", "seed")},
        "versions": record.versions(),
        "device": device_of(job),
        provenance.KEY: provenance.after(before, torch.get_num_threads()),
        **{key: outcome[key] for key in curves},
    }


def write(
    job: Job, output: Path, metrics: dict[str, Any], loaded: Loaded, inputs: Mapping[str, Tensor], texts: Sequence[str]
) -> None:
    """Writes what was trained, and last the metrics: they say that the run is finished.

    `inputs` of the model, and the `texts` that they are of, go with an adapter as its probe.
    """
    # The Trainer leaves the model's forward in autocast; whoever loads the result has it as it is.
    model = extract_model_from_parallel(loaded.model, keep_fp32_wrapper=False)
    (output / record.METRICS).unlink(missing_ok=True)  # from here on the old adapter and its numbers part
    if job.method.trains != NOTHING:
        directory = output / (record.ADAPTER if job.method.adapts else record.MODEL)
        save = save_adapter if job.method.adapts else type(model).save_pretrained
        save(model, directory)
        if job.method.adapts:
            save_probe(model, directory, inputs, texts, loaded.tokenizer)
        loaded.tokenizer.save_pretrained(directory)
        record.AdapterNote(job.method.quantize, job.schedule.max_length, job.precision).write(directory)
        write_whole(directory / CARD, card(metrics, job.base.reference, job.method.adapts).encode())
    record.write_json(output / record.METRICS, metrics)


def device_of(job: Job) -> str:
    """What it runs on, in words."""
    each = torch.cuda.get_device_name() if job.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return each if job.processes.count == 1 else f"{job.processes.count} processes, each on {each}"
