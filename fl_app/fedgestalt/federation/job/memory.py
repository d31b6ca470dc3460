"""Memory of large arrays, given back to the operating system. Without glibc nothing happens."""

from __future__ import annotations

import ctypes
import gc
from typing import Any, Final

LARGE_BYTES: Final = 1 << 20
"""From this size on a block is memory of its own; the pieces of a transfer are twice as large."""

_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
"""From ``malloc.h``."""


def give_back() -> None:
    """Give back what is free, here and now.

    glibc keeps freed blocks of up to 32 MiB for later use: after a network was built and dropped
    the process would stay as large as it was with it.
    """
    gc.collect()
    _call("malloc_trim", 0)


def keep_no_large_blocks() -> None:
    """From now on give back each block of :data:`LARGE_BYTES` and more as soon as it is free.

    glibc raises this size with the first large block that is freed. Then the pieces of a transfer,
    which come and go in many threads, stay in as many arenas; of these there are two from now on.
    Every large block then costs the kernel's clearing of its pages: not for processes that train.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, LARGE_BYTES)
    _call("mallopt", _M_ARENA_MAX, 2)


def _call(name: str, *arguments: int) -> None:
    try:
        function: Any = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return
    function(*arguments)
