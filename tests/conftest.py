"""Shared by all tests: one thread for each process, for tests run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
