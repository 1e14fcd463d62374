"""One method, one base, one data set -> one trained adapter and its metrics.

    plan -> load -> quantise (qlora) -> inject -> train on transformers.Trainer -> OUTPUT/adapter, OUTPUT/metrics.json

What is trained without an adapter is saved as a whole model, OUTPUT/model.

Loading and tokenising stand outside the measured time; so does evaluation.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import set_seed

from lora_core import count_parameters, use_fast_dropout, use_fast_linear
from lora_core.cpu.heap import keep_few_shapes

from . import checkpoints, predictions, provenance, record
from .attention import use_fast_attention
from .batches import TokenisedTexts
from .checkpoints import Checkpoint, Saving
from .data import Split
from .errors import ExperimentError
from .job import Job
from .methods import NOTHING, Schedule
from .models import load_classifier
from .precision import restore_frozen
from .preparing import check_length, hold_in_bf16, new_output, prepare
from .results import PROBES, metrics_of, write
from .resumable import Course
from .stopping import note_signals
from .trainer import SentimentTrainer, training_arguments

SCORES, CURVES = ("accuracy", "f1", "loss"), ("accuracy_by_epoch", "loss_history")


def train(job: Job, output: Path, saving: Saving | None = None, resume: Checkpoint | None = None) -> dict[str, Any]:
    """Run `job`, from the start or from a checkpoint; returns its metrics, which are in `output`/metrics.json by then.

    Raises:
        LoraError: a setting does not fit the model or the data, or the loss is no longer a number.
        Stopped: a signal came; a checkpoint was written.
    """
    predictions.require_scikit_learn()
    before, schedule = provenance.here(), job.schedule
    train_split = _sample(job.data.train, schedule)
    set_seed(schedule.seed)  # before the head is initialised
    classifier = load_classifier(job.base)
    model = classifier.model
    if job.device == "cpu":
        keep_few_shapes()  # batches have many lengths
        use_fast_linear(model)  # before layers are packed or adapted
    prepare(classifier, job, "SEQ_CLS", "the head")
    if job.device == "cpu":  # the base's own dropout, drawn faster; on a GPU it costs nothing worth saving
        use_fast_dropout(model)
        use_fast_attention(model)
    counts = count_parameters(model)
    cast = hold_in_bf16(classifier) if job.bf16 else ()
    check_length(classifier, schedule.max_length)
    train_set, validation_set = (
        TokenisedTexts(classifier.tokenizer, split.texts, schedule.max_length, split.labels)
        for split in (train_split, job.data.validation)
    )

    course = Course(output / checkpoints.CHECKPOINTS, saving or Saving(), job.settings(), resume, job.processes)
    first = job.processes.first
    with new_output(output) if first else nullcontext(), note_signals(course.noted):
        if first and resume is None:
            checkpoints.prune(course.directory, 0)
        trainer = SentimentTrainer(
            model,
            training_arguments(schedule, len(train_set), output, job.device, job.bf16, job.report_to),
            train_set,
            validation_set,
            title=job.method.name,
            course=course,
            lora_plus_ratio=job.method.lora_plus_ratio,
        )
        outcome = trainer.run(learn=job.method.trains != NOTHING)
        metrics = metrics_of(job, model, counts, outcome, SCORES, CURVES, before)
        if first:
            classifier.tokenizer.model_max_length = schedule.max_length  # whoever uses the result reads as much of a text
            probe = validation_set[range(min(PROBES, len(validation_set)))]
            inputs = {name: probe[name] for name in ("input_ids", "attention_mask")}
            if cast:  # what is saved is of the base as it is
                restore_frozen(model, cast, load_classifier(job.base).model)
            (output / record.METRICS).unlink(missing_ok=True)  # of a run that this one replaces: its predictions go now
            predictions.write(output, job.data.validation.labels, outcome["predicted"])
            write(job, output, metrics, classifier, inputs, job.data.validation.texts[:PROBES])
            checkpoints.prune(course.directory, 0)
    return metrics


def _sample(split: Split, schedule: Schedule) -> Split:
    wanted = schedule.train_samples
    if wanted is None:
        return split
    if wanted > len(split):
        raise ExperimentError(f"train_samples is {wanted:,}, and there are {len(split):,} training sentences; ask for fewer")
    return split.sample(wanted, schedule.seed)
