"""One run of the reference, in a process that does nothing else; `reference.py` starts it.

    python -m bench.reference_run --engine peft --harness plain --method qlora --data DIR --output run.json

The engine puts the adapters on: ours, or peft on bitsandbytes' own 4-bit layers. The harness trains: ours is the experiments'
own, with its heap and its kept shapes; plain is transformers.Trainer as it comes. Base, head, sentences, batches, settings and
the numbers that are taken are the same.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import provenance
from experiments.command import leave_out_unused, run, show_again
from experiments.flags import schedule_flags, schedule_of
from experiments.recipes import METHODS
from lora_core.cli.command_line import Parser

from .quiet import quieten

if TYPE_CHECKING:
    from experiments.job import Job
    from experiments.models import Loaded

CHOICES = ("ours", "peft"), ("ours", "plain")


def parser() -> Parser:
    """The command line of the run."""
    p = Parser(prog="python -m bench.reference_run", description=__doc__)
    p.add_argument("--engine", choices=CHOICES[0], required=True)
    p.add_argument("--harness", choices=CHOICES[1], required=True)
    p.add_argument("--method", choices=[name for name, method in METHODS.items() if method.adapts], required=True)
    p.add_argument("--data", default="auto", help="as for the experiments")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="bf16: under autocast, in both harnesses")
    p.add_argument("--output", type=Path, required=True, help="JSON file for its row")
    schedule_flags(p.add_argument_group("the schedule"))
    return p


def sources() -> str:
    """A hash of the code that puts peft's adapters on and trains them; 16 digits."""
    here = Path(__file__)
    return provenance.code_hash(provenance.imported(here), here.parent)


def job_of(args: Any) -> Job:
    """What a run does, from its flags."""
    from experiments import models
    from experiments.job import Job

    method = METHODS[args.method]
    return Job(method, schedule_of(args, method), models.resolve("packaged"), _data(args.data), precision=args.precision)


@functools.cache
def _data(choice: str) -> Any:
    from experiments import data

    return data.load(choice)


def row(args: Any) -> dict[str, Any]:
    """Trains, and returns what is to be known of it."""
    import numpy as np
    import torch
    from transformers import set_seed

    from experiments import models, record
    from experiments.batches import TokenisedTexts
    from experiments.predictions import accuracy_and_f1
    from experiments.preparing import check_length

    from . import harnesses

    before = provenance.here()
    job = job_of(args)
    schedule, validation = job.schedule, job.data.validation
    train = job.data.train.sample(schedule.train_samples, schedule.seed) if schedule.train_samples else job.data.train
    set_seed(schedule.seed)  # before the head is initialised
    loaded = models.load_classifier(job.base)
    loaded.model = adapted(loaded, job, args.engine)
    check_length(loaded, schedule.max_length)
    sets = [TokenisedTexts(loaded.tokenizer, s.texts, schedule.max_length, s.labels) for s in (train, validation)]
    outcome = harnesses.HARNESSES[args.harness](loaded.model, job, *sets, args.output.parent)
    peak = record.peak_rss_mb()  # before anything is scored
    plan, predicted = job.plan(), np.asarray(outcome["predicted"])
    return {
        "engine": args.engine,
        "harness": args.harness,
        "method": job.method.name,
        "base": job.base.name,
        "base_sha256": job.base.sha256,
        **{key: plan["data"][key] for key in ("train", "validation", "sha256")},
        "data": job.data.name,
        "settings": plan["hyperparameters"],
        "seed": schedule.seed,
        **{name: round(value, 6) for name, value in accuracy_and_f1(validation.labels, predicted).items()},
        "predicted": "".join(map(str, predicted.tolist())),
        "trainable_parameters": sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
        "peak_rss_mb": peak,
        "train_seconds": round(outcome["train_seconds"], 2),
        "versions": {**record.versions(), "peft": importlib.metadata.version("peft")},
        provenance.KEY: {**provenance.after(before, torch.get_num_threads()), "bench": sources()},
    }


def adapted(loaded: Loaded, job: Job, engine: str) -> Any:
    """The base with fresh adapters, as the method says and as the engine does it."""
    from . import harnesses

    return harnesses.ours(loaded, job) if engine == "ours" else harnesses.theirs(loaded, job)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    quieten()

    def command() -> None:
        from experiments.record import write_json

        write_json(args.output, row(args))

    if args.engine == "peft":
        show_again("peft")
    return run(command)


if __name__ == "__main__":
    leave_out_unused()
    sys.exit(main())
