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
from fedgestalt.federation.tasks import APPLY, VECTOR
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
    """How long each transfer of a one-round job took, until the last site was done, in seconds.

    Attributes:
        update: the sites' masked updates to the server.
        sum: the sum to the sites, and their receipts back.
    """

    update: float
    sum: float


@dataclass(frozen=True)
class Payload:
    """Bytes of messages between the server and one site in a one-round job."""

    update: int
    sum: int

    def limits(self, line: Line) -> Transfers:
        """What the transfers take at least: bytes over rate, and a round trip."""
        up = self.update / line.rate + line.round_trip
        down = self.sum / line.rate + line.round_trip
        return Transfers(up, down)


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
    (record,) = outcome["rounds"]
    down = min(site["sent_to"] for site in outcome["bytes"].values())
    payload = Payload(record["uploaded_bytes_per_site"], down)
    return payload, Transfers(took(events, VECTOR), took(events, APPLY))


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def took(events: list[dict[str, Any]], phase: str) -> float:
    """From the beginning of a phase to the last site's answer."""
    times = {
        event["event"]: event["time"]  # the last one of each kind
        for event in events
        if event.get("phase") == phase
    }
    return float(times["answer"] - times["phase"])


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
    assert payload.sum == pytest.approx(payload.update, rel=0.01)
    for name, limit in asdict(limits).items():
        hindered, unhindered = asdict(slow)[name], asdict(fast)[name]
        said = f"{name}: {hindered:.2f} s, at least {limit:.2f} s"
        assert limit <= hindered <= FAIR * limit, said
        assert unhindered < limit, f"{name}: {unhindered:.2f} s over a fast line"
    for site, count in carried.items():  # the model itself travels never: every site has it
        assert payload.update <= count["up"] <= FRAMING * payload.update, site
        assert payload.sum <= count["down"] <= FRAMING * payload.sum, site
