"""A network of its own for every party: Linux namespaces, joined by a router with slow lines.

Everything that is made here carries one prefix and is removed at the end, with the processes in
it. The sites know the server by one address that no name service needs to resolve; the
administrator, in the namespace of the caller, has a direct line to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

RELAY = Path(__file__).with_name("slow_link.py")
ROUTER, SERVER = "router", "server"
COMMAND_SECONDS = 10.0


@dataclass(frozen=True)
class Line:
    """What every site's line is like.

    Attributes:
        round_trip: seconds.
        rate: bytes per second, in each direction.
        loss: share of packets that are lost, in each direction.
    """

    round_trip: float
    rate: float
    loss: float = 0.0


def run(*command: str) -> str:
    """Run a command and return its output; its error output goes into the exception."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if done.returncode:
        message = f"{' '.join(command)}: {done.stderr.strip()}"
        raise OSError(message)
    return done.stdout


def why_no_namespaces() -> str:
    """Why this machine or user cannot make network namespaces; empty if it can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux with iproute2"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    name = f"fg{secrets.token_hex(3)}-probe"
    try:
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "add", "name", "a", "type", "veth", "peer", "name", "b")
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces are not permitted here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


def why_no_netem() -> str:
    """Why the kernel cannot delay and lose packets; empty if it can."""
    if missing := why_no_namespaces():
        return missing
    if shutil.which("tc") is None:
        return "needs tc of iproute2"
    name = f"fg{secrets.token_hex(3)}-probe"
    try:
        run("ip", "netns", "add", name)
        run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernel has no netem: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


def an_address() -> str:
    """An address for a server, of the range that RFC 2544 sets aside for measurements."""
    return f"198.18.{secrets.randbelow(256)}.1"


class Network(ABC):
    """Namespaces of a server, of sites and of the router between them; a context.

    Args:
        sites: names; they are also the names of the kits that run there.
        address: the server's, for everybody, and the name of its kit; see :func:`an_address`.
        port: where the server listens.
    """

    def __init__(self, sites: Sequence[str], address: str, port: int) -> None:
        self.sites, self.address, self.port = tuple(sites), address, port
        self._parties = {address: SERVER, **{site: site for site in sites}}
        self._prefix = f"fg{secrets.token_hex(3)}"

    @property
    def prefixes(self) -> dict[str, list[str]]:
        """What stands in front of a party's command, by the name of its kit."""
        return {
            kit: ["ip", "netns", "exec", self._name(place)] for kit, place in self._parties.items()
        }

    def __enter__(self) -> Self:
        """Make everything, or nothing."""
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Remove everything."""
        self.remove()

    @abstractmethod
    def shape(self, line: Line | None) -> dict[str, dict[str, int]]:
        """Make all lines like ``line``, or fast again.

        Returns bytes that went ``up`` and ``down`` each site's line since the last call, with all
        that the layers beneath our messages add.
        """

    @abstractmethod
    def _open(self) -> None:
        """Let the sites reach the server."""

    def remove(self) -> None:
        """End the processes in the namespaces, then the namespaces and what is in them."""
        for place in (*self.sites, ROUTER, SERVER):
            name = self._name(place)
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in pids.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", "dev", self._prefix], capture_output=True)

    def _name(self, place: str) -> str:
        return f"{self._prefix}-{place}"

    def _ip(self, place: str, *arguments: str) -> None:
        run("ip", "-n", self._name(place), *arguments)

    def _make(self) -> None:
        for place in (ROUTER, SERVER, *self.sites):
            run("ip", "netns", "add", self._name(place))
            self._ip(place, "link", "set", "dev", "lo", "up")
        for place in (SERVER, *self.sites):
            inner, outer = self._ends(place)
            peer = ("type", "veth", "peer", "name", "line", "netns", self._name(place))
            self._ip(ROUTER, "link", "add", "name", place, *peer)
            for where, device, end in ((ROUTER, place, outer), (place, "line", inner)):
                self._ip(where, "address", "add", f"{end}/30", "dev", device)
                self._ip(where, "link", "set", "dev", device, "up")
            self._ip(place, "route", "add", "default", "via", outer)
        self._ip(SERVER, "address", "add", f"{self.address}/32", "dev", "lo")
        self._make_the_administrators_line()
        self._open()

    def _make_the_administrators_line(self) -> None:
        near, far = (self.address.removesuffix(".1") + end for end in (".5", ".6"))
        peer = ("type", "veth", "peer", "name", "admin", "netns", self._name(SERVER))
        run("ip", "link", "add", "name", self._prefix, *peer)
        self._ip(SERVER, "address", "add", f"{near}/30", "dev", "admin")
        self._ip(SERVER, "link", "set", "dev", "admin", "up")
        run("ip", "address", "add", f"{far}/30", "dev", self._prefix)
        run("ip", "link", "set", "dev", self._prefix, "up")
        run("ip", "route", "add", f"{self.address}/32", "via", near)

    def _ends(self, place: str) -> tuple[str, str]:
        """Addresses of a party's line: its own end, and the router's."""
        number = (SERVER, *self.sites).index(place)
        return f"10.77.{number}.2", f"10.77.{number}.1"


class RelayedNetwork(Network):
    """The router relays in user space: delay and rate on any kernel, but no loss."""

    _relay: subprocess.Popen[str] | None = None

    def shape(self, line: Line | None) -> dict[str, dict[str, int]]:
        """See :class:`Network`."""
        if line and line.loss:
            raise ValueError("a relay of TCP cannot lose packets")
        order = {"round_trip": line.round_trip, "rate": line.rate} if line else {}
        relay = self._relay
        assert relay
        assert relay.stdin
        assert relay.stdout
        relay.stdin.write(json.dumps(order) + "\n")
        relay.stdin.flush()
        counts = json.loads(relay.stdout.readline())
        own = {site: self._ends(site)[0] for site in self.sites}
        return {site: counts.get(address, {}) for site, address in own.items()}

    def remove(self) -> None:
        """See :class:`Network`."""
        if self._relay:
            self._relay.kill()
            self._relay.communicate()
            self._relay = None
        super().remove()

    def _open(self) -> None:
        self._ip(ROUTER, "address", "add", f"{self.address}/32", "dev", "lo")
        behind = self._ends(SERVER)[0]
        command = ["ip", "netns", "exec", self._name(ROUTER), sys.executable, str(RELAY)]
        command += ["--listen", f"{self.address}:{self.port}", "--to", f"{behind}:{self.port}"]
        self._relay = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.shape(None)


class RoutedNetwork(Network):
    """The router routes packets; the kernel's netem delays, loses and paces them."""

    _before: dict[str, dict[str, int]] | None = None

    def shape(self, line: Line | None) -> dict[str, dict[str, int]]:
        """See :class:`Network`."""
        for site in self.sites:
            for place, device in ((ROUTER, site), (site, "line")):
                tc = ["tc", "-n", self._name(place), "qdisc"]
                if line is None:
                    subprocess.run([*tc, "del", "dev", device, "root"], capture_output=True)
                else:
                    run(*tc, "replace", "dev", device, "root", *self._discipline(line))
        before, now = self._before, {site: self._count(site) for site in self.sites}
        self._before = now
        return {
            site: {
                way: bytes_ - (before[site][way] if before else 0) for way, bytes_ in ways.items()
            }
            for site, ways in now.items()
        }

    def _count(self, site: str) -> dict[str, int]:
        shown = run("ip", "-n", self._name(ROUTER), "-s", "-j", "link", "show", "dev", site)
        (device,) = json.loads(shown)
        counted = device["stats64"]
        return {"up": counted["rx"]["bytes"], "down": counted["tx"]["bytes"]}

    def _discipline(self, line: Line) -> list[str]:
        queue = max(100, round(2 * line.rate * line.round_trip / 1500))
        delay = ["delay", f"{line.round_trip * 500:g}ms", "loss", f"{line.loss * 100:g}%"]
        return ["netem", *delay, "rate", f"{round(line.rate * 8)}bit", "limit", f"{queue}"]

    def _open(self) -> None:
        self._ip(ROUTER, "route", "add", f"{self.address}/32", "via", self._ends(SERVER)[0])
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        run("ip", "netns", "exec", self._name(ROUTER), "sh", "-c", forward)
