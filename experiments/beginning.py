"""Where a run goes, whether it begins anew or goes on, and the command that goes on with it. Free of torch."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ExperimentError
from .flags import AUTO
from .parallel import Processes

if TYPE_CHECKING:
    from .checkpoints import Checkpoint


#: The results that are committed.
RESULTS = Path(__file__).resolve().parent / "results"
#: Where a sweep's trials go: judged on other sentences, so no results of the study.
TRIALS = "trials"


def default_output(plan: dict[str, Any]) -> Path:
    """runs/METHOD-DATA-MODEL-seedN: readable, and the same for the same choices."""
    parts = (plan["method"], plan["data"]["name"], Path(plan["base_model"]["name"]).name, f"seed{plan['seed']}")
    return Path("runs", re.sub(r"[^\w.-]+", "-", "-".join(parts)).lower())


#: What `beginning` says besides the step to go on from.
FINISHED, ANEW = 0, 1


def beginning(args: argparse.Namespace, output: Path, plan: dict[str, Any], settings: dict[str, Any], measure: str) -> int:
    """FINISHED, ANEW, or ANEW plus the step of the checkpoint to go on from; prints what it is to be.

    `measure` names the share in metrics.json that says how good a finished run is.

    Raises:
        ExperimentError: the output directory holds another run, or the checkpoint is of one.
    """
    from . import checkpoints, provenance, record

    directory = output / checkpoints.CHECKPOINTS
    if args.resume:
        found = checkpoints.newest(directory) if args.resume == AUTO else checkpoints.read(Path(args.resume))
        if found:
            checkpoints.check_same(found, settings)
            print(f"going on from step {found.step}: {found.path}", flush=True)
            return ANEW + found.step
    if not args.overwrite and (metrics := record.finished(output, plan)):
        found = f"{measure.replace('_', ' ')} {metrics[measure]:.1%}"
        by = ", made by other code than the present one" if provenance.differing(metrics) else ""
        print(f"{output} holds this very run already: {found}{by}; pass --overwrite to do it again")
        return FINISHED
    if args.resume:
        print("no checkpoint to go on from: starting anew")
    elif not args.overwrite and checkpoints.any_in(directory):
        raise ExperimentError(
            f"--output-dir: {str(output)!r} holds checkpoints of a run that was not finished; pass --resume to go on, or "
            "--overwrite to start anew"
        )
    return ANEW


def checkpoint_of(args: argparse.Namespace, output: Path, begin: int) -> Checkpoint | None:
    """The checkpoint to go on from, once `beginning` has said so; None to begin anew."""
    from . import checkpoints

    if begin <= ANEW:
        return None
    place = checkpoints.place(output / checkpoints.CHECKPOINTS, begin - ANEW)
    return checkpoints.read(place if args.resume == AUTO else Path(args.resume))


def interpreter() -> str:
    """How this Python is called from where the command stands: "python" outside of a virtual environment, else its path."""
    if sys.prefix == sys.base_prefix:
        return "python"
    path = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if path.startswith("..") else path)


def command_to_go_on(argv: Sequence[str], output: Path, processes: Processes, module: str = "sst2") -> str:
    """The command that goes on with the run of `argv`: the same, in its output directory, with --resume."""
    text = "\0".join(["", *argv, ""])
    kept = re.sub(r"\0--(overwrite|resume(=[^\0]*|\0[^\0-][^\0]*)?)(?=\0)", "", text).split("\0")[1:-1]
    launcher = interpreter()
    if processes.count > 1:
        launcher = f"torchrun --nproc-per-node {processes.local_count}"
        launcher += f" --nnodes {processes.count // processes.local_count}" if processes.count > processes.local_count else ""
    where = [] if any(a.partition("=")[0] == "--output-dir" for a in kept) else ["--output-dir", str(output)]
    return f"{launcher} -m experiments.{module} {shlex.join([*kept, *where, '--resume'])}"
