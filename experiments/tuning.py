"""One method, one language model, some conversations -> one trained adapter and its metrics.

    load -> quantise (qlora) -> inject -> train on completions -> OUTPUT/adapter, OUTPUT/metrics.json

The model is judged on the held-out rows before training and after each epoch. That, loading and tokenising stand outside the
measured time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from lora_core import count_parameters, use_fast_linear
from lora_core.cpu.heap import keep_few_shapes

from . import checkpoints, provenance
from .checkpoints import Checkpoint, Saving
from .completions import Template, TokenisedCompletions
from .conversations import Conversation
from .errors import ExperimentError
from .job import Job
from .language_models import load_language_model
from .methods import NOTHING
from .precision import restore_frozen
from .preparing import check_length, hold_in_bf16, new_output, prepare
from .results import PROBES, metrics_of, write
from .resumable import Course
from .stopping import note_signals
from .trainer import training_arguments
from .tuner import CompletionTrainer

SCORES = ("exact_match", "loss", "exact_match_before", "loss_before")
CURVES = ("exact_match_by_epoch", "loss_history")


@dataclass(frozen=True)
class TuningJob(Job):
    """What a run on a language model depends on besides.

    Attributes:
        packing: whether the rows of a batch lie end to end, without padding.
        gradient_checkpointing: whether activations are computed again in the backward: slower, and smaller.
    """

    packing: bool = False
    gradient_checkpointing: bool = False

    def plan(self) -> dict[str, Any]:
        plan = super().plan()
        own = {"packing": self.packing, "gradient_checkpointing": self.gradient_checkpointing}
        return plan | {"hyperparameters": plan["hyperparameters"] | own}


def tune(job: TuningJob, output: Path, saving: Saving | None = None, resume: Checkpoint | None = None) -> dict[str, Any]:
    """Run `job`, from the start or from a checkpoint; returns its metrics, which are in `output`/metrics.json by then.

    Raises:
        LoraError: a setting does not fit the model or the data, or the loss is no longer a number.
        Stopped: a signal came; a checkpoint was written.
    """
    before, schedule, held_out = provenance.here(), job.schedule, job.data.validation
    chosen = _sample(job)
    set_seed(schedule.seed)
    loaded = load_language_model(job.base)
    model, template = loaded.model, Template(loaded.tokenizer)
    if job.device == "cpu":
        keep_few_shapes()  # batches have many lengths
        use_fast_linear(model)  # before layers are packed or adapted
    prepare(loaded, job, "CAUSAL_LM", besides="")
    counts = count_parameters(model)
    cast = hold_in_bf16(loaded) if job.bf16 else ()
    check_length(loaded, schedule.max_length)
    train_set, validation_set = (TokenisedCompletions(template, rows, schedule.max_length) for rows in (chosen, held_out))

    course = Course(output / checkpoints.CHECKPOINTS, saving or Saving(), job.settings(), resume, job.processes)
    first = job.processes.first
    with new_output(output) if first else nullcontext(), note_signals(course.noted):
        if first and resume is None:
            checkpoints.prune(course.directory, 0)
        own = {"eval_on_start": resume is None, "gradient_checkpointing": job.gradient_checkpointing}
        trainer = CompletionTrainer(
            model,
            training_arguments(schedule, len(train_set), output, job.device, job.bf16, job.report_to, **own),
            train_set,
            validation_set,
            title=job.method.name,
            course=course,
            lora_plus_ratio=job.method.lora_plus_ratio,
            tokenizer=loaded.tokenizer,
            held_out=held_out,
            packing=job.packing,
        )
        outcome = trainer.run(learn=job.method.trains != NOTHING)
        metrics = metrics_of(job, model, counts, outcome, SCORES, CURVES, before, speed="tokens_per_second")
        if first:
            if cast:  # what is saved is of the base as it is
                restore_frozen(model, cast, load_language_model(job.base).model)
            texts = [template.prompt(conversation) for conversation in held_out[:PROBES]]
            inputs = loaded.tokenizer(texts, add_special_tokens=not template.has_own, padding=True, return_tensors="pt")
            write(job, output, metrics, loaded, {name: inputs[name] for name in ("input_ids", "attention_mask")}, texts)
            checkpoints.prune(course.directory, 0)
    return metrics


def _sample(job: TuningJob) -> tuple[Conversation, ...]:
    rows, wanted = job.data.train, job.schedule.train_samples
    if wanted is None:
        return rows
    if wanted > len(rows):
        raise ExperimentError(f"train_samples is {wanted:,}, and there are {len(rows):,} rows to train on; ask for fewer")
    return tuple(rows[i] for i in np.random.default_rng(job.schedule.seed).permutation(len(rows))[:wanted])
