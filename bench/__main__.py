"""The command: python -m bench [QUESTION ...] [options]; see --help."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __doc__ as about
from . import report
from .goals import judged
from .quiet import quieten
from .settings import Settings, machine

#: The modules that answer them. Each is imported when it is asked: the libraries take seconds.
QUESTIONS = ("overhead", "memory", "training", "merging", "loading", "mixing", "llama")
RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=about, formatter_class=formatter, allow_abbrev=False)
    known = ", ".join(QUESTIONS)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"{known}; none: all (llama only on CUDA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--full", action="store_true", help="overhead: the whole grid of shapes; over an hour on two cores")
    parser.add_argument("--quick", action="store_true", help="two rounds of small shapes, to see that everything runs")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--output", type=Path, help="JSON file; the chart goes beside it (default: bench/results/DEVICE.json)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    quieten()
    command = parser()
    options = command.parse_args(arguments)
    if unknown := [q for q in options.questions if q not in QUESTIONS]:
        command.error(f"no question {unknown[0]!r}; there are {', '.join(QUESTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: torch sees no CUDA device here")
    if options.threads is not None:
        if options.threads < 1:
            command.error(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    settings = Settings(options.device, options.quick, options.full)
    chosen = options.questions or [q for q in QUESTIONS if q != "llama" or settings.device == "cuda" or settings.quick]
    # A quick run's numbers mean nothing: they never replace measured ones.
    default = Path("runs", f"bench-quick-{settings.device}.json") if settings.quick else RESULTS / f"{settings.device}.json"
    ask(chosen, settings, options.output or default)
    return 0


def ask(chosen: Sequence[str], settings: Settings, output: Path) -> None:
    """Answers the questions one by one; what is answered is in the file at once."""
    answers = report.read(output)
    for question in chosen:
        print(f"\n== {question}", flush=True)
        module = importlib.import_module(f".{question}", __package__)
        start, found = time.perf_counter(), []
        for measure in module.run(settings):
            found.append(measure)
            print(report.show(measure), flush=True)
        print(f"-- {time.perf_counter() - start:.0f} s", flush=True)
        answers[question] = report.answer(machine(settings), found)
        report.write(output, answers, _goals(answers))
    from .chart import draw

    if draw(report.measures_of(answers), output.with_suffix(".png")):
        print(f"\nchart: {output.with_suffix('.png')}")
    print(f"numbers: {output}\n\n{report.PEERS}\n\n{report.goals_table(_goals(answers))}")


def _goals(answers: dict) -> list[dict]:
    ran = [part["machine"] for part in answers.values()]
    comparable = all(m["gpu"] is None and not m["quick"] for m in ran)
    return judged(report.measures_of(answers), comparable)


if __name__ == "__main__":
    sys.exit(main())
