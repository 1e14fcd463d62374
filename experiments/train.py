"""One method, one base, one data set -> one trained adapter and its metrics.

    plan -> load -> quantise (qlora) -> inject -> train on transformers.Trainer -> OUTPUT/adapter, OUTPUT/metrics.json

What is trained without an adapter is saved as a whole model, OUTPUT/model.

Loading and tokenising stand outside the measured time; so does evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from lora_core import (
    LoraConfig,
    ParameterCount,
    base_weight_bytes,
    count_parameters,
    inject,
    quantize_int8,
    quantize_nf4,
    save_adapter,
    save_probe,
    share_dropout_masks,
    use_fast_dropout,
    use_fast_linear,
)
from lora_core.cpu.heap import keep_few_shapes
from lora_core.files.locks import alone
from lora_core.spec.config import ALL_LINEAR
from lora_core.spec.targets import is_head

from . import checkpoints, record
from .attention import use_fast_attention
from .batches import TokenisedTexts
from .checkpoints import Checkpoint, Saving
from .data import SentimentData, Split
from .errors import ExperimentError
from .methods import EVERYTHING, HEAD, NOTHING, Method, Schedule
from .models import BaseModel, Classifier, load_classifier, projections
from .parallel import Processes
from .resumable import Course
from .stopping import note_signals
from .trainer import SentimentTrainer, training_arguments

#: Validation sentences that an adapter carries with the logits it gave for them, for `python -m lora_core verify`.
PROBES = 8


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run depends on."""

    method: Method
    schedule: Schedule
    base: BaseModel
    data: SentimentData
    device: str = "cpu"
    report_to: tuple[str, ...] = ()
    processes: Processes = dataclasses.field(default_factory=Processes)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the layers to adapt."""
        if not self.method.adapts:
            return ()
        return self.method.target_modules or projections(self.base, self.method.roles)

    @property
    def bf16(self) -> bool:
        return self.device == "cuda" and torch.cuda.is_bf16_supported()

    def plan(self) -> dict[str, Any]:
        """The part of metrics.json that is known before the run."""
        config = self.base.config
        shape = {key: config[key] for key in ("model_type", "num_hidden_layers", "hidden_size") if key in config}
        schedule = dataclasses.asdict(self.schedule)
        seed = schedule.pop("seed")
        adapter = {key: getattr(self.method, key) for key in ("quantize", "r", "lora_alpha", "lora_dropout")}
        adapter |= variants(self.method)
        if self.method.lora_plus_ratio != 1:
            adapter["lora_plus_ratio"] = self.method.lora_plus_ratio
        named = ("name", "source", "why", "sha256")
        return {
            "method": self.method.name,
            "base_model": {**{key: getattr(self.base, key) for key in named}, **shape},
            "data": {
                **{key: getattr(self.data, key) for key in named},
                "train": self.schedule.train_samples or len(self.data.train),
                "validation": len(self.data.validation),
            },
            "hyperparameters": {
                **schedule,
                **(adapter if self.method.adapts else {}),
                "target_modules": self.targets,
                "precision": "bf16" if self.bf16 else "fp32",
            },
            "seed": seed,
        }

    def settings(self) -> dict[str, Any]:
        """What makes two runs end with the same weights, bit for bit: what a checkpoint must share with what goes on."""
        plan = self.plan()
        found = {key: {k: v for k, v in plan[key].items() if k not in ("why", "source")} for key in ("base_model", "data")}
        plan = {key: plan[key] for key in record.IDENTITY} | found
        return {**plan, "processes": self.processes.count, "device": self.device}


def choose_device(wanted: str = "auto") -> str:
    """The device that is asked for; for "auto", "cuda" if there is one, else "cpu".

    Raises:
        ExperimentError: CUDA is asked for and not there.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ExperimentError("device: 'cuda' was asked for, and torch sees no CUDA device; pass cpu or auto")
    return wanted if wanted != "auto" else "cuda" if available else "cpu"


def train(job: Job, output: Path, saving: Saving | None = None, resume: Checkpoint | None = None) -> dict[str, Any]:
    """Run `job`, from the start or from a checkpoint; returns its metrics, which are in `output`/metrics.json by then.

    Raises:
        LoraError: a setting does not fit the model or the data, or the loss is no longer a number.
        Stopped: a signal came; a checkpoint was written.
    """
    plan, schedule = job.plan(), job.schedule
    train_split = _sample(job.data.train, schedule)
    set_seed(schedule.seed)  # before the head is initialised
    classifier = load_classifier(job.base)
    model = classifier.model
    if job.device == "cpu":
        keep_few_shapes()  # batches have many lengths
        use_fast_linear(model)  # before layers are packed or adapted
    prepare(classifier, job)
    if job.device == "cpu":  # the base's own dropout, drawn faster; on a GPU it costs nothing worth saving
        use_fast_dropout(model)
        use_fast_attention(model)
    counts = count_parameters(model)
    _check_length(classifier, schedule.max_length)
    train_set, validation_set = (
        TokenisedTexts(classifier.tokenizer, split.texts, schedule.max_length, split.labels)
        for split in (train_split, job.data.validation)
    )

    course = Course(output / checkpoints.CHECKPOINTS, saving or Saving(), job.settings(), resume, job.processes)
    first = job.processes.first
    with _directory(output) if first else nullcontext(), note_signals(course.noted):
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
        metrics = {
            **{key: plan[key] for key in ("method", "base_model", "data")},
            **{key: outcome[key] for key in ("accuracy", "f1", "loss")},
            "trainable_parameters": counts.trainable,
            "total_parameters": counts.total,
            "adapter_parameters": counts.adapter,
            "trainable_percent": round(counts.trainable_percent, 4),
            "base_weight_bytes": base_weight_bytes(model),
            "peak_rss_mb": outcome["peak_rss_mb"],
            "peak_cuda_mb": outcome["peak_cuda_mb"] if job.device == "cuda" else None,
            **{key: outcome[key] for key in ("train_seconds", "examples_per_second")},
            **{key: plan[key] for key in ("hyperparameters", "seed")},
            "versions": record.versions(),
            "device": _device(job),
            **{key: outcome[key] for key in ("accuracy_by_epoch", "loss_history")},
        }
        if first:
            _write(job, output, metrics, classifier, validation_set)
            checkpoints.prune(course.directory, 0)
    return metrics


def _write(job: Job, output: Path, metrics: dict[str, Any], classifier: Classifier, validation_set: TokenisedTexts) -> None:
    """Writes what was trained, and last the metrics: they say that the run is finished."""
    model, max_length = classifier.model, job.schedule.max_length
    (output / record.METRICS).unlink(missing_ok=True)  # from here on the old adapter and its numbers part
    if job.method.trains != NOTHING:
        directory = output / (record.ADAPTER if job.method.adapts else record.MODEL)
        save = save_adapter if job.method.adapts else type(model).save_pretrained
        save(model, directory)
        if job.method.adapts:
            probe = validation_set[range(min(PROBES, len(validation_set)))]
            inputs = {name: probe[name] for name in ("input_ids", "attention_mask")}
            save_probe(model, directory, inputs, job.data.validation.texts[:PROBES])
        classifier.tokenizer.model_max_length = max_length  # whoever uses the result reads as much of a text
        classifier.tokenizer.save_pretrained(directory)
        record.AdapterNote(job.method.quantize, max_length).write(directory)
    record.write_json(output / record.METRICS, metrics)


def _device(job: Job) -> str:
    each = torch.cuda.get_device_name() if job.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return each if job.processes.count == 1 else f"{job.processes.count} processes, each on {each}"


def variants(method: Method) -> dict[str, Any]:
    """The settings in which `method` is not plain LoRA, by their names in `LoraConfig`."""
    settings = {"bias": method.bias, "use_rslora": method.use_rslora, "use_dora": method.use_dora}
    return {name: value for name, value in settings.items() if value not in (False, "none")}


def prepare(classifier: Classifier, job: Job) -> None:
    """Quantise the base, put the adapters on it and freeze the rest, as the method says; prints what was done."""
    method, model = job.method, classifier.model
    if method.quantize:
        pack = quantize_int8 if method.quantize == "int8" else quantize_nf4
        report = pack(model, skip=classifier.keep, compute_dtype=torch.bfloat16 if job.bf16 else None)
        print(f"quantised: {report}")
        # The weights' file stays mapped, and what was read of it in memory, while one tensor of it is in use.
        for parameter in (p for p in model.parameters() if p.is_floating_point()):
            parameter.data = parameter.data.clone()
    if not method.adapts:
        _unfreeze(model, method.trains)
        return
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=ALL_LINEAR if job.targets == (ALL_LINEAR,) else list(job.targets),
        task_type="SEQ_CLS",
        base_model_name_or_path=job.base.reference,
        **variants(method),
    )
    inject(model, config)
    share_dropout_masks(model)
    for name in classifier.new:
        if not any(p.requires_grad for p in model.get_submodule(name).parameters()):
            print(f"note: the checkpoint has no weights for {name!r}; it stays random, since it is not part of the head")
    counts = count_parameters(model)
    rest = "the head" if method.bias == "none" else "biases and the head"
    print(f"{_training(counts)}: {counts.adapter:,} in LoRA, {counts.trainable - counts.adapter:,} in {rest}")


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


def _sample(split: Split, schedule: Schedule) -> Split:
    wanted = schedule.train_samples
    if wanted is None:
        return split
    if wanted > len(split):
        raise ExperimentError(f"train_samples is {wanted:,}, and there are {len(split):,} training sentences; ask for fewer")
    return split.sample(wanted, schedule.seed)


def _check_length(classifier: Classifier, max_length: int) -> None:
    limit = min(classifier.tokenizer.model_max_length, getattr(classifier.model.config, "max_position_embeddings", math.inf))
    if max_length > limit:
        raise ExperimentError(f"max_length is {max_length}, and this model reads at most {limit} tokens; lower it")


@contextmanager
def _directory(path: Path):
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
