"""The Trainer, fitted to this work: like-length batches, one progress bar, nothing computed that nobody reads."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EvalPrediction, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from lora_core import lora_plus_groups

from .batches import TokenisedTexts, batches
from .errors import ExperimentError
from .heap import GiveBack
from .methods import Schedule
from .predictions import accuracy_and_f1
from .resumable import Course, ResumableTrainer

EVAL_BATCH = 64
LOSS_POINTS = 100


def training_arguments(
    schedule: Schedule, examples: int, output: Path, device: str, bf16: bool, report_to: tuple[str, ...], **others: Any
) -> TrainingArguments:
    """The Trainer's settings for `schedule` on this many training examples, and `others` by their own names."""
    steps = schedule.epochs * math.ceil(examples / schedule.batch_size)
    steps = min(steps, schedule.max_steps or steps)
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=schedule.epochs,
        max_steps=steps,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=EVAL_BATCH,
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        warmup_steps=schedule.warmup,
        max_grad_norm=schedule.max_grad_norm,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=max(1, steps // LOSS_POINTS),
        logging_nan_inf_filter=False,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        report_to=list(report_to) or "none",
        seed=schedule.seed,
        use_cpu=device == "cpu",
        bf16=bf16,
        label_names=["labels"],
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        **others,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise it would spread each batch over all GPUs of the machine
    return arguments


class BatchTrainer(ResumableTrainer):
    """A Trainer on batches of like length, each shared among the processes. What is learned from one, a subclass says."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        train: TokenisedTexts,
        validation: TokenisedTexts,
        title: str,
        course: Course,
        lora_plus_ratio: float = 1.0,
        **settings: Any,
    ) -> None:
        try:
            super().__init__(model, arguments, course=course, train_dataset=train, eval_dataset=validation, **settings)
        except (ValueError, RuntimeError, ImportError) as error:
            if not arguments.report_to:
                raise
            # a logger's name or its package; anything else would fail without loggers too
            raise ExperimentError(f"--report-to: {error}") from None
        self.remove_callback(PrinterCallback)
        self.progress = Progress(title, len(train), self, shown=course.processes.first)
        self.add_callback(self.progress)
        self.heap, self.weight, self.lora_plus_ratio = GiveBack(), 1.0, lora_plus_ratio
        self.add_callback(self.heap)
        if course.processes.count > 1:
            self.model_accepts_loss_kwargs = False  # every model's loss is then the mean over the rows that it is given
            set_seed(arguments.seed + course.processes.rank)  # other dropout masks in each process

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None and self.lora_plus_ratio != 1:
            decayed = set(self.get_decay_parameter_names(self.model))  # all but biases and norms, as without LoRA+
            decayed = {id(p) for name, p in self.model.named_parameters() if name in decayed}
            groups = [
                {**group, "params": [p for p in group["params"] if (id(p) in decayed) == decays], "weight_decay": decay}
                for group in lora_plus_groups(self.model, self.args.learning_rate, self.lora_plus_ratio)
                for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
            ]
            adamw, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = adamw(groups, **settings)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> DataLoader:
        loader = batches(self.train_dataset, self.args.train_batch_size, seed=self.args.seed)
        if self.course.resume:
            loader.batch_sampler.pass_over(self.course.resume.step // len(loader))
        return loader

    def get_eval_dataloader(self, eval_dataset: TokenisedTexts | None = None) -> DataLoader:
        return batches(self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_batch_size)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inputs, self.weight = self.share(inputs)
        self.heap.before_batch(inputs["input_ids"].numel())
        return super().training_step(model, inputs, num_items_in_batch)

    def share(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """This process's part of a batch, and the weight of its loss, a mean over the rows."""
        return self.course.processes.share(inputs)

    def in_words(self, metrics: dict[str, Any]) -> str:
        """What an evaluation found, for the line that is printed."""
        raise NotImplementedError

    def status(self, logs: dict[str, Any]) -> dict[str, str]:
        """What stands beside the progress bar."""
        return {"loss": f"{logs['loss']:.3f}"}

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        return loss * self.weight if model.training and self.course.processes.count > 1 else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the estimate walks over every parameter at every step, and nothing here reads it

    def learn(self) -> float:
        """Trains, and evaluates as it goes; returns the seconds that it took, without the evaluations.

        Raises:
            Stopped, ExperimentError: as `fit`.
        """
        try:
            self.fit()
        finally:
            self.progress.close()
        return self.seconds

    @property
    def loss_history(self) -> list[list[float]]:
        """[step, mean training loss since the last point] of each point."""
        return [[entry["step"], round(entry["loss"], 4)] for entry in self.state.log_history if "loss" in entry]


class SentimentTrainer(BatchTrainer):
    """A Trainer for two-label sentences. `run` trains (or only evaluates) and returns the numbers."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, compute_metrics=self.share_right, **settings)
        self.predicted = np.zeros(len(self.eval_dataset), np.uint8)  # (N,): of the last evaluation, in the sentences' order

    def in_words(self, metrics: dict[str, Any]) -> str:
        return f"accuracy {metrics['eval_accuracy']:.1%}, loss {metrics['eval_loss']:.3f}"

    def share_right(self, prediction: EvalPrediction) -> dict[str, float]:
        """The accuracy of an evaluation; keeps what each sentence was called."""
        order = np.concatenate(list(self.get_eval_dataloader().batch_sampler))  # like lengths stand together
        self.predicted[order] = prediction.predictions.argmax(-1)
        return {"accuracy": float(np.mean(self.predicted[order] == prediction.label_ids))}

    def run(self, learn: bool = True) -> dict[str, Any]:
        """Train and evaluate each epoch; with `learn` False, only evaluate.

        Returns:
            accuracy, f1 and loss on the validation set after the last epoch; predicted, what each of its sentences was
            called then; accuracy_by_epoch; train_seconds without the evaluations; examples_per_second; loss_history, [step,
            mean training loss since the last point]; peaks, as they were before anything was scored.

        Raises:
            Stopped, ExperimentError: as `fit`.
        """
        seconds = self.learn() if learn else 0.0
        if not learn:
            self.evaluate()
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        seen = (self.state.epoch or 0) * len(self.train_dataset)
        peaks = self.peaks
        return {
            **{name: round(score, 6) for name, score in accuracy_and_f1(self.eval_dataset.labels, self.predicted).items()},
            "predicted": self.predicted,
            "loss": round(evaluations[-1]["eval_loss"], 6),
            "accuracy_by_epoch": [round(entry["eval_accuracy"], 6) for entry in evaluations] if learn else [],
            "train_seconds": round(seconds, 2),
            "examples_per_second": round(seen / seconds, 1) if learn else None,
            "loss_history": self.loss_history,
            **peaks,
        }


class Progress(TrainerCallback):
    """One bar over the whole run, in examples, with the training loss; a line after each evaluation."""

    def __init__(self, title: str, examples: int, trainer: BatchTrainer, shown: bool = True) -> None:
        self.title, self.examples, self.trainer, self.shown, self.bar = title, examples, trainer, shown, None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        self.examples_per_step = self.examples / len(train_dataloader)
        # A bar in a log file would be a line every time; there, twice a minute is enough.
        interval = 0.2 if sys.stderr.isatty() else 30
        total, done = (round(steps * self.examples_per_step) for steps in (state.max_steps, state.global_step))
        bar = {"desc": self.title, "unit": "ex", "mininterval": interval, "disable": not self.shown}
        self.bar = tqdm(total=total, initial=done, **bar)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(round(state.global_step * self.examples_per_step) - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.bar.set_postfix(self.trainer.status(logs), refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        when = f"epoch {state.epoch:.4g} of {args.num_train_epochs:g}" if state.global_step else "untrained"
        tqdm.write(f"{when}: {self.trainer.in_words(metrics)}")

    def close(self) -> None:
        """End the bar's line, so that what is printed next has one of its own."""
        if self.bar is not None:
            self.bar.close()
