"""How a running job stands, for ``show_stats``, ``fedgestalt job watch`` and other programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from fedgestalt.federation.job.watch import SiteWatch

PROGRESS_COMMAND: Final = "fgm.progress"
SCHEMA: Final = "fedgestalt.progress/1"
_ENOUGH_FOR_AN_ESTIMATE = 0.05


class JobStatus:
    """Facts about one running job; written by the workflow, read by any thread."""

    def __init__(self, template: str, rounds: int) -> None:
        self._template, self._rounds = template, rounds
        self._started = self._phase_started = self._round_started = time.monotonic()
        self._phase, self._round, self._waiting = "", 0, frozenset[str]()
        self._round_seconds: list[float] = []
        self._received: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._metrics: dict[str, Any] = {}
        self._warnings: list[str] = []
        self._lock = threading.Lock()

    def begin_phase(self, phase: str, sites: frozenset[str]) -> None:
        """A phase has begun; all ``sites`` work on it."""
        with self._lock:
            self._phase, self._waiting = phase, sites
            self._phase_started = time.monotonic()

    def answered(self, site: str, received_bytes: int) -> None:
        """A site has done its part of the phase."""
        with self._lock:
            self._waiting -= {site}
            self._received[site] = self._received.get(site, 0) + received_bytes

    def sent(self, site: str, sent_bytes: int) -> None:
        """A message went to a site."""
        with self._lock:
            self._sent[site] = self._sent.get(site, 0) + sent_bytes

    def uploaded(self, site: str, received_bytes: int) -> None:
        """A site has sent a vector, beside its answers."""
        with self._lock:
            self._received[site] = self._received.get(site, 0) + received_bytes

    def begin_round(self, number: int) -> None:
        """A round has begun."""
        with self._lock:
            self._round, self._round_started = number, time.monotonic()

    def end_round(self, metrics: Mapping[str, Any]) -> None:
        """A round is complete; ``metrics`` by ensemble member."""
        with self._lock:
            self._round_seconds.append(time.monotonic() - self._round_started)
            self._metrics = dict(metrics)

    def warn(self, sentence: str) -> None:
        """Something that the administrator should see while the job goes on."""
        with self._lock:
            self._warnings.append(sentence)

    @property
    def warnings(self) -> list[str]:
        """All warnings so far."""
        with self._lock:
            return list(self._warnings)

    @property
    def transferred(self) -> dict[str, dict[str, int]]:
        """Bytes of messages by site, without the transport's own."""
        with self._lock:
            sites = sorted(self._sent.keys() | self._received.keys())
            return {
                site: {
                    "sent_to": self._sent.get(site, 0),
                    "received_from": self._received.get(site, 0),
                }
                for site in sites
            }

    def report(self, watch: SiteWatch | None, sites: tuple[str, ...]) -> dict[str, Any]:
        """Everything, as JSON values."""
        transferred = self.transferred
        with self._lock:
            now, entries, fractions = time.monotonic(), {}, []
            for site in sites:
                state = watch.state(site) if watch else None
                waiting = site in self._waiting
                entries[site] = {
                    "state": "working" if waiting else "done",
                    "what": state.what if state and waiting else "",
                    "fraction": round(state.fraction, 3) if state and waiting else 1.0,
                    "heard_seconds_ago": _rounded(state.heard_seconds_ago if state else None),
                    **transferred.get(site, {"sent_to": 0, "received_from": 0}),
                }
                if waiting and state:
                    fractions.append(state.fraction)
            return {
                "schema": SCHEMA,
                "template": self._template,
                "phase": self._phase,
                "round": self._round,
                "rounds": self._rounds,
                "seconds": round(now - self._started, 1),
                "seconds_left": _rounded(self._seconds_left(now, fractions)),
                "sites": entries,
                "metrics": self._metrics,
                "warnings": list(self._warnings),
            }

    def _seconds_left(self, now: float, fractions: list[float]) -> float | None:
        """From the rounds so far, or from the slowest site's fraction of its current work."""
        if self._round_seconds and self._rounds:
            usual = sum(self._round_seconds) / len(self._round_seconds)
            left = usual * (self._rounds - len(self._round_seconds))
            in_round = now - self._round_started if self._round > len(self._round_seconds) else 0.0
            return max(0.0, left - in_round)
        slowest = min(fractions, default=0.0)
        if slowest < _ENOUGH_FOR_AN_ESTIMATE:
            return None
        here = (now - self._phase_started) * (1 - slowest) / slowest
        return here + (now - self._phase_started + here) * max(0, self._rounds - 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
