"""What the commands share: a parser and a runner that answer a user's mistake with one line and exit code 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from lora_core.cli import command_line
from lora_core.errors import LoraError

from .stopping import Stopped, handled_by, raise_stopped

#: Packages that transformers and bitsandbytes import when they are installed. Nothing here uses the first two, and the others
#: only to read data and to score what came out. Leaving them out until then takes 1.5 s off the start and 190 MB off the peak.
UNUSED = ("networkx", "peft", "datasets", "scipy", "sklearn")


class Parser(command_line.Parser):
    """A parser whose errors are one line, and whose help shows the module's own text and the defaults."""

    def __init__(self, doc: str, **kwargs: Any) -> None:
        super().__init__(description=doc, **kwargs)


def run(command: Callable[[], int | None], interrupted: str = "nothing was saved") -> int:
    """Run the body of a command; returns its exit code. A user's mistake becomes one line on standard error, and so do
    Ctrl-C (130) and SIGTERM (143), with what became of the work."""
    quieten()
    try:
        with handled_by(raise_stopped):
            return command() or 0
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as raised:
        stopped = raised if isinstance(raised, Stopped) else Stopped(signal.SIGINT)
        print(f"error: {stopped.cause}; {stopped.outcome or interrupted}", file=sys.stderr)
        return 128 + stopped.signal


def quieten() -> None:
    """Silence what the libraries say to their developers; their errors still come through."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def leave_out_unused() -> None:
    """Make `UNUSED` look uninstalled in this process: None in sys.modules is Python's own way to say so."""
    sys.modules.update(dict.fromkeys(name for name in UNUSED if name not in sys.modules))


def show_again(*names: str) -> None:
    """Undo `leave_out_unused` for these packages, before something here imports one."""
    for name in names:
        if sys.modules.get(name, name) is None:
            del sys.modules[name]
