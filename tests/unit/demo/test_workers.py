"""Worker processes of the comparison: what happens to them, and to the user, when one ends."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from fedgestalt.demo.run import _workers
from fedgestalt.errors import SiteError


def test_results_come_back() -> None:
    with _workers(1) as pool:
        assert pool.submit(pow, 2, 5).result() == 32


def test_a_worker_that_is_killed_gives_a_sentence() -> None:
    with (
        pytest.raises(SiteError, match="was ended, perhaps for want of memory"),
        _workers(1) as pool,
    ):
        pool.submit(os._exit, 9).result()


def test_an_interrupt_ends_the_workers_at_once() -> None:
    started = time.monotonic()
    workers: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt), _workers(1) as pool:
        assert pool.submit(pow, 1, 1).result() == 1
        pool.submit(time.sleep, 60)
        workers = [psutil.Process(pid) for pid in pool._processes]
        raise KeyboardInterrupt
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers
    assert not alive
    assert time.monotonic() - started < 50
