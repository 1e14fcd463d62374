"""The bitsandbytes library, which holds weights in 4 and 8 bits; imported when it is first asked for."""

from __future__ import annotations

import functools
import logging
from typing import Any

from ..errors import MissingDependencyError


@functools.cache
def bitsandbytes() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of a kernel of another package, which would not be used here
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingDependencyError(f"quantised weights need bitsandbytes ({error}); pip install 'lora-core[nf4]'") from None
    finally:
        log.setLevel(level)
    return bnb


def loaded_functional() -> Any:
    """The library's functions of tensors, for one who holds what it made: torch.compile traces this, and not the above."""
    from bitsandbytes import functional

    return functional
