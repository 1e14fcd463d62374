"""The command: python -m bench [QUESTION ...] [options]; see --help."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from lora_core.cli.command_line import Parser

from . import __doc__ as about
from .quiet import quieten

#: Each is the name of the module that answers it.
QUESTIONS = ("overhead", "memory", "job", "training", "decoding", "merging", "loading", "mixing", "llama")
#: Is read from the study's runs, which are on the CPU.
JOB = "job"
#: Asked by name alone: it compiles for minutes, and needs a C++ compiler.
COMPILED = "compiled"
#: peft's whole runs beside ours, for the study: forty minutes, and a file of its own.
REFERENCE = "reference"
RESULTS = Path(__file__).parent / "results"


def parser() -> Parser:
    """The command line of the bench."""
    p = Parser(prog="python -m bench", description=about)
    known = ", ".join(QUESTIONS)
    p.add_argument(
        "questions",
        nargs="*",
        metavar="QUESTION",
        help=f"{known}; none: all (llama only on CUDA, {JOB} only on the CPU); {COMPILED}; or {REFERENCE} alone",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--full", action="store_true", help="overhead: the whole grid of shapes; over an hour on two cores")
    p.add_argument("--quick", action="store_true", help="two rounds of small shapes, to see that everything runs")
    p.add_argument("--threads", type=int, help="threads of torch; torch's own choice if not given")
    p.add_argument("--data", default="auto", metavar="DIR", help="reference: GLUE's SST-2; as for the experiments if not given")
    p.add_argument("--plan", action="store_true", help="reference: only say what is to be done")
    p.add_argument("--output", type=Path, help="JSON file; the chart goes beside it; bench/results/DEVICE.json if not given")
    return p


def reference(options: Namespace) -> None:
    """Makes the rows of the reference; imports what does it."""
    from .reference import make

    make(options)


def main(arguments: Sequence[str] | None = None) -> int:
    quieten()
    command = parser()
    options = command.parse_args(arguments)
    if options.questions == [REFERENCE]:
        from experiments.command import run

        return run(lambda: reference(options), interrupted="the rows that are made are kept; the same command goes on")
    if unknown := [q for q in options.questions if q not in (*QUESTIONS, COMPILED)]:
        command.error(f"no question {unknown[0]!r}; there are {', '.join((*QUESTIONS, COMPILED))}")
    if JOB in options.questions and options.device == "cuda":
        command.error(f"{JOB}: it is read from the study's runs, which are on the CPU; leave out --device cuda")
    if options.threads is not None and options.threads < 1:
        command.error(f"--threads must be at least 1, not {options.threads}")
    import torch

    from .asking import ask
    from .settings import Settings

    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: torch sees no CUDA device here")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = Settings(options.device, options.quick, options.full)
    left_out = JOB if settings.device == "cuda" else "" if settings.quick else "llama"
    chosen = options.questions or [q for q in QUESTIONS if q != left_out]
    # A quick run's numbers mean nothing: they never replace measured ones.
    default = Path("runs", f"bench-quick-{settings.device}.json") if settings.quick else RESULTS / f"{settings.device}.json"
    ask(chosen, settings, options.output or default)
    return 0


if __name__ == "__main__":
    sys.exit(main())
