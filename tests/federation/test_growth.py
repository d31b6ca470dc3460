"""A running consortium gains a hospital, replaces a stolen certificate and loses a hospital.

All of it as the guide says: its commands are executed from its own text. One federation serves the
tests, in their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from founding import CENTRAL, PROJECT, Block, Founded, Parties, Sending, follow, found, steps
from founding import GUIDE as FIRST_GUIDE
from hospitals import ADMIN, SERVER, SITES, matching, nvflare, training

from fedgestalt.errors import ServerError
from fedgestalt.federation.operations.admin import AdminSession
from fedgestalt.federation.operations.processes import ProcessFamily
from fedgestalt_provisioning.builder import REVOKED_FILE

pytestmark = pytest.mark.federation

GUIDE = "grow-and-shrink.md"
NEW, REPLACED, LEAVING = "aachen", "bonn", "leuven"
EVERYBODY = sorted([*SITES, NEW])
OWN_POLICY = "max_released_rows: 150"
REMAINING = [site for site in EVERYBODY if site != LEAVING]
SOON_SECONDS = 45.0
"""Several heartbeats, and several tries of a client that is refused, on a busy machine."""


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founded]:
    with found(tmp_path_factory.mktemp("growing"), SITES, spare=[NEW]) as consortium:
        for name in (SERVER, ADMIN, *SITES, NEW):
            consortium.parties.own[name]["KIT"] = str(consortium.kit(name))
        yield consortium


@pytest.fixture(scope="module")
def provisioner(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    """Somebody who provisions for all, and has done it once."""
    roles = {role: ["provisioner"] for role in ("the lead", "the provisioner")}
    variables = {"SERVER": SERVER, "PORT": "18002"}
    parties = Parties(tmp_path_factory.mktemp("central"), roles, variables)
    for block in blocks(FIRST_GUIDE, CENTRAL):
        parties.run(block)
    return parties


def blocks(guide: str, heading: str) -> list[Block]:
    """The console blocks under a heading under which no files travel."""
    path = steps(guide, heading)
    assert not any(isinstance(step, Sending) for step in path)
    return [step for step in path if isinstance(step, Block)]


def concern(founded: Founded, site: str) -> Parties:
    """Let everybody's ``SITE`` be the hospital concerned."""
    for own in founded.parties.own.values():
        own["SITE"] = site
    founded.parties.variables["SITE"] = site
    return founded.parties


def configuration(kit: Path) -> dict[str, str]:
    """Digests of all files that make up a kit."""
    files = [f for part in ("startup", "local") for f in (kit / part).rglob("*") if f.is_file()]
    return {str(f.relative_to(kit)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def server_process(founded: Founded) -> psutil.Process:
    """The server's process, as the system knows it; equal only to itself."""
    process = founded.local.running[SERVER].members()[0]
    assert process.is_running()
    return process


def wait_until_gone(founded: Founded, site: str) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while site in founded.local.session.connected_sites():
        assert time.monotonic() < deadline, f"{site} is still connected"
        time.sleep(0.3)


@contextlib.contextmanager
def server_says(founded: Founded, line: str) -> Iterator[None]:
    """The server writes a new line with these words into its log before long."""
    log = founded.local.running[SERVER].log
    known = log.stat().st_size
    yield
    deadline = time.monotonic() + SOON_SECONDS
    while line.encode() not in log.read_bytes()[known:]:
        assert time.monotonic() < deadline, f"no {line!r} in {log.read_bytes()[known:].decode()}"
        time.sleep(0.3)


@contextlib.contextmanager
def intruder(founded: Founded, kit: Path) -> Iterator[ProcessFamily]:
    """Another process with a kit of that name, beside the site's own if that runs."""
    own = founded.local.running.get(kit.name)
    other = founded.local.start(kit)
    if own:
        founded.local.running[kit.name] = own
    else:
        del founded.local.running[kit.name]
    try:
        yield other
    finally:
        other.end()


def test_a_fourth_hospital_joins_and_nobody_else_changes(founded: Founded) -> None:
    others = (SERVER, ADMIN, *SITES)
    before = {name: configuration(founded.kit(name)) for name in others}
    server = server_process(founded)
    parties = concern(founded, NEW)
    parties.roles["the new hospital"] = [NEW]

    follow(parties, steps(GUIDE, "### Each party for itself"), founded.local)
    founded.local.wait_for(EVERYBODY)

    trained = founded.run(training(rounds=1))
    assert (trained["status"], trained["sites"]) == ("completed", EVERYBODY)
    founded.ensemble = trained["ensemble"]
    assert server == server_process(founded)
    assert before == {name: configuration(founded.kit(name)) for name in others}


def test_a_stolen_certificate_is_refused_while_the_new_one_works(founded: Founded) -> None:
    parties, local = concern(founded, REPLACED), founded.local
    parties.roles["the hospital"] = [REPLACED]
    stolen, new = founded.kit(REPLACED), founded.kit(REPLACED, "workspace-2")
    parties.own[REPLACED] |= {"OLD": str(stolen), "KIT": str(new)}
    with (stolen / "local" / "fedgestalt.yaml").open("a") as policy:
        policy.write(f"{OWN_POLICY}\n")
    server = server_process(founded)
    path = steps(GUIDE, "## Replace a certificate")
    asks, revokes, *renews = [s for s in path if getattr(s, "party", "") != "the provisioner"]
    assert isinstance(asks, Block)
    assert isinstance(revokes, Block)
    refused = f"refused: site '{REPLACED}'"

    (parties.variables["REVOKED"],) = parties.run(asks)["lead"].splitlines()
    with server_says(founded, refused):
        parties.run(revokes)
    wait_until_gone(founded, REPLACED)
    thief = local.running.pop(REPLACED)
    try:
        assert thief.is_running()
        follow(parties, renews, local)
        local.start(new)
        local.wait_for(EVERYBODY)
        with server_says(founded, refused):  # the thief's process goes on trying
            matched = founded.run(matching(founded.ensemble))
        assert (matched["status"], matched["sites"]) == ("completed", EVERYBODY)
        for site in EVERYBODY:
            assert list((founded.store(site) / "matches").glob("*.json"))
    finally:
        thief.end()

    with intruder(founded, stolen), server_says(founded, refused):
        pass
    assert local.running[REPLACED].is_running()
    assert local.session.connected_sites() == EVERYBODY
    assert server == server_process(founded)
    assert OWN_POLICY in (new / "local" / "fedgestalt.yaml").read_text()


def test_a_hospital_that_has_left_does_not_come_back(founded: Founded) -> None:
    parties, local = concern(founded, LEAVING), founded.local
    parties.roles["each other hospital"] = REMAINING
    disables, asks, revokes, excludes = blocks(GUIDE, "## Remove a hospital")
    kit, rejected = founded.kit(LEAVING), f"Reject disabled client registration: {LEAVING}"

    said = parties.run(disables)[ADMIN]
    assert "credential_revoked: False" in said
    wait_until_gone(founded, LEAVING)
    local.stop(LEAVING)
    with intruder(founded, kit), server_says(founded, rejected):
        pass

    local.session.close()
    local.stop(SERVER)
    local.start_server()
    with intruder(founded, kit):
        with server_says(founded, rejected):
            local.wait_for(REMAINING)
        assert local.session.connected_sites() == REMAINING

    (parties.variables["REVOKED"],) = parties.run(asks)["lead"].splitlines()
    parties.run(revokes)
    with intruder(founded, kit), server_says(founded, f"refused: site '{LEAVING}'"):
        pass

    parties.own[REPLACED]["KIT"] = str(founded.kit(REPLACED, "workspace-2"))
    parties.run(excludes)
    trained = founded.run(training(rounds=1))
    assert (trained["status"], trained["sites"]) == ("completed", REMAINING)


def test_hospitals_refuse_a_roster_with_a_hospital_that_has_left(founded: Founded) -> None:
    kit, admin = founded.kit(LEAVING), founded.kit(ADMIN)
    revoked = founded.kit(SERVER) / "local" / REVOKED_FILE
    lines = revoked.read_text().splitlines(keepends=True)
    revoked.write_text("".join(line for line in lines if LEAVING not in line))
    done = nvflare(
        *("system", "enable-client", LEAVING, "--force", "--startup-kit", str(admin)),
        folder=founded.parties.home(ADMIN),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    founded.local.start(kit)
    founded.local.wait_for(EVERYBODY)

    outcome = founded.run(training(rounds=1))

    assert outcome["status"] == "failed"
    said = json.dumps(outcome)
    for site in REMAINING:
        assert f"{site}: this site does not work with {LEAVING}" in said
    assert "excluded_sites" in said


def test_an_administrator_who_has_left_cannot_log_in(founded: Founded) -> None:
    parties = concern(founded, ADMIN)
    _, asks, revokes, _ = blocks(GUIDE, "## Remove a hospital")
    AdminSession(founded.kit(ADMIN)).close()
    (parties.variables["REVOKED"],) = parties.run(asks)["lead"].splitlines()
    parties.run(revokes)
    with pytest.raises(ServerError):
        AdminSession(founded.kit(ADMIN), seconds=4)


def test_one_who_provisions_for_all_adds_a_hospital_without_changing_kits(
    provisioner: Parties, founded: Founded
) -> None:
    kits = provisioner.home("provisioner") / "workspace" / PROJECT
    before = {name: configuration(kits / "prod_00" / name) for name in (SERVER, *SITES)}
    provisioner.variables |= {"SITE": NEW, "ORG": NEW}
    for block in blocks(GUIDE, "### Where one provisions for all"):
        provisioner.run(block)
    for name, digests in before.items():
        assert configuration(kits / "prod_00" / name) == digests
        assert configuration(kits / "prod_01" / name) == digests, "the same keys, the same policy"
    mine, theirs = kits / "prod_01" / NEW, founded.kit(NEW)
    for name in ("authorization.json", "privacy.json", "resources.json.default"):
        assert (mine / "local" / name).read_text() == (theirs / "local" / name).read_text()


def test_one_who_provisions_for_all_replaces_one_key(provisioner: Parties) -> None:
    kits = provisioner.home("provisioner") / "workspace" / PROJECT
    known = len(list(kits.glob("prod_*")))
    provisioner.variables["SITE"] = REPLACED
    for block in blocks(GUIDE, "### A new certificate, where one provisions for all"):
        provisioner.run(block)
    for name in (SERVER, *SITES):
        former, newest = (configuration(kits / f"prod_{number:02}" / name) for number in (0, known))
        changed = {file for file in former if former[file] != newest[file]}
        expected = {"startup/client.crt", "startup/client.key"} if name == REPLACED else set()
        assert changed - {"startup/signature.json", "local/signature.json"} == expected
