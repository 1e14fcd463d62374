"""One method, one base, one data set -> one trained adapter and its metrics.

    plan -> load -> quantise (qlora) -> inject -> train on transformers.Trainer -> OUTPUT/adapter, OUTPUT/metrics.json

Loading and tokenising stand outside the measured time; so does evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from lora_core import LoraConfig, base_weight_bytes, count_parameters, inject, quantize_nf4, save_adapter, use_fast_dropout

from . import record
from .attention import use_fast_attention
from .batches import TokenisedTexts
from .data import SentimentData, Split
from .errors import ExperimentError
from .methods import Method, Schedule
from .models import BaseModel, Classifier, load_classifier, projections
from .trainer import SentimentTrainer, training_arguments


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run depends on."""

    method: Method
    schedule: Schedule
    base: BaseModel
    data: SentimentData
    device: str = "cpu"
    report_to: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the layers to adapt."""
        if not self.method.adapt:
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
        return {
            "method": self.method.name,
            "base_model": {"name": self.base.name, "source": self.base.source, "why": self.base.why, **shape},
            "data": {
                "name": self.data.name,
                "source": self.data.source,
                "why": self.data.why,
                "train": self.schedule.train_samples or len(self.data.train),
                "validation": len(self.data.validation),
            },
            "hyperparameters": {
                **schedule,
                **(adapter if self.method.adapt else {}),
                "target_modules": self.targets,
                "precision": "bf16" if self.bf16 else "fp32",
            },
            "seed": seed,
        }


def choose_device(wanted: str = "auto") -> str:
    """The device that is asked for; for "auto", "cuda" if there is one, else "cpu".

    Raises:
        ExperimentError: CUDA is asked for and not there.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ExperimentError("device: 'cuda' was asked for, and torch sees no CUDA device; pass cpu or auto")
    return wanted if wanted != "auto" else "cuda" if available else "cpu"


def train(job: Job, output: Path) -> dict[str, Any]:
    """Run `job`; returns its metrics, which are in `output`/metrics.json by then.

    Raises:
        LoraError: a setting does not fit the model or the data, or the loss is no longer a number.
    """
    plan, schedule = job.plan(), job.schedule
    train_split = _sample(job.data.train, schedule)
    set_seed(schedule.seed)  # before the head is initialised
    classifier = load_classifier(job.base)
    prepare(classifier, job)
    model = classifier.model
    if job.device == "cpu":  # the base's own dropout, drawn faster; on a GPU it costs nothing worth saving
        use_fast_dropout(model)
        use_fast_attention(model)
    counts = count_parameters(model)
    _check_length(classifier, schedule.max_length)
    train_set, validation_set = (
        TokenisedTexts(classifier.tokenizer, split.texts, schedule.max_length, split.labels)
        for split in (train_split, job.data.validation)
    )

    with _directory(output):
        trainer = SentimentTrainer(
            model,
            training_arguments(schedule, len(train_set), output, job.device, job.bf16, job.report_to),
            train_set,
            validation_set,
            title=job.method.name,
        )
        outcome = trainer.run(adapt=job.method.adapt)
        metrics = {
            **{key: plan[key] for key in ("method", "base_model", "data")},
            **{key: outcome[key] for key in ("accuracy", "f1", "loss")},
            "trainable_parameters": counts.trainable,
            "total_parameters": counts.total,
            "adapter_parameters": counts.adapter,
            "trainable_percent": round(counts.trainable_percent, 4),
            "base_weight_bytes": base_weight_bytes(model),
            "peak_rss_mb": record.peak_rss_mb(),
            "peak_cuda_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if job.device == "cuda" else None,
            **{key: outcome[key] for key in ("train_seconds", "examples_per_second")},
            **{key: plan[key] for key in ("hyperparameters", "seed")},
            "versions": record.versions(),
            "device": torch.cuda.get_device_name() if job.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            **{key: outcome[key] for key in ("accuracy_by_epoch", "loss_history")},
        }
        (output / record.METRICS).unlink(missing_ok=True)  # from here on the old adapter and its numbers part
        if job.method.adapt:
            directory = output / record.ADAPTER
            save_adapter(model, directory)
            classifier.tokenizer.save_pretrained(directory)
            record.AdapterNote(job.method.quantize, schedule.max_length).write(directory)
        record.write_json(output / record.METRICS, metrics)
    return metrics


def prepare(classifier: Classifier, job: Job) -> None:
    """Quantise the base and put the adapters on it, as the method says; prints what was done."""
    method, model = job.method, classifier.model
    if method.quantize:
        report = quantize_nf4(model, skip=classifier.keep, compute_dtype=torch.bfloat16 if job.bf16 else None)
        print(f"quantised: {report}")
        # The weights' file stays mapped, and what was read of it in memory, while one tensor of it is in use.
        for parameter in (p for p in model.parameters() if p.is_floating_point()):
            parameter.data = parameter.data.clone()
    if not method.adapt:
        model.requires_grad_(False)
        return
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=list(job.targets),
        task_type="SEQ_CLS",
        base_model_name_or_path=job.base.reference,
    )
    inject(model, config)
    for name in classifier.new:
        if not any(p.requires_grad for p in model.get_submodule(name).parameters()):
            print(f"note: the checkpoint has no weights for {name!r}; it stays random, since it is not part of the head")
    counts = count_parameters(model)
    print(
        f"training {counts.trainable:,} of {counts.total:,} parameters ({counts.trainable_percent:.2f} %): "
        f"{counts.adapter:,} in LoRA, {counts.trainable - counts.adapter:,} in the head"
    )


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
    """`path` as an existing directory; what of it had to be made is gone again if the block fails and leaves it empty."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"--output-dir: {str(path)!r} can't be made: {error.strerror or error}") from None
    try:
        yield
    except BaseException:
        for directory in made:
            if any(directory.iterdir()):
                break
            directory.rmdir()
        raise
