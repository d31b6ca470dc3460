"""Shared by all tests: the consortium in one process, and a cache of their own."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "inproc"))
