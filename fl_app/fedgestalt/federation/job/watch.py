"""Which sites' job processes are alive, and how far each is with its work.

FLARE reports a lost site late or never, so the server's side of a job asks every site's job process
every few seconds. The answer carries what the site is working on as a fraction, never as a count:
how many images a hospital has is not the server's business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fedgestalt.federation.job.places import is_place

log = logging.getLogger(__name__)

PING: Final = "fgm.ping"
PING_SECONDS: Final = 2.0
PING_TIMEOUT_SECONDS: Final = 5.0

_SITES_AT_ONCE: Final = 3
_IN_A_SILENCE: Final = 4

Ask = Callable[[], Mapping[str, object]]
"""Asks all sites; returns the answers (what, fraction, place) of those that gave one."""


@dataclass(frozen=True)
class SiteState:
    """What is known of one site.

    Attributes:
        heard_seconds_ago: since its last sign of life; None if there was none yet.
        what: name of its current work, empty if none.
        fraction: of that work, 0..1.
    """

    heard_seconds_ago: float | None
    what: str
    fraction: float


class SiteWatch:
    """Asks the sites in a thread of its own, from :meth:`start` to :meth:`stop`.

    Args:
        sites: the roster.
        ask: see :data:`Ask`; called from the thread.
        start_limit_seconds: how long a job process may take to come up.
        silence_limit_seconds: how long one that has come up may be silent.
        clock: seconds; only tests replace it.
    """

    def __init__(
        self,
        sites: Iterable[str],
        ask: Ask,
        start_limit_seconds: float,
        silence_limit_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sites, self._ask, self._clock = tuple(sites), ask, clock
        self._start_limit, self._silence_limit = start_limit_seconds, silence_limit_seconds
        self._began = clock()
        self._heard: dict[str, float] = {}
        self._work: dict[str, tuple[str, float]] = {}
        self._places: dict[str, str] = {}
        self._pause = pause_between_pings(len(self._sites), silence_limit_seconds)
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="site watch", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; it is gone after a ping at the latest."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(self._pause):
            try:
                self.step()
            except Exception:  # a failed question must not make every site look silent
                log.exception("the sites could not be asked whether they are alive")

    def step(self) -> None:
        """Ask once."""
        for site, answer in self._ask().items():
            if isinstance(answer, Mapping):
                if is_place(place := answer.get("place")):
                    with self._lock:
                        self._places[site] = str(place)
                what, fraction = answer.get("what"), answer.get("fraction")
                if (
                    isinstance(what, str)
                    and what.isprintable()
                    and isinstance(fraction, int | float)
                ):
                    self.heard(site, what[:64], fraction)
                else:
                    self.heard(site, "", 0.0)

    def heard(self, site: str, what: str | None = None, fraction: float = 0.0) -> None:
        """Note a sign of life; an answer to a task is one as well."""
        with self._lock:
            self._heard[site] = self._clock()
            if what is not None:
                self._work[site] = (what, float(min(1.0, max(0.0, fraction))))

    def lost(self, sites: Iterable[str]) -> dict[str, str]:
        """Those of ``sites`` that have been silent for too long, with a sentence for each."""
        found, now = {}, self._clock()
        with self._lock:
            for site in sites:
                last = self._heard.get(site)
                if last is None and now - self._began > self._start_limit:
                    found[site] = (
                        f"its job process has not come up within {self._start_limit:.0f} seconds"
                    )
                elif last is not None and now - last > self._silence_limit:
                    found[site] = (
                        f"its job process has been silent for {now - last:.0f} seconds: it was"
                        " killed, ran out of memory, or lost its connection"
                    )
        return found

    def is_up(self, site: str) -> bool:
        """Whether ``site`` has given a sign of life, and not too long ago."""
        with self._lock:
            last = self._heard.get(site)
        return last is not None and self._clock() - last <= self._silence_limit

    @property
    def places(self) -> dict[str, str]:
        """Where the sites' job processes run, as far as they have said; see :mod:`.places`."""
        with self._lock:
            return dict(self._places)

    def state(self, site: str) -> SiteState:
        """What is known of ``site``."""
        with self._lock:
            last = self._heard.get(site)
            what, fraction = self._work.get(site, ("", 0.0))
        ago = None if last is None else self._clock() - last
        return SiteState(ago, what, fraction)


def pause_between_pings(sites: int, silence_limit_seconds: float) -> float:
    """Seconds from one question to the next.

    FLARE's stream of each answer keeps a thread at the server for as long as it could be sent again
    (330 seconds with the kits' settings), so with many sites questions are further apart: one and a
    half answers a second come in, 500 threads; or more, where four questions would not fall into
    the silence after which a site is given up.
    """
    steady = PING_SECONDS * max(1.0, sites / _SITES_AT_ONCE)
    return max(PING_SECONDS, min(steady, silence_limit_seconds / _IN_A_SILENCE))
