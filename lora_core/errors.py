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


class UnknownAdapterError(LoraError, LookupError):
    """No adapter of that name is on the model."""


class AdapterExistsError(LoraError, ValueError):
    """An adapter of that name is on the model already."""


class AdapterFileMissingError(LoraError, FileNotFoundError):
    """A directory or file that an adapter needs is not there."""


class AdapterFormatError(LoraError, ValueError):
    """An adapter's files are broken, or say something that the model or this package can't honour."""


class WrongBaseError(LoraError, ValueError):
    """An adapter was made for another base, or on one that was quantised or cast differently."""


class MixedBatchError(LoraError, RuntimeError):
    """A mixed batch, or a change of the adapters while one or `disable_adapters` is open, can't be had as things stand."""


class ShardedError(LoraError, RuntimeError):
    """The model is spread over processes, and what was asked for needs it whole."""


class OffloadedError(LoraError, RuntimeError):
    """Weights are on the meta device, or are kept elsewhere by accelerate, where they can't be read or written."""


class MergeError(LoraError, RuntimeError):
    """Adapters can't be folded into (or taken out of) the base weights as things stand."""


class CheckpointError(LoraError, ValueError):
    """A base model's files are missing, broken, or not what a header or an index says they are."""


class OutputError(LoraError, OSError):
    """Files can't be written where they should go; what was begun is gone."""


class CheckFailedError(LoraError, RuntimeError):
    """What was made differs from what was trained by more than is allowed."""


class QuantizationError(LoraError, ValueError):
    """A model can't be quantised to NF4 as asked."""


class MissingDependencyError(LoraError, ImportError):
    """An optional library is needed for this and is not installed."""


class SecondDerivativeError(LoraError, RuntimeError):
    """A gradient of a gradient was asked for, which the fused layers don't have."""


def one_line(message: str) -> str:
    """A message without line breaks, what a terminal would obey, or more than `LONGEST` characters."""
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST * 3 // 4]} ... {line[-LONGEST // 5 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
