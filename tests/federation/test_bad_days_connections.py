"""What goes wrong between real processes: ports, certificates, absent sites, copied kits, a crash.

The tests build on one another: a consortium opens, one site after the other.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from faults import Ward, log_of, measured, slow, until
from hospitals import (
    ADMIN,
    PROJECT,
    SERVER,
    SITES,
    Hospitals,
    copy_kit,
    fedgestalt,
    nvflare,
    training,
)

from fedgestalt.federation.operations.local import LocalConsortium
from fedgestalt.federation.server.unfinished import REASON

pytestmark = pytest.mark.federation

JOINED = "Successfully registered client:"
TAKEN_OVER = "Client: leuven already registered. Re-login the client with a new token."
JOB = training(rounds=1, sites=SITES)
NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)
OUT_OF_DATE = {
    "bonn": (NOW - 400 * DAY, NOW - 30 * DAY, "expired on"),
    "leuven": (NOW + 30 * DAY, NOW + 400 * DAY, "is valid from"),
}


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    """Nothing has started yet."""
    hospitals = Hospitals(tmp_path_factory.mktemp("consortium"))
    with hospitals.local() as local:
        yield Ward(hospitals, local)


@pytest.fixture(scope="module")
def elsewhere(ward: Ward) -> Iterator[LocalConsortium]:
    """Processes of kits that lie in other folders, as on other machines."""
    with ward.hospitals.local() as processes:
        yield processes


def reissue(hospitals: Hospitals, kit: Path, begins: dt.datetime, ends: dt.datetime) -> None:
    """Sign a kit's certificate again, for another time."""
    state = json.loads(
        (hospitals.folder / "workspace" / PROJECT / "state" / "cert.json").read_text()
    )
    authority = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    path = kit / "startup" / "client.crt"
    old = x509.load_pem_x509_certificate(path.read_bytes())
    new = x509.CertificateBuilder(
        old.issuer,
        old.subject,
        old.public_key(),
        x509.random_serial_number(),
        begins,
        ends,
        list(old.extensions),
    ).sign(authority, hashes.SHA256())
    path.write_bytes(new.public_bytes(serialization.Encoding.PEM))


def doctor(kit: Path) -> str:
    """What our diagnosis says of a kit."""
    done = fedgestalt("doctor", "--startup-kit", str(kit), "--no-dry-run", folder=kit)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


class BlackHole:
    """A port that takes no connection and refuses none, as behind a firewall that drops packets.

    Linux drops what comes for a listener whose queue is full.
    """

    def __init__(self, port: int) -> None:
        self._sockets = [socket.create_server(("127.0.0.1", port), backlog=0)]
        for _ in range(3):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            self._sockets.append(client)

    def close(self) -> None:
        """The port is closed from now on."""
        for one in self._sockets:
            one.close()


def test_a_site_that_cannot_reach_the_port_joins_by_itself_when_it_opens(
    ward: Ward, elsewhere: LocalConsortium
) -> None:
    for site, (begins, ends, _) in OUT_OF_DATE.items():
        kit = copy_kit(ward.hospitals.kit(site), ward.hospitals.folder / "out-of-date")
        reissue(ward.hospitals, kit, begins, ends)
        elsewhere.start(kit)
    port, kit = ward.hospitals.port, ward.hospitals.kit("berlin")
    with contextlib.closing(BlackHole(port)):
        ward.start("berlin")
        said = doctor(kit)
    assert f"network.port: localhost:{port} does not answer within 5 s: a firewall" in said
    assert f"problem: network.port: localhost:{port} refuses connections" in doctor(kit)
    until(lambda: "is closed" in ward.log("berlin"), "berlin to find the port closed")
    assert JOINED not in ward.log("berlin")
    ward.local.start_server()
    began = time.monotonic()
    ward.local.wait_for(["berlin"])
    measured("port open, site joined", began)
    assert JOINED + "berlin" in ward.log("berlin")


@pytest.mark.parametrize("site", OUT_OF_DATE)
def test_a_site_with_a_certificate_out_of_date_does_not_connect(
    ward: Ward, elsewhere: LocalConsortium, site: str
) -> None:
    family = elsewhere.running[site]
    kit = family.log.parent
    said = doctor(kit)
    assert "problem: kit.certificate: the certificate " + OUT_OF_DATE[site][2] in said
    assert family.is_running()
    assert "registered aux handler" in log_of(kit), "it has come as far as to connect"
    assert JOINED not in log_of(kit)
    assert ward.local.session.connected_sites() == ["berlin"]
    elsewhere.stop(site)


@pytest.fixture(scope="module")
def both_runs(ward: Ward) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same job twice, submitted while leuven was absent."""
    ward.start("bonn")
    ward.local.wait_for(["berlin", "bonn"])
    session, folder = ward.local.session, ward.hospitals.render(JOB)
    submit_with_token(ward, folder)
    (first,) = (job["job_id"] for job in session.jobs())
    second = session.submit(folder)
    until(lambda: session.meta(second).get("schedule_history"), "FLARE to try the second job")
    for job in (first, second):
        assert session.status(job) == "SUBMITTED"
        (*_, tried) = session.meta(job)["schedule_history"]
        assert tried.endswith("missing required site leuven")
    began = time.monotonic()
    ward.start("leuven")
    until(
        lambda: {session.status(first), session.status(second)} != {"SUBMITTED"},
        "a job to start by itself",
    )
    measured("absent site started, job running", began)
    outcomes = ward.ended(first), ward.ended(second)
    submit_with_token(ward, folder)
    assert {job["job_id"] for job in session.jobs()} == {first, second}
    return outcomes


def submit_with_token(ward: Ward, folder: Path) -> None:
    """Submit a job in FLARE's retry-safe way."""
    kit = ward.hospitals.kit(ADMIN)
    arguments = ["-j", str(folder), "--startup-kit", str(kit), "--submit-token", "first-trial"]
    done = nvflare("job", "submit", *arguments, folder=kit)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_job_waits_for_an_absent_site_and_runs_by_itself(
    both_runs: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    first, _ = both_runs
    assert first["status"] == "completed", first["reason"]
    assert first["sites"] == list(SITES)
    assert first["warnings"] == []


def in_order(ward: Ward, runs: tuple[dict[str, Any], ...]) -> list[tuple[float, dict[str, Any]]]:
    """Jobs with the times at which FLARE started them, earliest first."""

    def began(run: dict[str, Any]) -> float:
        start = ward.local.session.meta(run["job"])["start_time"]
        return dt.datetime.fromisoformat(start).timestamp()

    return sorted(((began(run), run) for run in runs), key=lambda pair: pair[0])


def test_a_job_submitted_twice_runs_twice_and_no_update_is_sent_twice(
    ward: Ward, both_runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    first, second = both_runs
    assert second["status"] == "completed", second["reason"]
    assert first["job"] != second["job"]
    (began, earlier), (then, _) = in_order(ward, both_runs)
    assert then - began > earlier["seconds"], "one at a time"
    assert first["ensemble"] != second["ensemble"], "the later one made other draws"
    for site in SITES:
        stored = {path.name for path in (ward.hospitals.store(site) / "ensembles").iterdir()}
        assert {first["ensemble"], second["ensemble"]} <= stored


def test_a_kit_in_use_twice_runs_a_job_once_and_is_noticed(
    ward: Ward, elsewhere: LocalConsortium, both_runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    kits = ward.hospitals.kit("leuven"), ward.hospitals.folder / "copied" / "leuven"
    copy_kit(kits[0], kits[1].parent)
    elsewhere.start(kits[1])
    until(lambda: TAKEN_OVER in ward.log(SERVER), "the copy to take over")
    ward.forget()
    outcome = ward.run(JOB)
    assert outcome["status"] == "completed", outcome["reason"]
    (_, earlier), _ = in_order(ward, both_runs)
    assert outcome["ensemble"] == earlier["ensemble"], "the result is not a wrong one"
    (at,) = (kit for kit in kits if (kit / outcome["job"]).is_dir())
    warned = [w for w in outcome["warnings"] if w.startswith("site 'leuven': it ran on another")]
    assert bool(warned) == (at == kits[1])
    assert all("its startup kit is in use twice: end one of the two" in w for w in warned)
    elsewhere.stop("leuven")
    ward.local.stop("leuven")
    ward.start("leuven")
    until(lambda: ward.log(SERVER).count(TAKEN_OVER) == 2, "leuven to be back")


def test_a_server_killed_in_mid_job_loses_the_job_and_nothing_else(
    ward: Ward, both_runs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    ward.forget()
    with ward.patients["berlin"].suffers(slow(300)):
        job = ward.submit(JOB)
        ward.wait_until_only("berlin", job)
    ward.local.running[SERVER].kill()
    began = time.monotonic()
    session = ward.local.start_server()
    outcome = ward.ended(job)
    measured("server killed, job closed", began)
    assert outcome["flare"] == "FINISHED:ABANDONED"
    assert (outcome["status"], outcome["reason"]) == ("failed", f"{REASON}.")
    ward.local.wait_for(SITES)
    measured("server killed, sites back", began)
    until(lambda: not ward.job_processes(*SITES), "the sites to end the job")
    measured("server killed, job processes gone", began)
    assert session.connected_sites() == sorted(SITES)
    again = ward.run(JOB)
    assert again["status"] == "completed", again["reason"]
    (_, earlier), _ = in_order(ward, both_runs)
    assert again["ensemble"] == earlier["ensemble"]
