"""Where a run's numbers come from: the code, the machine, and how busy that was. Free of torch.

    here(), after(...)      at the start of a run, and at its end; goes into its metrics.json as "provenance"
    differing(metrics)      which of the sources of a run are others than the present ones

Two hashes stand for the code: `engine`, of the rooms of lora_core that a training run goes through, and `experiments`, of
train.py and whatever it imports here. Comments, docstrings and empty lines do not count, since they change no number.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lora_core

KEY = "provenance"
HERE = Path(__file__).parent
ENGINE = Path(lora_core.__file__).parent
#: What only reads, writes or serves adapters: a change there changes no result.
BESIDES = ("cli", "deploy", "files/formats")
CODE = ("engine", "experiments")


def here() -> dict[str, Any]:
    """What is known before a run: version and hashes of the code, processor, cores, the load of the last minute, the time."""
    return {
        "version": lora_core.__version__,
        **sources(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "began": time.time(),
    }


def after(before: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What `here` said, the threads of the run, and the seconds that it took, loading and evaluating included."""
    kept = {name: value for name, value in before.items() if name != "began"}
    return {**kept, "threads": threads, "seconds": round(time.time() - before["began"], 1)}


@functools.cache
def sources() -> dict[str, str]:
    """{"engine", "experiments": 16 digits of a hash of the present code}."""
    rooms = sorted(ENGINE.rglob("*.py"))
    engine = [path for path in rooms if not path.relative_to(ENGINE).as_posix().startswith(BESIDES)]
    return {"engine": code_hash(engine, ENGINE), "experiments": code_hash(imported(HERE / "train.py"), HERE)}


def differing(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Of `CODE`, what has changed since the run; all of it for a run that recorded nothing."""
    recorded = metrics.get(KEY) or {}
    return tuple(name for name in CODE if recorded.get(name) != sources()[name])


def code_hash(paths: Iterable[Path], root: Path) -> str:
    """A hash of the names below `root` and of the statements of these files; 16 digits."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(root).as_posix()}\n{statements(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def statements(source: str) -> str:
    """The lines of a module without its docstrings, its lines of comments and its empty lines."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            left_out.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return "\n".join(line for n, line in lines if n not in left_out and line.strip() and not line.lstrip().startswith("#"))


def imported(start: Path) -> list[Path]:
    """A file of a package and those beside it that it imports, directly or through others; in the order of their names."""
    found, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [file for name in names if (file := path.with_name(f"{name}.py")).is_file()]
    return sorted(found)


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
