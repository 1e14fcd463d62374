"""What every command line here shares: one line and exit code 2 for a user's mistake, 1 for a check that failed."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckFailedError, LoraError, printable

DONE, CHECK_FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help shows the text given and the defaults."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"error: {message}; see {self.prog} --help\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        hidden = default in (None, argparse.SUPPRESS) or isinstance(default, tuple) or action.nargs == 0 or action.required
        return action.help if hidden else f"{action.help} (default: %(default)s)"


def finite(text: str) -> float:
    """An argument that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def tolerance(text: str) -> float:
    """An argument that is a finite number, and not negative."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return value


def switches(text: str) -> list[bool]:
    """An argument that is a list of 0 and 1."""
    if not text or set(text.split(",")) - {"0", "1"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,0,1")
    return [part == "1" for part in text.split(",")]


def run(command: Callable[[], int]) -> int:
    """Runs the body of a command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # whatever the locale, a name that it has no letters for is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except CheckFailedError as error:
        return _say(error.args[0], CHECK_FAILED)
    except LoraError as error:
        return _say(str(error), MISTAKE)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return DONE
    except KeyboardInterrupt:
        return _say("interrupted; nothing was left", INTERRUPTED)


def _say(message: str, code: int) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def show(result: Any, as_json: bool) -> None:
    """Prints a result: its text, or its fields as one JSON object; what is no number there is null."""
    if not as_json:
        text = str(result) if not isinstance(result, dict) else "\n".join(f"{key}: {value}" for key, value in result.items())
        print("\n".join(map(printable, text.split("\n"))))  # much of it may be out of somebody's file
        return
    print(json.dumps(_plain(result), allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
