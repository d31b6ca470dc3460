"""A round over slow lines takes as long as its bytes do, and not much longer.

Server and sites run in network namespaces of their own; see :mod:`networks`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hospitals import SITES, Hospitals, training
from networks import (
    Line,
    Network,
    RelayedNetwork,
    RoutedNetwork,
    an_address,
    why_no_namespaces,
    why_no_netem,
)

from fedgestalt.federation.local import LocalConsortium
from fedgestalt.federation.tasks import PUBLISH, ROUND, UPDATE
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec

pytestmark = pytest.mark.federation

ROUND_TRIP, RATE = 0.050, 20e6 / 8
SLOW = Line(ROUND_TRIP, RATE)
LOSSY = Line(ROUND_TRIP, RATE, loss=1e-4)
NETWORK = {"depth": 18, "width": 24, "embedding_size": 64, "input_size": 32}
"""1.6 million values: small enough to train in a moment, large enough for the line to dominate."""

FAIR = 2.0
"""How many times its limit a transfer may take."""


@dataclass(frozen=True)
class Transfers:
    """How long each transfer of a one-round job took; the slowest site's, in seconds.

    Attributes:
        model: the model to the sites, and their mask keys back.
        update: from a site's last training step to the arrival of its masked update.
        publication: the new model to the sites, and a word back.
        model_bytes, update_bytes: what travels to and from one site.
        on_the_line: bytes up and down each site's line in the whole job, where known.
    """

    model: float
    update: float
    publication: float
    model_bytes: int
    update_bytes: int
    on_the_line: dict[str, dict[str, int]]

    def limits(self, line: Line) -> dict[str, float]:
        """What each of them takes at least: bytes over rate, and a round trip."""
        down = self.model_bytes / line.rate + line.round_trip
        up = self.update_bytes / line.rate + line.round_trip
        return {"model": down, "update": up, "publication": down}


def one_round(
    hospitals: Hospitals, local: LocalConsortium, network: Network, folder: Path
) -> Transfers:
    network_only = TrainingSpec(epochs=1, batch_size=8, variants=1)
    member = MemberSpec(
        name="scratch",
        backbone="iresnet",
        options=NETWORK,
        trainable="all",
        training=network_only,
    )
    job = training(ensemble=EnsembleSpec(members=(member,)), rounds=1)
    job_id = local.session.submit(hospitals.render(job))
    status = local.session.watch(job_id, lambda status, report: None, 0.5, 120)
    result = local.session.download(job_id, folder)
    outcome = json.loads(next(result.rglob("outcome.json")).read_text())
    assert outcome["status"] == "completed", (status, outcome)
    events = read_events(next(result.rglob("progress.jsonl")))
    spans = {phase: span(events, phase) for phase in (ROUND, UPDATE, PUBLISH)}
    trained = {
        site: max(
            e["time"]
            for e in read_events(hospitals.kit(site) / job_id / "progress.jsonl")
            if e["event"] == "work"
        )
        for site in SITES
    }
    (record,) = outcome["rounds"]
    sent = {site: outcome["bytes"][site]["sent_to"] for site in SITES}
    return Transfers(
        model=max(spans[ROUND][1].values()) - spans[ROUND][0],
        update=max(spans[UPDATE][1][site] - trained[site] for site in SITES),
        publication=max(spans[PUBLISH][1].values()) - spans[PUBLISH][0],
        model_bytes=max(sent.values()) // 2,
        update_bytes=record["uploaded_bytes_per_site"],
        on_the_line=network.shape(None),
    )


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def span(events: list[dict[str, Any]], phase: str) -> tuple[float, dict[str, float]]:
    """When a phase began, and when each site's answer came."""
    (began,) = (e["time"] for e in events if e["event"] == "phase" and e["phase"] == phase)
    came = {e["site"]: e["time"] for e in events if e["event"] == "answer" and e["phase"] == phase}
    return began, came


@pytest.mark.parametrize(
    ("kind", "why_not", "line"),
    [
        pytest.param(RelayedNetwork, why_no_namespaces, SLOW, id="relay in user space, no loss"),
        pytest.param(RoutedNetwork, why_no_netem, LOSSY, id="netem with loss"),
    ],
)
def test_a_round_over_a_slow_line_takes_little_longer_than_its_bytes(
    kind: type[Network], why_not: Callable[[], str], line: Line, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    address = an_address()
    hospitals = Hospitals(tmp_path / "consortium", host=address)
    with kind(SITES, address, hospitals.port) as network:
        with hospitals.local(prefixes=network.prefixes) as local:
            hospitals.up(local)
            fast = one_round(hospitals, local, network, tmp_path / "fast")
            network.shape(line)
            slow = one_round(hospitals, local, network, tmp_path / "slow")
    print(fast, slow, slow.limits(line), sep="\n")
