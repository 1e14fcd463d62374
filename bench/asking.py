"""Asks the questions one by one; what is answered is in the file at once."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path

from . import report
from .chart import draw
from .goals import judged
from .settings import Settings, machine


def ask(chosen: Sequence[str], settings: Settings, output: Path) -> None:
    """Answers the questions, prints what was found, and writes `output`, with a chart beside it. A question is the name of
    its module, which is imported when it is asked: the libraries take seconds."""
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
    if draw(report.measures_of(answers), output.with_suffix(".png")):
        print(f"\nchart: {output.with_suffix('.png')}")
    print(f"numbers: {output}\n\n{report.PEERS}\n\n{report.goals_table(_goals(answers))}")


def _goals(answers: dict) -> list[dict]:
    ran = [part["machine"] for part in answers.values()]
    comparable = all(m["gpu"] is None and not m["quick"] for m in ran)
    return judged(report.measures_of(answers), comparable)
