"""FLARE's simulator with one repair: no two clients get the same port.

The simulator looks for a free port for each client's process and lets go of it before the process
takes it. Clients start at the same moment, so that two could be told one port; one then answers for
the other, and the job ends with a certificate that does not fit (:mod:`..job.identity`).
"""

from __future__ import annotations

import runpy
import threading
from typing import Final

from nvflare.fuel.utils.network_utils import get_open_ports
from nvflare.private.fed.app.simulator import simulator_runner

_SIMULATOR: Final = "nvflare.private.fed.app.simulator.simulator"
_given: set[int] = set()
_lock = threading.Lock()


def ports_once(number: int) -> list[int]:
    """Free ports that this process was not told before."""
    with _lock:
        found: list[int] = []
        while len(found) < number:
            fresh = set(get_open_ports(number)) - _given
            _given.update(fresh)
            found += fresh
        return found[:number]


simulator_runner.get_open_ports = ports_once  # on import: a spawned process imports this as well

if __name__ == "__main__":
    runpy.run_module(_SIMULATOR, run_name="__main__")
