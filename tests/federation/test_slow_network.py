"""A round over slow lines takes as long as its bytes do, and not much longer.

Server and sites run in network namespaces of their own; see :mod:`networks`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hospitals import JOB_LIMIT_SECONDS, SITES, Hospitals, training
from networks import (
    Line,
    Network,
    RelayedNetwork,
    RoutedNetwork,
    an_address,
    why_no_namespaces,
    why_no_netem,
)

from fedgestalt.federation.job.progress import PROGRESS_FILE
from fedgestalt.federation.operations.admin import read_outcome
from fedgestalt.federation.operations.local import LocalConsortium
from fedgestalt.federation.tasks import PUBLISH, ROUND, UPDATE
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec

pytestmark = pytest.mark.federation
log = logging.getLogger(__name__)

ROUND_TRIP, RATE = 0.050, 20e6 / 8
SLOW = Line(ROUND_TRIP, RATE)
LOSSY = Line(ROUND_TRIP, RATE, loss=1e-4)
NETWORK = {"depth": 18, "width": 24, "embedding_size": 64, "input_size": 32}
"""1.6 million values: small enough to train in a moment, large enough for the line to dominate."""

FAIR = 2.0
"""How many times its limit a transfer may take."""
FRAMING = 1.25
"""How many bytes may go over a line for each byte of our messages."""


@dataclass(frozen=True)
class Transfers:
    """How long each transfer of a one-round job took: the slowest site's, in seconds.

    Attributes:
        model: the model to the sites, and their mask keys back.
        update: from a site's last training step to the arrival of its masked update.
        publication: the new model to the sites, and a word back.
    """

    model: float
    update: float
    publication: float


@dataclass(frozen=True)
class Payload:
    """Bytes of messages between the server and one site in a one-round job."""

    model: int
    update: int

    def limits(self, line: Line) -> Transfers:
        """What the transfers take at least: bytes over rate, and a round trip."""
        down = self.model / line.rate + line.round_trip
        up = self.update / line.rate + line.round_trip
        return Transfers(down, up, down)


def one_round(
    hospitals: Hospitals, local: LocalConsortium, folder: Path
) -> tuple[Payload, Transfers]:
    training_spec = TrainingSpec(epochs=1, batch_size=8, variants=1)
    member = MemberSpec(
        name="scratch",
        backbone="iresnet",
        options=NETWORK,
        trainable="all",
        training=training_spec,
    )
    job = training(ensemble=EnsembleSpec(members=(member,)), rounds=1)
    job_id = local.session.submit(hospitals.render(job))
    local.session.watch(job_id, lambda status, report: None, 0.3, JOB_LIMIT_SECONDS)
    result = local.session.download(job_id, folder)
    outcome = read_outcome(result)
    assert outcome["status"] == "completed", outcome.get("reason")

    events = read_events(next(result.rglob(PROGRESS_FILE)))
    arrived = answers(events, UPDATE)
    transfers = Transfers(
        model=max(answers(events, ROUND).values()) - began(events, ROUND),
        update=max(arrived[site] - trained_at(hospitals.kit(site) / job_id) for site in SITES),
        publication=max(answers(events, PUBLISH).values()) - began(events, PUBLISH),
    )
    (record,) = outcome["rounds"]
    down = min(site["sent_to"] for site in outcome["bytes"].values())
    return Payload(down // 2, record["uploaded_bytes_per_site"]), transfers  # twice: round, end


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def began(events: list[dict[str, Any]], phase: str) -> float:
    (time,) = (e["time"] for e in events if e["event"] == "phase" and e["phase"] == phase)
    return float(time)


def answers(events: list[dict[str, Any]], phase: str) -> dict[str, float]:
    """When each site's answer had come, by the server's clock; all parties share it here."""
    return {e["site"]: e["time"] for e in events if e["event"] == "answer" and e["phase"] == phase}


def trained_at(run_folder: Path) -> float:
    """When a site's last training step ended."""
    events = read_events(run_folder / PROGRESS_FILE)
    return max(e["time"] for e in events if e["event"] == "work")


@pytest.mark.parametrize(
    ("kind", "why_not", "line"),
    [
        pytest.param(RelayedNetwork, why_no_namespaces, SLOW, id="relay, no loss"),
        pytest.param(RoutedNetwork, why_no_netem, LOSSY, id="netem with loss"),
    ],
)
def test_a_round_over_slow_lines_takes_little_longer_than_its_bytes(
    kind: type[Network],
    why_not: Callable[[], str],
    line: Line,
    tmp_path: Path,
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    address = an_address()
    hospitals = Hospitals(tmp_path / "consortium", host=address)
    with (
        kind(SITES, address, hospitals.port) as network,
        hospitals.local(prefixes=network.prefixes) as local,
    ):
        hospitals.up(local)
        _, fast = one_round(hospitals, local, tmp_path / "fast")
        network.shape(line)
        payload, slow = one_round(hospitals, local, tmp_path / "slow")
        carried = network.shape(None)
    limits = payload.limits(line)
    log.info("%s over %s: %s fast, %s slow, at least %s", payload, line, fast, slow, limits)
    log.info("on the lines: %s", carried)

    values = 4 * 1_630_000
    assert values < payload.update < 1.01 * values
    assert payload.model == pytest.approx(payload.update, rel=0.01)
    for name, limit in asdict(limits).items():
        took, unhindered = asdict(slow)[name], asdict(fast)[name]
        assert limit <= took <= FAIR * limit, f"{name}: {took:.2f} s, at least {limit:.2f} s"
        assert unhindered < limit, f"{name}: {unhindered:.2f} s over a fast line"
    for site, count in carried.items():
        assert payload.update <= count["up"] <= FRAMING * payload.update, site
        assert 2 * payload.model <= count["down"] <= FRAMING * 2 * payload.model, site
