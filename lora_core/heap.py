"""Large tensors one after another, without asking the system for new memory for each.

glibc gets blocks of more than 32 MB straight from the system and gives them straight back, and the first touch of each of
their pages costs more than a pass of arithmetic over it: casting a 5632 x 2048 weight to float32 takes 29 ms, and 3 ms into
memory that was used before. Kept in the heap, freed blocks are used again.
"""

from __future__ import annotations

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ENOUGH = 2**30  # bytes


def keep_freed_memory() -> None:
    """Keeps freed blocks of up to 1 GiB for this process; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _ENOUGH)
        mallopt(_M_TRIM_THRESHOLD, _ENOUGH)
