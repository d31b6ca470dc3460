"""The guide to provisioning, executed from its own text; then its consortium trains."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from founding import CENTRAL, GUIDE, PROJECT, REPOSITORY, Block, Founded, Parties, found, steps
from hospitals import ADMIN, SERVER, SITES, training

from fedgestalt.errors import ServerError

pytestmark = pytest.mark.federation

NOTICE = "Research use only, not a diagnosis."
KEY = b"PRIVATE KEY-----"
PAGES = (
    "docs/how-to/provision-a-consortium.md",
    "docs/how-to/grow-and-shrink.md",
    *(f"provisioning/{name}" for name in ("README.md", "profile.yml", "project.yml")),
    *(f"provisioning/{name}.yml" for name in ("server", "site", "admin")),
)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founded]:
    folder = tmp_path_factory.mktemp("founded")
    with found(folder, SITES, checked=(SERVER, SITES[0])) as consortium:
        yield consortium


@pytest.fixture(scope="module")
def central(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kits of the guide's other way."""
    variables = {"SERVER": SERVER, "PORT": "18002"}
    parties = Parties(tmp_path_factory.mktemp("central"), {"the lead": ["lead"]}, variables)
    for step in steps(GUIDE, CENTRAL):
        assert isinstance(step, Block)
        parties.run(step)
    return parties.home("lead") / "workspace" / PROJECT


@pytest.mark.parametrize("page", PAGES)
def test_every_page_says_what_this_is_not_for(page: str) -> None:
    assert NOTICE in (REPOSITORY / page).read_text(encoding="utf-8").replace("\n# ", " ")


def test_the_doctor_finds_kits_ready_and_the_administrator_sees_all_hospitals(
    founded: Founded,
) -> None:
    verdicts = [line for line in founded.said.splitlines() if line.startswith("Ready")]
    assert verdicts == ["Ready.", "Ready."], "of the server and of a hospital"
    status = founded.said[founded.said.rindex(verdicts[-1]) :]
    assert all(site in status for site in SITES)


def test_the_hospitals_train_together(founded: Founded) -> None:
    trained = founded.run(training(rounds=1))
    assert trained["flare"] == "FINISHED:COMPLETED"
    assert trained["status"] == "completed"
    assert trained["sites"] == list(SITES)
    for site in SITES:
        assert (founded.store(site) / "sent.jsonl").is_file()


def test_no_private_key_is_anywhere_but_at_its_owner(founded: Founded) -> None:
    owners: dict[bytes, set[str]] = {}
    for party in ("lead", SERVER, ADMIN, *SITES):
        for name, content in files_of(founded.parties.home(party)):
            if KEY in content:
                owners.setdefault(content, set()).add(party)
                assert name.endswith(".key"), f"{name} contains a private key"
    assert len(owners) == 3 + len(SITES), "the root's, the server's, a person's, each hospital's"
    assert all(len(parties) == 1 for parties in owners.values())


def files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, and every file inside an archive there."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield f"{path}: {name}", archive.read(name)


def test_nobody_but_the_owner_can_read_a_private_key(founded: Founded) -> None:
    for party in ("lead", SERVER, ADMIN, *SITES):
        for path in founded.parties.home(party).rglob("*.key"):
            assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("name", [SERVER, *SITES])
def test_both_ways_enforce_the_same(founded: Founded, central: Path, name: str) -> None:
    kits = founded.kit(name), central / "prod_00" / name
    mine, theirs = (enforced(kit) for kit in kits)
    assert mine == theirs
    assert mine["local/authorization.json"]["permissions"]["lead"]["byoc"] == "none"


def enforced(kit: Path) -> dict[str, Any]:
    """The files of a kit that decide what FLARE does, without the certificate's port and name."""
    files = sorted((kit / "local").glob("*.json*"))
    content = {str(f.relative_to(kit)): json.loads(f.read_text()) for f in files}
    signed = next((kit / "startup").glob("fed_*.json"))
    policy = kit / "local" / "fedgestalt.yaml"
    keys = yaml.safe_load(policy.read_text()).keys() if policy.is_file() else ()
    return {
        **content,
        "signed": json.loads(signed.read_text())["require_signed_jobs"],
        "policy": sorted(keys),
        "revoked": (kit / "local" / "revoked.txt").is_file(),
    }


def test_one_for_all_leaves_every_key_with_whoever_provisions(central: Path) -> None:
    state = json.loads((central / "state" / "cert.json").read_text())
    assert {SERVER, *SITES} <= {name for name in state if "pri_key" in state[name]}
    assert "root_pri_key" in state


def test_the_administrator_cannot_stop_a_hospital(founded: Founded) -> None:
    with pytest.raises(ServerError, match="did not do what was asked"):
        founded.local.session.shut_down()
    assert founded.local.session.connected_sites() == list(SITES)
    assert all(family.is_running() for family in founded.local.running.values())
