"""The bitsandbytes library, which holds weights in 4 and 8 bits; imported when it is first asked for."""

from __future__ import annotations

import functools
from typing import Any

from ..errors import MissingDependencyError


@functools.cache
def bitsandbytes() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingDependencyError(f"quantised weights need bitsandbytes ({error}); pip install bitsandbytes") from None
    return bnb
