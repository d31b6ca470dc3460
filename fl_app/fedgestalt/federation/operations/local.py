"""A provisioned consortium on one machine: real kits, real processes, mutual TLS over loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedgestalt.errors import FedgestaltError, ServerError, SiteError
from fedgestalt.federation.operations.admin import AdminSession
from fedgestalt.federation.operations.processes import ProcessFamily

UP_SECONDS: Final = 60.0
_DOWN_SECONDS = 20.0
_POLL_SECONDS = 0.3


class LocalConsortium:
    """Starts and ends the processes of startup kits; ends all of them when its context ends.

    Args:
        server: the server's startup kit.
        admin: the administrator's startup kit.
        environment: for every process, beside this one's own.
        prefixes: what stands in front of a kit's command, by the kit's name; for example
            ``ip netns exec NAME``.
    """

    def __init__(
        self,
        server: Path,
        admin: Path,
        environment: Mapping[str, str] | None = None,
        prefixes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.server, self.admin = server, admin
        self._environment, self._prefixes = dict(environment or {}), dict(prefixes or {})
        self.running: dict[str, ProcessFamily] = {}
        self._session: AdminSession | None = None

    def __enter__(self) -> LocalConsortium:
        """Return the consortium; nothing is started yet."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End everything."""
        self.end()

    def start(self, kit: Path, environment: Mapping[str, str] | None = None) -> ProcessFamily:
        """Start a kit's process; it runs once, without FLARE's restarts."""
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {**self._environment, "PATH": search, **(environment or {})}
        prefix = self._prefixes.get(kit.name, ())
        command = [*prefix, "bash", str(kit / "startup" / "sub_start.sh"), "--once"]
        family = ProcessFamily(command, kit, kit / "console.log", own)
        self.running[kit.name] = family
        return family

    def start_server(self) -> AdminSession:
        """Start the server and wait until an administrator can log in.

        Raises:
            ServerError: it does not come up.
        """
        if self._session:  # of a server that has ended: its threads would outlive this process
            self._session.close()
            self._session = None
        family = self.start(self.server)
        deadline = time.monotonic() + UP_SECONDS
        while True:
            try:
                self._session = AdminSession(self.admin, seconds=2.0)
            except FedgestaltError:
                if not family.is_running() or time.monotonic() > deadline:
                    raise ServerError("the server has not come up", where=str(family.log)) from None
                time.sleep(_POLL_SECONDS)
            else:
                return self._session

    @property
    def session(self) -> AdminSession:
        """The administrator's session of :meth:`start_server`."""
        if self._session is None:
            raise ServerError("the server was not started", where=str(self.server))
        return self._session

    def wait_for(self, sites: Iterable[str], seconds: float = UP_SECONDS) -> None:
        """Wait until exactly these sites, or more, are connected.

        Raises:
            SiteError: one is still missing after ``seconds``.
        """
        wanted, deadline = set(sites), time.monotonic() + seconds
        while missing := wanted - set(self.session.connected_sites()):
            if time.monotonic() > deadline:
                names = ", ".join(sorted(missing))
                raise SiteError(f"{names} not connected after {seconds:.0f} seconds")
            time.sleep(_POLL_SECONDS)

    def stop(self, name: str) -> None:
        """End one party's processes politely."""
        self.running.pop(name).end()

    def end(self) -> None:
        """Ask everybody to shut down, then end what is left."""
        try:
            if self._session:
                with contextlib.suppress(FedgestaltError):
                    self._session.shut_down()
                    deadline = time.monotonic() + _DOWN_SECONDS
                    for family in self.running.values():
                        family.wait(max(0.1, deadline - time.monotonic()))
                self._session.close()
        finally:
            self._session = None
            for family in self.running.values():
                family.end()
            self.running.clear()


def free_port() -> int:
    """A TCP port that nobody on this machine uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
