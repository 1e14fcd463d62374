"""Several processes that train one model: which of them this is, its share of a batch, and what they must agree on.

    torchrun --nproc-per-node 2 -m experiments.sst2 --method lora

torchrun or `accelerate launch` starts the processes; DistributedDataParallel averages their gradients. Each reads the same
batches of N sentences and takes n of each: process r of W takes rows r, r + W, ... Its loss, a mean over n, is weighted by
n W / N, so that the average is the gradient of the mean over the whole batch even where W does not divide N.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lora_core.errors import LoraError

from .errors import ExperimentError

#: A process that says nothing for so long is taken for dead; none waits for another longer than one writes a checkpoint.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        count: how many there are, on all machines.
        rank: the number of this one; number 0 prints and writes.
        local_count, local_rank: the same among those of this machine.
    """

    count: int = 1
    rank: int = 0
    local_count: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> Processes:
        """As torchrun says in the environment; one process where it says nothing."""
        given = [os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")]
        return cls(*map(int, given)) if all(map(str.isdecimal, given)) else cls()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def join(self, device: str) -> None:
        """Meets the others; returns when all are there.

        Raises:
            ExperimentError: there are more processes than GPUs, or the others did not come.
        """
        import torch

        if self.count == 1 or torch.distributed.is_initialized():
            return
        if device == "cuda":
            if self.local_count > torch.cuda.device_count():
                raise ExperimentError(
                    f"{self.local_count} processes were started on a machine with {torch.cuda.device_count()} GPUs; "
                    "start one for each, or pass --device cpu"
                )
            torch.cuda.set_device(self.local_rank)
        with lost_processes("could not meet the other processes"):
            backend = "nccl" if device == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=PATIENCE)

    def first_decides(self, decide: Callable[[], int]) -> int:
        """What `decide` returns on process 0, a number of at least 0; its error is everyone's.

        Raises:
            LoraError: that of process 0.
        """
        if self.count == 1:
            return decide()
        answer, error = -1, None
        if self.first:
            try:
                answer = decide()
            except LoraError as raised:
                error = raised
        with lost_processes():
            (answer,) = self.reduce([answer])
        if error is not None:
            raise error
        if answer < 0:
            raise ExperimentError("process 0 gave up; its own message says why")
        return answer

    def agree(self, settings: dict[str, Any]) -> None:
        """Checks that every process is about to do the same.

        Raises:
            ExperimentError: they differ; "auto" may have found another model or other data on another machine.
        """
        digest = hashlib.sha256(json.dumps(settings).encode()).digest()
        number = int.from_bytes(digest[:6], "big")
        with lost_processes():
            same = self.count == 1 or self.reduce([number, -number]) == [number, -number]
        if not same:
            raise ExperimentError(
                "the processes do not have the same settings, data or base model; give each the same command, with --model "
                "and --data, and the same files"
            )

    def reduce(self, numbers: list[int]) -> list[int]:
        """The largest of each of these numbers in any process. What is to be said where one is lost, the caller knows."""
        if self.count == 1:
            return numbers
        import torch

        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(numbers, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def share(self, batch: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """This process's rows of a batch, and the weight of its loss. With no row left it takes one that weighs nothing."""
        if self.count == 1:
            return batch, 1.0
        rows = len(batch["labels"])
        if self.rank >= rows:
            return {name: tensor[:1] for name, tensor in batch.items()}, 0.0
        mine = {name: tensor[self.rank :: self.count] for name, tensor in batch.items()}
        return mine, len(mine["labels"]) * self.count / rows


@contextmanager
def lost_processes(
    what: str = "lost another process", then: Callable[[], str] = lambda: "start all of them again"
) -> Iterator[None]:
    """A context in which the loss of another process is a user's error, in one line that ends with what to do."""
    try:
        yield
    except RuntimeError as error:
        import torch

        text = " ".join(str(error).split())
        if not (isinstance(error, torch.distributed.DistError) or any(w in text.lower() for w in ("gloo", "nccl", "peer"))):
            raise
        raise ExperimentError(f"{what}: {text[:160]}; see what that one says, and {then()}") from None


@contextmanager
def first_prints(processes: Processes) -> Iterator[None]:
    """A context in which only process 0 writes to standard output, and only the first of a machine to standard error."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stdout if processes.first else nowhere
        sys.stderr = sys.stderr if processes.local_rank == 0 else nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
