"""Teach a pretrained model whether a sentence about a film is positive, with LoRA or QLoRA.

    python -m experiments.sst2 --method qlora
    python -m experiments.sst2 --method lora --data DIR     GLUE's SST-2: train.tsv and dev.tsv
    python -m experiments.sst2 --method qlora --train-samples 1000 --epochs 1     a first look, in seconds

Without a network it uses a model and sentences that come as Python packages (pip install 'lora-core[offline]').
Each run leaves OUTPUT/metrics.json and OUTPUT/adapter/; the same run is not done twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .methods import METHODS, Method, Schedule


def parser() -> Parser:
    """The command line of this experiment."""
    usual = Schedule()
    p = Parser(__doc__, prog="python -m experiments.sst2", usage="%(prog)s [--method METHOD] [options]")
    methods = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
    p.add_argument("--method", choices=METHODS, metavar="METHOD", default="qlora", help=methods)

    what = p.add_argument_group("what to train on what")
    what.add_argument(
        "--model", default="auto", help="auto (distilbert-base-uncased, else packaged), packaged, a Hub name or a directory"
    )
    what.add_argument(
        "--data", default="auto", help="auto ($SST2_DIR, else hub, else packaged), hub, packaged or a directory"
    )
    what.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where the results go; one of its own under runs/ if not given"
    )
    what.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in the output directory")
    what.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when there is one")
    what.add_argument(
        "--report-to", type=_names, default=(), metavar="NAMES", help="loggers of the Trainer, such as tensorboard or wandb"
    )

    adapter = p.add_argument_group("the adapter; what is not given, the method decides")
    adapter.add_argument("--rank", type=int, metavar="R", help="rank of each update")
    adapter.add_argument("--alpha", type=float, help="the update is scaled by alpha / rank")
    adapter.add_argument("--dropout", type=float, metavar="P", help="chance that an adapter's input is zeroed in training")
    adapter.add_argument(
        "--target-modules", type=_names, metavar="NAMES", help="layers to adapt, comma-separated: query,value"
    )

    schedule = p.add_argument_group("the schedule")
    for field, kind, text in (
        ("epochs", int, "times that each sentence is seen"),
        ("batch_size", int, "sentences in a step"),
        ("learning_rate", float, "peak learning rate of AdamW"),
        ("weight_decay", float, "decoupled weight decay"),
        ("warmup", float, "share of the steps in which the learning rate rises; then it falls to 0"),
        ("max_grad_norm", float, "gradients are clipped to this norm; 0 for no clipping"),
        ("max_length", int, "tokens of a sentence that are read"),
        ("train_samples", int, "train on so many sentences, drawn at random"),
        ("max_steps", int, "stop after so many steps"),
        ("seed", int, "of the head, the adapters, the order and the dropout"),
    ):
        flag = "--" + field.replace("_", "-")
        schedule.add_argument(flag, type=kind, default=getattr(usual, field), metavar="N" if kind is int else "X", help=text)
    return p


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of names")
    return names


def chosen_method(args: argparse.Namespace) -> Method:
    """The method that is named, with the settings that were given in place of its own."""
    given = {
        "r": args.rank,
        "lora_alpha": args.alpha,
        "lora_dropout": args.dropout,
        "target_modules": args.target_modules,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    method = METHODS[args.method]
    if changes and not method.adapt:
        raise ExperimentError(f"--method {method.name} has no adapter; leave out --rank, --alpha, --dropout, --target-modules")
    return dataclasses.replace(method, **changes)


def default_output(plan: dict[str, Any]) -> Path:
    """runs/METHOD-DATA-MODEL-seedN: readable, and the same for the same choices."""
    parts = (plan["method"], plan["data"]["name"], Path(plan["base_model"]["name"]).name, f"seed{plan['seed']}")
    return Path("runs", re.sub(r"[^\w.-]+", "-", "-".join(parts)).lower())


def experiment(args: argparse.Namespace) -> int:
    """Resolve, print what was chosen, train, print what came out."""
    schedule = Schedule(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Schedule)})
    method = chosen_method(args)
    from . import data, models  # after the flags have been checked: what follows takes seconds to import

    sentences = data.load(args.data)
    base = models.resolve(args.model)
    print(f"base model: {base}; data: {sentences}", flush=True)

    from . import record
    from .train import Job, choose_device, train

    job = Job(method, schedule, base, sentences, choose_device(args.device), args.report_to)
    plan = job.plan()
    output = args.output_dir or default_output(plan)
    if not args.overwrite and (metrics := record.finished(output, plan)):
        print(f"{output} holds this very run already: accuracy {metrics['accuracy']:.1%}; pass --overwrite to do it again")
        return 0
    metrics = train(job, output)
    print(summary(metrics))
    print(f"results: {output / record.METRICS}")
    if method.adapt:
        adapter = output / record.ADAPTER
        print(f'try it: python -m experiments.predict --adapter {adapter} "I absolutely loved this product!"')
    return 0


def summary(metrics: dict[str, Any]) -> str:
    """The result in a line."""
    line = f"{metrics['method']}: accuracy {metrics['accuracy']:.1%}, F1 {metrics['f1']:.3f}"
    if metrics["train_seconds"]:
        minutes, seconds = divmod(round(metrics["train_seconds"]), 60)
        line += f" after {minutes} min {seconds:02d} s of training at {metrics['examples_per_second']:.0f} examples/s"
    cuda = f", {metrics['peak_cuda_mb']:,.0f} MB on the GPU" if metrics["peak_cuda_mb"] else ""
    return f"{line}; peak memory {metrics['peak_rss_mb']:,.0f} MB{cuda}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(lambda: experiment(args))


if __name__ == "__main__":
    if "--report-to" not in " ".join(sys.argv):  # a logger may need them
        leave_out_unused()
    sys.exit(main())
