"""What keeps a process's memory small, or saves the time to get it from the system: settings for the whole process.

Large tensors one after another: glibc gets blocks of more than 32 MB straight from the system and gives them straight back, and
the first touch of each of their pages costs more than a pass of arithmetic over it. Kept in the heap, freed blocks are used
again.

Products of many shapes one after another: oneDNN, and torch's layer above it, each keep what they prepared for the last 1,024
shapes. These are small things, but made while large tensors come and go, they stay in between and keep the holes apart. torch's
own GELU is of oneDNN too. docs/performance.md has the measurements.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ENOUGH = 2**30  # bytes

#: Shapes that are kept: a transformer's layers have a few each, and preparing one takes less time than is measurable.
SHAPES = 16


def keep_freed_memory() -> None:
    """Keeps freed blocks of up to 1 GiB for this process; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _ENOUGH)
        mallopt(_M_TRIM_THRESHOLD, _ENOUGH)


def keep_few_shapes() -> None:
    """Makes oneDNN keep what it prepared for `SHAPES` shapes instead of 1,024, if it has not been used yet.

    Sets ONEDNN_PRIMITIVE_CACHE_CAPACITY and LRU_CACHE_CAPACITY in the environment unless they are set.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES))
