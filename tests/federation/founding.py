"""A consortium that is founded by executing the guides, as their readers would.

In a guide, a line ``At **party** …:`` says where the console block after it runs, and a line
``**Send** `pattern` from … to …`` says which files travel. Nothing else is taken from it. Each
party has a folder: its machine, and its home. A shell variable that is not set is an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consortium import tiny_silos
from hospitals import ADMIN, BIN, JOB_LIMIT_SECONDS, SERVER

from fedgestalt.federation.operations.local import LocalConsortium, free_port
from fedgestalt.federation.operations.processes import ProcessFamily
from fedgestalt.jobs import JobSpec, render_job

REPOSITORY = Path(__file__).parents[2]
GUIDE = "provision-a-consortium.md"
FOUNDING, CENTRAL = "## Each party for itself", "## One for all: trials only"
PROJECT = "consortium"
LIMIT_SECONDS = 120
_PLACE = re.compile(r"At \*\*(?P<party>[^*]+)\*\*")
_SEND = re.compile(r"\*\*Send\*\* `(?P<pattern>[^`]+)` from (?P<senders>.+) to (?P<receiver>.+)\.")
_START, _DOCTOR = "/startup/start.sh", "fedgestalt doctor "


@dataclass(frozen=True)
class Block:
    """Commands, and the party on whose machine they run."""

    party: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Sending:
    """Files that travel."""

    pattern: str
    senders: str
    receiver: str


def steps(guide: str, heading: str) -> list[Block | Sending]:
    """The steps under a heading of a guide, with those under its subheadings.

    Args:
        guide: file name below ``docs/how-to``.
        heading: with its number signs.
    """
    text = (REPOSITORY / "docs" / "how-to" / guide).read_text(encoding="utf-8")
    start = text.index(f"\n{heading}\n") + 1
    level = len(heading.split(" ")[0])
    end = re.compile(rf"^#{{1,{level}}} ", re.MULTILINE).search(text, start + len(heading))
    return list(_steps(text[start : end.start() if end else None]))


def _steps(text: str) -> Iterator[Block | Sending]:
    party = ""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for prose, language, code in zip(
        parts[::3], [*parts[1::3], ""], [*parts[2::3], ""], strict=True
    ):
        for line in prose.splitlines():
            if sending := _SEND.search(line):
                yield Sending(**sending.groupdict())
            if place := _PLACE.search(line):
                party = place["party"]
        if language == "console":
            assert party, f"the guide does not say where this runs: {code}"
            lines = code.splitlines()
            assert all(line.startswith("$ ") for line in lines), code
            yield Block(party, tuple(line.removeprefix("$ ") for line in lines))
            party = ""


@dataclass
class Parties:
    """Who takes part, each in a folder, and what they do.

    Attributes:
        folder: of all of them.
        roles: who plays a role in the guide, by its words, for example ``each hospital``.
        variables: of all parties.
        own: of one party, by name.
        checked: those at whom the guide's doctor is called; it takes long.
        started: kits that a guide has started, for the caller to start in the foreground.
    """

    folder: Path
    roles: dict[str, Sequence[str]]
    variables: dict[str, str]
    own: dict[str, dict[str, str]] = field(default_factory=dict)
    checked: Sequence[str] = ()
    started: list[Path] = field(default_factory=list)

    def home(self, party: str) -> Path:
        """A party's folder."""
        folder = self.folder / party
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(self, block: Block) -> dict[str, str]:
        """Run a block at everybody who plays its role; returns what it printed, by party."""
        parties = self.roles[block.party]
        with ThreadPoolExecutor() as pool:
            said = pool.map(lambda party: self._run(party, block.commands), parties)
            return dict(zip(parties, said, strict=True))

    def _run(self, party: str, commands: Sequence[str]) -> str:
        home = self.home(party)
        script = ["set -eu -o pipefail"]
        for command in commands:
            if command.startswith(_DOCTOR) and party not in self.checked:
                continue
            starts = command.rstrip('"').endswith(_START)
            script.append(f"printf 'start %s\\n' {command}" if starts else command)
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=home,
            env=self.environment(party),
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert done.returncode == 0, f"{party}: {commands}\n{done.stdout}\n{done.stderr}"
        for line in done.stdout.splitlines():
            if line.startswith("start "):
                start = (home / line.removeprefix("start ")).resolve()
                assert start.is_file(), start
                self.started.append(start.parents[1])
        return done.stdout

    def environment(self, party: str) -> Mapping[str, str]:
        """The shell variables of a party."""
        return {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home(party)),
            "FEDGESTALT": str(REPOSITORY),
            **self.variables,
            **self.own.get(party, {}),
        }

    def send(self, sending: Sending) -> None:
        """Carry the files of a sending to where the guide says."""
        (lead,) = self.roles["the lead"]
        own = re.fullmatch(r"the party called (\w+)", sending.receiver)
        folder = re.fullmatch(r"the lead's `(\w+)`", sending.receiver)
        assert own or folder, f"to whom? {sending}"
        pattern = sending.pattern.replace(own[1], "*") if own else sending.pattern
        carried = 0
        for role in re.split(r", | and ", sending.senders):
            for sender in self.roles[role]:
                for file in self.home(sender).glob(pattern):
                    name = file.name.split(".signed.")[0]
                    to = self.home(lead) / folder[1] if folder else self.folder / name
                    shutil.copy(file, to)
                    carried += 1
        assert carried, f"nothing was sent: {sending}"


def follow(parties: Parties, path: Sequence[Block | Sending], local: LocalConsortium) -> str:
    """Take all steps in their order, and start the kits that they start; returns what was printed.

    The lead tells everybody the fingerprint as soon as it is printed.
    """
    printed = ""
    for step in path:
        if isinstance(step, Sending):
            parties.send(step)
            continue
        if local.running:
            local.wait_for(set(local.running) - {local.server.name})
        said = "".join(parties.run(step).values())
        if fingerprint := re.search(r"Fingerprint=(\S+)", said):
            parties.variables.setdefault("FINGERPRINT", fingerprint[1])
        printed += said
        while parties.started:
            kit = parties.started.pop(0)
            if kit == local.server:
                local.start_server()
            else:
                local.start(kit)
    return printed


@dataclass
class Founded:
    """A consortium that was founded as the guide says, and runs.

    Attributes:
        said: what the guide's commands printed.
        ensemble: digest of an ensemble that it has trained.
    """

    parties: Parties
    local: LocalConsortium
    said: str = ""
    ensemble: str = ""
    jobs: int = 0

    def kit(self, name: str, workspace: str = "workspace") -> Path:
        """One party's startup kit, on its own machine."""
        return self.parties.home(name) / workspace / PROJECT / "prod_00" / name

    def store(self, site: str) -> Path:
        """The folder that only ``site`` reads and writes."""
        return Path(self.parties.own[site]["STORE"])

    def run(self, job: JobSpec) -> dict[str, Any]:
        """Run a job to its end; returns its outcome with FLARE's status as ``flare``."""
        self.jobs += 1
        folder = self.parties.folder / f"job-{self.jobs}"
        render_job(job, folder)
        session = self.local.session
        job_id = session.submit(folder)
        status = session.watch(job_id, lambda status, report: None, 0.3, JOB_LIMIT_SECONDS)
        return {**session.outcome(job_id), "flare": status}


@contextlib.contextmanager
def found(
    folder: Path, sites: Sequence[str], spare: Sequence[str] = (), checked: Sequence[str] = ()
) -> Iterator[Founded]:
    """Found and start a consortium as the guide says; ends all processes at the end.

    Args:
        folder: every party gets one in it.
        sites: the hospitals.
        spare: hospitals that have data and join later.
        checked: parties at whom the guide's doctor is called.
    """
    parties = Parties(
        folder,
        {"the lead": ["lead"], "the server": [SERVER], "the administrator": [ADMIN]},
        {"SERVER": SERVER, "PORT": str(free_port()), "SITES": " ".join(sites), "PERSON": ADMIN},
        {SERVER: {"ORG": "coordination"}, ADMIN: {"ORG": "coordination"}},
    )
    parties.roles["each hospital"], parties.checked = sites, checked
    tiny_silos(folder / "cohort", [*sites, *spare])
    for site in (*sites, *spare):
        home = parties.home(site)
        (folder / "cohort" / "hospitals" / site).rename(home / "data")
        places = {"DATA": str(home / "data"), "STORE": str(home / "store")}
        parties.own[site] = {"SITE": site, "ORG": site, **places}
    founded = Founded(parties, LocalConsortium(folder, folder, {"OMP_NUM_THREADS": "1"}))
    founded.local.server, founded.local.admin = founded.kit(SERVER), founded.kit(ADMIN)
    with founded.local as local:
        try:
            founded.said = follow(parties, steps(GUIDE, FOUNDING), local)
            yield founded
        finally:
            # this administrator may not stop the hospitals: each stops itself
            end_all(local.running.values())


def end_all(families: Iterable[ProcessFamily]) -> None:
    """End several processes at the same time."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda family: family.end(), families))
