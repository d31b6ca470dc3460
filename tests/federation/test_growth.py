"""A running consortium gains a hospital, replaces a certificate and loses a hospital.

As the guide says: its commands are executed from its own text. One federation serves all tests, in
their order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from founding import PROJECT, Block, Founded, Parties, follow, found, steps
from hospitals import ADMIN, SERVER, SITES, matching, training

from fedgestalt.federation.processes import ProcessFamily

pytestmark = pytest.mark.federation

GUIDE = "grow-and-shrink.md"
NEW, REPLACED, LEAVING = "aachen", "bonn", "leuven"
EVERYBODY = sorted([*SITES, NEW])
HEARTBEATS_SECONDS = 30.0
LAST_TRY_SECONDS = 6.0
"""A refused client tries again after one, two and four seconds."""


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founded]:
    with found(tmp_path_factory.mktemp("growing"), SITES, [NEW]) as consortium:
        kits = {name: str(consortium.kit(name)) for name in (SERVER, ADMIN, *SITES, NEW)}
        for name, kit in kits.items():
            consortium.parties.own[name]["KIT"] = kit
        yield consortium


def concern(founded: Founded, site: str) -> None:
    """Let everybody's ``SITE`` be the hospital concerned."""
    for own in founded.parties.own.values():
        own["SITE"] = site
    founded.parties.variables["SITE"] = site


def configuration(kit: Path) -> dict[str, str]:
    """Digests of all files that make up a kit."""
    files = [f for part in ("startup", "local") for f in (kit / part).rglob("*") if f.is_file()]
    return {str(f.relative_to(kit)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def server_process(founded: Founded) -> psutil.Process:
    return founded.local.running[SERVER].members()[0]


def gone(founded: Founded, site: str, seconds: float = HEARTBEATS_SECONDS) -> bool:
    """Whether a site disappears within some seconds."""
    deadline = time.monotonic() + seconds
    while site in founded.local.session.connected_sites():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


def wait_for_line(log: Path, line: str, after: int, seconds: float = HEARTBEATS_SECONDS) -> None:
    """Wait until a line appears in a log, beyond its first ``after`` bytes."""
    deadline = time.monotonic() + seconds
    while line.encode() not in log.read_bytes()[after:]:
        assert time.monotonic() < deadline, f"no {line!r} in {log}"
        time.sleep(0.3)


def test_a_fourth_hospital_joins_and_nobody_else_changes(founded: Founded) -> None:
    others = (SERVER, ADMIN, *SITES)
    before = {name: configuration(founded.kit(name)) for name in others}
    server = server_process(founded)
    founded.parties.roles["the new hospital"] = [NEW]
    concern(founded, NEW)
    follow(founded.parties, steps(GUIDE, "## Add a hospital")[:6], founded.local)
    founded.local.wait_for(EVERYBODY)
    trained = founded.run(training(rounds=1))
    assert (trained["status"], trained["sites"]) == ("completed", EVERYBODY)
    matched = founded.run(matching(trained["ensemble"]))
    assert (matched["status"], matched["sites"]) == ("completed", EVERYBODY)
    assert list((founded.store(NEW) / "matches").glob("*.json"))
    assert server == server_process(founded)
    assert server.is_running()
    assert before == {name: configuration(founded.kit(name)) for name in others}


def test_a_revoked_certificate_is_refused_at_once_and_the_new_one_works(founded: Founded) -> None:
    parties, local = founded.parties, founded.local
    parties.roles["the hospital"] = [REPLACED]
    concern(founded, REPLACED)
    old, new = founded.kit(REPLACED), founded.kit(REPLACED, "workspace-2")
    parties.own[REPLACED] |= {"OLD": str(old), "KIT": str(new)}
    (old / "local" / "fedgestalt.yaml").open("a").write("minimum_sites: 4\n")
    server, log = server_process(founded), local.running[SERVER].log
    asks, revokes, *renews = steps(GUIDE, "## Replace a certificate")
    assert isinstance(asks, Block)
    assert isinstance(revokes, Block)

    said = parties.run(asks)["lead"]
    parties.variables["REVOKED"] = said.strip()
    parties.run(revokes)
    assert gone(founded, REPLACED)
    thief = local.running.pop(REPLACED)
    assert thief.is_running()

    try:
        follow(parties, renews, local)
        local.start(new)
        local.wait_for(EVERYBODY)
        size = log.stat().st_size
        wait_for_line(log, f"refused: site '{REPLACED}'", size)
        trained = founded.run(training(rounds=1))
        assert (trained["status"], trained["sites"]) == ("completed", EVERYBODY)
    finally:
        thief.end()

    size = log.stat().st_size
    again = local.start(old)  # the thief, once more
    founded.local.running[REPLACED], thief = renewed(founded, new), again
    try:
        wait_for_line(log, f"refused: site '{REPLACED}'", size)
        assert "Successfully registered" not in again.log.read_text().rpartition("Start NVFlare")[2]
        assert REPLACED in local.session.connected_sites()
    finally:
        thief.end()
    assert server == server_process(founded)
    assert "minimum_sites: 4" in (new / "local" / "fedgestalt.yaml").read_text()
