"""Memory of large arrays, given back to the operating system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Give back what is free, here and now.

    glibc keeps freed blocks of up to 32 MiB for later use: after a network was built and dropped
    the process would stay as large as it was with it. Elsewhere than with glibc nothing happens.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
