"""What can go wrong, by name.

Every error that a user's input can cause is a `LoraError`, and also a subclass of the builtin that fits, so both
`except LoraError` and `except ValueError` do what they say. A message is one line: what was found, what was expected
and what to do.
"""

#: The longest message. What was found may be a megabyte of somebody's file.
LONGEST = 1_000


class LoraError(Exception):
    """The base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(LoraError, ValueError):
    """A `LoraConfig` field, or an argument, has a value that is not allowed."""


class TargetError(LoraError, ValueError):
    """A name pattern matched nothing, or matched something that can't carry an adapter."""


class AdapterNameError(LoraError, LookupError, ValueError):
    """No adapter of that name is on the model, or one is and none may be."""


class FileFormatError(LoraError, ValueError):
    """Files of an adapter, a probe or a base are missing, broken, or say something that the model can't honour."""


class WrongBaseError(LoraError, ValueError):
    """An adapter was made for another base, or on one that was quantised or cast differently."""


class StateError(LoraError, RuntimeError):
    """What was asked for can't be done as things stand: merged, sharded or offloaded weights, an open mixed batch, 4 bits."""


class CheckFailedError(LoraError, RuntimeError):
    """What was made differs from what was trained by more than is allowed."""


class OutputError(LoraError, OSError):
    """Files can't be written where they should go; what was begun is gone."""


class ServerError(LoraError, ConnectionError):
    """A server can't be asked, refuses, or answers with what is no answer; `status` is what HTTP calls it, if it answered."""

    status: int | None = None


class MissingDependencyError(LoraError, ImportError):
    """An optional library is needed for this and is not installed."""


def one_line(message: str) -> str:
    """A message without line breaks, what a terminal would obey, or more than `LONGEST` characters."""
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST * 3 // 4]} ... {line[-LONGEST // 5 :]}"
    return printable(line)


def printable(text: str) -> str:
    """A text in which whatever a terminal would obey, and what nobody would see, is written out: "\\x1b[2J"."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
