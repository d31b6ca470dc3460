from __future__ import annotations

import subprocess
import sys

import pytest

AFTER_MANY_BLOCKS = """
import ctypes, sys, threading
from pathlib import Path
from fedgestalt.federation.job.memory import keep_no_large_blocks

if "keep" in sys.argv:
    keep_no_large_blocks()

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def blocks(count, size):
    found = [libc.malloc(size) for _ in range(count)]
    for block in found:
        libc.memset(block, 1, size)
    return found

(first,) = blocks(1, 24 << 20)
libc.free(first)  # glibc takes this for the size of blocks that come and go
before = resident()
held = [blocks(1, 2 << 20) + blocks(1, 4096) for _ in range(64)]
for block, _ in held:
    libc.free(block)
print(resident() - before)
"""


def left_over(*words: str) -> int:
    """Bytes that a process still holds of 128 MiB in blocks of 2 MiB that it has freed."""
    command = [sys.executable, "-c", AFTER_MANY_BLOCKS, *words]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own way with memory")
def test_the_pieces_of_a_transfer_are_given_back_when_they_are_freed() -> None:
    assert left_over() > 64 << 20  # what glibc does on its own
    assert left_over("keep") < 8 << 20
