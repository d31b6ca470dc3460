"""Is the party in this container well? A server listens on its port, a site is connected to it.

Looks at this container's own sockets and sends nothing. Exit code 0 or 1, for HEALTHCHECK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil


def complaint(workspace: Path) -> str:
    """What is wrong with the party that runs in ``workspace``; empty if nothing is."""
    startup = workspace / "startup"
    for name, is_site in (("fed_server.json", False), ("fed_client.json", True)):
        if (startup / name).is_file():
            port = _server_port(startup / name)
            return _not_connected(port) if is_site else _not_listening(port)
    return f"{startup} holds no startup kit: FLARE has not started"


def _server_port(config: Path) -> int:
    server = json.loads(config.read_text(encoding="utf-8"))["servers"][0]
    return int(server["service"]["target"].rsplit(":", 1)[1])


def _not_listening(port: int) -> str:
    for socket in psutil.net_connections("tcp"):
        if socket.status == psutil.CONN_LISTEN and getattr(socket.laddr, "port", None) == port:
            return ""
    return f"nobody listens on port {port}"


def _not_connected(port: int) -> str:
    for socket in psutil.net_connections("tcp"):
        if socket.status == psutil.CONN_ESTABLISHED and getattr(socket.raddr, "port", None) == port:
            return ""
    return f"not connected to the server's port {port}"


if __name__ == "__main__":
    wrong = complaint(Path(os.environ.get("NVFL_WORKSPACE", "/vault/workspace")))
    sys.stderr.write(wrong)
    sys.exit(1 if wrong else 0)
