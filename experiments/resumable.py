"""A Trainer that goes on where it was stopped, as if it had not been, and stops by itself when the numbers go wrong.

Of transformers' own checkpoints only the place in the data and the history are used: the rest would be pickles and the
whole model. What is restored instead, and when:

    before the first step    what is trained, the optimiser, the scheduler, the loss since the last point of the history
    before the next batch    the random states, after the batches that were seen have been passed over
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from lora_core.layers.base import LoraLayer

from . import checkpoints
from .checkpoints import Checkpoint, Saving
from .errors import ExperimentError
from .parallel import Processes, lost_processes
from .random_states import random_states, set_random_states
from .record import peak_rss_mb
from .stopping import Noted, Stopped

#: Where the tensors of a checkpoint belong: each name is one of these and the rest of the place.
MODEL, OPTIMIZER, RANDOM, LOSS = "model.", "optimizer.", "random.", "loss"


@dataclass(frozen=True)
class Course:
    """How a run is kept.

    Attributes:
        directory: where its checkpoints go.
        saving: when one is written.
        settings: all that the run depends on, stored with each.
        resume: the one that it goes on from; None: it starts anew.
        processes: those that train together.
        noted: where a signal is noted.
    """

    directory: Path
    saving: Saving = field(default_factory=Saving)
    settings: dict[str, Any] = field(default_factory=dict)
    resume: Checkpoint | None = None
    processes: Processes = field(default_factory=Processes)
    noted: Noted = field(default_factory=Noted)


class ResumableTrainer(Trainer):
    """A Trainer with the checkpoints of `checkpoints.py`.

    Attributes:
        last: the newest checkpoint of this run; None before there is one.
        stopping: the signal that all processes have agreed to stop for; 0 for none.
    """

    def __init__(self, *args: Any, course: Course, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.course, self.last, self.stopping = course, course.resume and course.resume.path, 0
        earlier = course.resume.numbers if course.resume else {}
        self.seconds_before, self.peaks_before = earlier.get("seconds", 0.0), earlier.get("peaks", {})
        self.started, self.evaluated_before = None, 0.0
        self.add_callback(_Keeper(self))

    def fit(self) -> None:
        """Train to the end, from the start or from the checkpoint.

        Raises:
            Stopped: a signal came; the step was finished and a checkpoint written.
            ExperimentError: a loss or a gradient is not finite, or another process is gone.
        """
        if self.course.resume:
            with self._as_written():
                TrainerState.load_from_json(str(self.course.resume.path / checkpoints.STATE))
        try:
            with lost_processes(then=lambda: f"start all of them again with --resume; {self.kept}"):
                self.train(resume_from_checkpoint=str(self.course.resume.path) if self.course.resume else None)
        except Stopped as stop:
            raise Stopped(stop.signal, stop.outcome or f"in the middle of a step; {self.kept}") from None

    @property
    def kept(self) -> str:
        """What there is to go on from, in words."""
        return f"the last good checkpoint is {self.last}" if self.last else "no checkpoint was written (--save-steps N does)"

    @property
    def seconds(self) -> float:
        """Seconds of training so far, in this process and in those that it goes on from, without the evaluations."""
        now = 0.0 if self.started is None else time.perf_counter() - self.started
        return self.seconds_before + now - (self.evaluated - self.evaluated_before)

    @property
    def evaluated(self) -> float:
        """Seconds of evaluation in the history."""
        return sum(entry["eval_runtime"] for entry in self.state.log_history if "eval_runtime" in entry)

    @property
    def peaks(self) -> dict[str, float]:
        """The most memory in MiB, in this process and in those that it goes on from."""
        cuda = torch.cuda.max_memory_allocated() / 2**20 if self.args.device.type == "cuda" else 0.0
        now = {"peak_rss_mb": peak_rss_mb(), "peak_cuda_mb": round(cuda, 1)}
        return {name: max(value, self.peaks_before.get(name, 0.0)) for name, value in now.items()}

    # --- writing ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, optimizer = self.state.global_step, self.optimizer.state_dict()
        tensors = {f"{MODEL}{path}": parameter.detach() for path, parameter in own_parameters(self.model).items()}
        for index, values in optimizer["state"].items():
            tensors |= {f"{OPTIMIZER}{index}.{name}": value for name, value in values.items() if torch.is_tensor(value)}
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise self.diverged(f"{bad[0]} has NaN or infinite values")
        for name, state in random_states().items():
            by_rank = self.accelerator.gather(state[None].to(self.args.device))
            tensors |= {f"{RANDOM}{rank}.{name}": one for rank, one in enumerate(by_rank)}
        tensors[LOSS] = self.accelerator.gather(self._tr_loss[None]).mean()
        numbers = {
            "settings": self.course.settings,
            "seconds": self.seconds,
            "peaks": self.peaks,
            "last_logged": self._globalstep_last_logged,
            "optimizer": {
                "param_groups": optimizer["param_groups"],
                "state": {i: {n: v for n, v in s.items() if not torch.is_tensor(v)} for i, s in optimizer["state"].items()},
            },
            "scheduler": self.lr_scheduler.state_dict(),
        }
        self.last = checkpoints.place(self.course.directory, step)
        if self.course.processes.first:
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            checkpoints.write(self.last, step, tensors, numbers, json.dumps(dataclasses.asdict(self.state)))
            checkpoints.prune(self.course.directory, self.course.saving.keep)
        if self.stopping:
            raise Stopped(self.stopping, f"step {step} is done and saved as {self.last}")

    # --- going on -----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._as_written():
            stored = self._stored(MODEL)
        own = own_parameters(self.model)
        if {path: p.shape for path, p in own.items()} != {path: t.shape for path, t in stored.items()}:
            raise ExperimentError(f"--resume: {self.last} is not of this base model; its files must be the same as then")
        with torch.no_grad():
            for path, parameter in own.items():
                parameter.copy_(stored[path])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        numbers = self.course.resume.numbers
        with self._as_written():
            state = {int(index): dict(values) for index, values in numbers["optimizer"]["state"].items()}
            for place, tensor in self._stored(OPTIMIZER).items():
                index, _, name = place.partition(".")
                state[int(index)][name] = tensor
            self.optimizer.load_state_dict({"state": state, "param_groups": numbers["optimizer"]["param_groups"]})
            self.lr_scheduler.load_state_dict(numbers["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self._as_written():
                set_random_states(self._stored(f"{RANDOM}{self.course.processes.rank}."))

    def _stored(self, place: str) -> dict[str, Tensor]:
        tensors = self.course.resume.tensors()
        return {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            if isinstance(error, ExperimentError):
                raise
            raise ExperimentError(f"--resume: {self.last} is not as written here ({error!r}); remove it") from None

    # --- stopping -----------------------------------------------------------------------------------------------------

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.loss = (loss[0] if isinstance(loss, tuple) else loss).detach()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The gradient's norm; before the optimiser uses it, every process looks whether the run is to go on."""
        norm = super()._get_grad_norm(model, grad_norm)
        finite = math.isfinite(self.loss) and math.isfinite(norm)
        any_bad, self.stopping = self.course.processes.reduce([int(not finite), self.course.noted.signal])
        if any_bad:
            what = ("loss", self.loss) if not math.isfinite(self.loss) else ("gradient", norm)
            raise self.diverged(f"the {what[0]} is {float(what[1])}", self.state.global_step + 1)
        return norm

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = lambda tensor: tensor  # every process evaluates everything
        output = super().evaluation_loop(*args, **kwargs)
        self.check_loss(output.metrics.get("eval_loss", 0.0))
        return output

    def check_loss(self, loss: float) -> None:
        """Raises an ExperimentError if a validation loss is no number."""
        if not math.isfinite(loss):
            raise self.diverged(f"the validation loss is {loss}")

    def diverged(self, what: str, step: int | None = None) -> ExperimentError:
        """The error for a run whose numbers have gone wrong."""
        rate = self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate
        step = self.state.global_step if step is None else step
        where = f"{what} at step {step}, learning rate {rate:g}"
        return ExperimentError(f"{where}: training diverged; lower --learning-rate; {self.kept}")


class _Keeper(TrainerCallback):
    """Says when a checkpoint is due. Not after the last step, when the results themselves are written."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        trainer, resume = self.trainer, self.trainer.course.resume
        self.epoch = len(train_dataloader)
        trainer.started, trainer.evaluated_before = time.perf_counter(), trainer.evaluated
        if resume is not None:
            with trainer._as_written():
                trainer._tr_loss += trainer._stored(LOSS)[""].to(args.device)
                trainer._globalstep_last_logged = int(resume.numbers["last_logged"])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.epoch:
            control.should_save = self._due(state)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """An epoch's last step: its evaluation comes before the checkpoint, which then has it in its history."""
        if state.global_step % self.epoch == 0:
            control.should_save = self._due(state)

    def _due(self, state: Any) -> bool:
        every = self.trainer.course.saving.every
        due = self.trainer.stopping or (every and state.global_step % every == 0)
        return bool(due) and state.global_step < state.max_steps


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{path: parameter} of what a run makes: all that is trained, and the values that adapters started from."""
    own = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            own |= {f"{path}.{t}.{name}": p for t in layer.lora_tables for name, p in getattr(layer, t).items()}
    return own
