"""Teach a language model to answer as the rows of a file do, with LoRA or QLoRA (supervised fine-tuning).

    python -m experiments.sft                                    the packaged model and task: a sentence -> a JSON record
    python -m experiments.sft --method lora --model DIR --data FILE.jsonl

A row of FILE is {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}. The model's own chat
template writes it; only the last answer is learned. Some rows are held out, and the model is judged on them by its loss and by
greedy answers that are right to the letter, before training and after each epoch.

Each run leaves OUTPUT/metrics.json and OUTPUT/adapter/. One that is stopped goes on with --resume as if it had not been:

    python -m experiments.sft --save-steps 20 --resume
    torchrun --nproc-per-node 2 -m experiments.sft               several processes, each with a share of every batch
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .beginning import FINISHED, beginning, checkpoint_of, command_to_go_on, default_output, interpreter
from .command import Parser, leave_out_unused, run
from .errors import ExperimentError
from .flags import adapter_flags, checkpoint_flags, chosen_method, output_flags, schedule_flags, schedule_of, source_flags
from .methods import NOTHING
from .parallel import Processes, first_prints
from .recipes import LANGUAGE_METHODS
from .stopping import Stopped

if TYPE_CHECKING:
    from .conversations import Conversations

MODEL = "packaged-lm (SmolLM2-135M-Instruct), a Hub name or a directory"
DATA = "orders (the packaged task: sentence -> JSON) or a file of JSON lines"


def parser() -> Parser:
    """The command line of this experiment."""
    p = Parser(__doc__, prog="python -m experiments.sft", usage="%(prog)s [--method METHOD] [options]")
    methods = "; ".join(f"{method.name}: {method.summary}" for method in LANGUAGE_METHODS.values())
    p.add_argument("--method", choices=LANGUAGE_METHODS, metavar="METHOD", default="qlora", help=methods)

    what = p.add_argument_group("what to train on what")
    source_flags(what, MODEL, DATA)
    what.add_argument("--held-out", type=int, metavar="N", help="rows of a file that are held out; a tenth, at most 100")
    output_flags(what)

    adapter_flags(p.add_argument_group("the adapter; what is not given, the method decides"))
    schedule = p.add_argument_group("the schedule")
    schedule_flags(schedule, epochs=1, batch_size=8, max_length=512, weight_decay=0.0)
    schedule.add_argument("--packing", action="store_true", help="lay the rows of a batch end to end instead of padding them")
    text = "compute activations again in the backward: slower, and smaller"
    schedule.add_argument("--gradient-checkpointing", action="store_true", help=text)
    checkpoint_flags(p.add_argument_group("stopping and going on"))
    return p


def experiment(args: argparse.Namespace, processes: Processes, argv: Sequence[str]) -> int:
    """Resolve, print what was chosen, train, print what came out."""
    method = chosen_method(args, LANGUAGE_METHODS)
    schedule = schedule_of(args, method)
    if args.resume and args.overwrite:
        raise ExperimentError("--resume goes on and --overwrite starts anew; leave one out")
    from . import conversations, models  # after the flags have been checked: what follows takes seconds to import

    rows = conversations.load(args.data, args.held_out)
    base = models.resolve(args.model)
    print(f"base model: {base}; data: {rows}", flush=True)

    from . import checkpoints, record
    from .job import choose_device
    from .precision import choose_together
    from .tuning import TuningJob, tune

    saving = checkpoints.Saving(args.save_steps, args.keep_checkpoints)
    ways = {"packing": args.packing, "gradient_checkpointing": args.gradient_checkpointing}
    device = choose_device(args.device)
    processes.join(device)
    precision = choose_together(args.precision, device, processes)
    job = TuningJob(method, schedule, base, rows, device, precision, args.report_to, processes, **ways)
    plan, settings = job.plan(), job.settings()
    output = args.output_dir or default_output(plan)
    processes.agree({**settings, "output": str(output)})
    begin = processes.first_decides(lambda: beginning(args, output, plan, settings, "exact_match"))
    if begin == FINISHED:
        return 0
    try:
        metrics = tune(job, output, saving, checkpoint_of(args, output, begin))
    except Stopped as stop:
        if not stop.outcome:
            raise
        on = command_to_go_on(argv, output, processes, "sft")
        raise Stopped(stop.signal, f"{stop.outcome}; go on with: {on}") from None
    print(summary(metrics))
    print(f"results: {output / record.METRICS}")
    if method.trains != NOTHING:
        trained = f"--adapter {output / record.ADAPTER} --compare" if method.adapts else f"--merged {output / record.MODEL}"
        print(f"try it: {interpreter()} -m experiments.chat {trained} {example(rows)}")
    return 0


def example(rows: Conversations) -> str:
    """The arguments that ask the first held-out question, with what the system says there."""
    said = dict(rows.validation[0].prompt)
    system = f"--system {shlex.quote(said['system'])} " if "system" in said else ""
    return system + shlex.quote(said.get("user", "Hello"))


def summary(metrics: dict[str, Any]) -> str:
    """The result in a line."""
    line = f"{metrics['method']}: {metrics['exact_match']:.1%} of {metrics['data']['validation']} held-out answers are exact"
    if metrics["train_seconds"]:
        minutes, seconds = divmod(round(metrics["train_seconds"]), 60)
        line += f" ({metrics['exact_match_before']:.1%} before), loss {metrics['loss']:.3f}"
        line += f", after {minutes} min {seconds:02d} s of training at {metrics['tokens_per_second']:.0f} tokens/s"
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
