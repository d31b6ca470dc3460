"""Sites and servers that die while a consortium of real processes trains, and those that come back.

A sum of six sites may lose one, then one of the five, then one of the four: a job sees several of
its sites fall, one after the other, and the next job has all of them again. Where the rules for
four sites matter, a job names four. The tests build on one another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from faults import Ward, falls_in, measured, until
from hospitals import SERVER, Hospitals, training

from fedgestalt.federation.tasks import (
    APPLY,
    JOIN,
    KEYS,
    PUBLISH,
    SHARES,
    SURVIVORS,
    TRAIN,
    UNMASK,
    VECTOR,
)
from fedgestalt.federation.training.checkpoints import CHECKPOINTS_FOLDER, MODELS_FOLDER
from fedgestalt.federation.training.transcript import (
    CheckedRound,
    check_transcript,
    find_transcript,
)
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.store import load_ensemble

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]
log = logging.getLogger(__name__)

SITES = ("aachen", "berlin", "bonn", "essen", "leuven", "ulm")
FOUR = ("aachen", "bonn", "leuven", "ulm")
ROUNDS = 3
SILENCE_SECONDS = 10.0
SOON_SECONDS = 60.0
"""Until a silence is noticed, on a machine that is busy with other things."""
LIMIT_SECONDS = 500.0
IN_CHUNKS = MemberSpec(
    name="scratch",
    backbone="iresnet",
    options={"depth": 18, "width": 8, "embedding_size": 4096, "input_size": 32},
    trainable="all",
    training=TrainingSpec(epochs=1, batch_size=8, variants=1),
)
"""1.2 million values, most of them in one layer: three chunks of 2 MiB, and little to compute."""


@dataclass(frozen=True)
class Fall:
    """What happens to a site; see :func:`faults.falls_in`."""

    site: str
    task: str
    call: int = 1
    how: str = "die"
    chunk: int | None = None


@dataclass(frozen=True)
class Day:
    """A job in which sites fall.

    Attributes:
        falls: in their order.
        rosters: of each round's last session: who is not in it.
        sums: of each round: whose update is not in it.
        receipts: of each round: who has not signed its record.
        waiting: a site that trains its second round until one that was frozen is heard of again.
        network: one for several chunks; the tiny ones if not given.
    """

    falls: Sequence[Fall]
    rosters: Sequence[str]
    sums: Sequence[str]
    receipts: Sequence[str]
    waiting: str = ""
    network: MemberSpec | None = None

    @property
    def lost(self) -> list[str]:
        """Who does not come back."""
        return sorted(fall.site for fall in self.falls if fall.how != "freeze")


DAYS = {
    "before the vectors": Day(
        falls=(
            Fall("bonn", JOIN),
            Fall("aachen", TRAIN, how="die_with_parent"),
            Fall("ulm", KEYS, call=2),
        ),
        rosters=("aachen bonn", "aachen bonn ulm"),
        sums=("aachen bonn", "aachen bonn ulm"),
        receipts=("aachen bonn", "aachen bonn ulm"),
    ),
    "around the upload": Day(
        falls=(
            Fall("leuven", SHARES),
            Fall("berlin", VECTOR, call=2),
            Fall("ulm", VECTOR, call=3, chunk=2),
        ),
        rosters=("leuven", "leuven", "berlin leuven"),
        sums=("leuven", "berlin leuven", "berlin leuven ulm"),
        receipts=("leuven", "berlin leuven", "berlin leuven ulm"),
        network=IN_CHUNKS,
    ),
    "after the upload": Day(
        falls=(
            Fall("aachen", VECTOR, chunk=0),
            Fall("essen", SURVIVORS, call=2),
            Fall("bonn", UNMASK, call=3),
        ),
        rosters=("", "aachen", "aachen essen"),
        sums=("aachen", "aachen", "aachen essen"),
        receipts=("aachen", "aachen essen", "aachen bonn essen"),
    ),
    "until the end": Day(
        falls=(
            Fall("leuven", TRAIN, how="freeze"),
            Fall("bonn", TRAIN, call=2),
            Fall("ulm", APPLY, call=3),
            Fall("aachen", PUBLISH),
        ),
        rosters=("leuven", "bonn leuven", "bonn"),
        sums=("leuven", "bonn leuven", "bonn"),
        receipts=("leuven", "bonn leuven", "bonn ulm"),
        waiting="essen",
    ),
}


@dataclass
class Ended:
    """What is known of a job that has ended.

    Attributes:
        outcome: with FLARE's status as ``flare``.
        rounds: of its transcript, checked with the consortium's root certificate alone.
        fell: when each site fell.
        noticed: when the job's report had a warning that names it.
    """

    outcome: dict[str, Any]
    rounds: Sequence[CheckedRound]
    fell: Mapping[str, float]
    noticed: Mapping[str, float]

    @property
    def models(self) -> list[str]:
        """Digest of the model after each round."""
        return [entry.record["model_after"] for entry in self.rounds]


@dataclass
class Consortium(Ward):
    """The ward, with what this module asks of it."""

    def live(self, job: TrainingJob, falls: Sequence[Fall] = (), waiting: str = "") -> Ended:
        """Run a job to its end, while sites fall.

        A whole site that has died starts again when it is missed. A frozen one goes on when
        another is ``waiting`` for it.
        """
        noticed: dict[str, float] = {}
        frozen = {fall.site for fall in falls if fall.how == "freeze"}

        def look(report: Mapping[str, Any]) -> None:
            for fall in falls:
                named = any(f"site {fall.site!r}: its job" in w for w in report["warnings"])
                if named and fall.site not in noticed:
                    noticed[fall.site] = time.time()
                    if fall.how == "die_with_parent":
                        self.start(fall.site)
            if waiting and self.patients[waiting].fell:
                while frozen:
                    self.thaw(frozen.pop())
                ago = [report["sites"][s]["heard_seconds_ago"] for s in noticed if s not in dead]
                if max(ago, default=SILENCE_SECONDS) < SILENCE_SECONDS:
                    self.patients[waiting].go()

        dead = {fall.site for fall in falls if fall.how != "freeze"}
        faults = {f.site: falls_in(f.task, f.call, f.how, f.chunk) for f in falls}
        faults |= {waiting: falls_in(TRAIN, 2, "wait")} if waiting else {}
        with contextlib.ExitStack() as stack:
            for site, fault in faults.items():
                stack.enter_context(self.patients[site].suffers(fault))
            job_id = self.submit(job)
            outcome = self.ended(job_id, LIMIT_SECONDS, look)
        over = time.time()
        fell = {fall.site: self.patients[fall.site].fell or 0.0 for fall in falls}
        for site, moment in fell.items():
            seconds = [noticed.get(site, 0.0) - moment, over - moment]
            log.info("measured: %s fell, noticed after %.1f, all over %.1f s", site, *seconds)
        return Ended(outcome, self.transcript(job_id), fell, noticed)

    def transcript(self, job: str) -> list[CheckedRound]:
        """The checked transcript of a job's downloaded result."""
        result = self.local.session.download(job, self.hospitals.folder / "results")
        root = (self.hospitals.kit(SITES[0]) / "startup" / "rootCA.pem").read_bytes()
        return check_transcript(find_transcript(result), root)

    def thaw(self, site: str) -> None:
        """Let a frozen site go on."""
        for process in self.local.running[site].members():
            process.resume()

    def stored(self, site: str, digest: str) -> bool:
        """Whether a site holds an ensemble, unharmed."""
        folder = self.hospitals.store(site) / "ensembles" / digest
        return folder.is_dir() and load_ensemble(folder, get_registry())[1] == digest

    def sent(self, site: str, model: str) -> int:
        """How often an update to a model has left a site, by its own record."""
        path = self.hospitals.store(site) / MODELS_FOLDER / "sent.json"
        return int(json.loads(path.read_text()).get(model, 0))

    @property
    def checkpoints(self) -> list[str]:
        """Jobs of which the server keeps a checkpoint."""
        folder = self.hospitals.kit(SERVER) / CHECKPOINTS_FOLDER
        return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """FLARE would give a dead site up after a second, if the choice was its own."""
    hospitals = Hospitals(tmp_path_factory.mktemp("consortium"), sites=SITES)
    with hospitals.local({"NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "1"}) as local:
        ward = Consortium(hospitals, local)
        local.start_server()
        for site in SITES:
            ward.start(site)
        local.wait_for(SITES)
        yield ward


def job(sites: Sequence[str], rounds: int, **fields: Any) -> TrainingJob:
    """A job that misses a silent site soon."""
    return training(sites=sites, rounds=rounds, silence_limit_seconds=SILENCE_SECONDS, **fields)


@pytest.fixture(scope="module", params=DAYS)
def lived(ward: Consortium, request: pytest.FixtureRequest) -> tuple[Day, Ended]:
    """A day, lived through."""
    day = DAYS[request.param]
    network = {"ensemble": EnsembleSpec(members=(day.network,))} if day.network else {}
    return day, ward.live(job(SITES, len(day.sums), **network), day.falls, day.waiting)


def without(names: str) -> list[str]:
    """All sites but these."""
    return [site for site in SITES if site not in names.split()]


def test_a_job_goes_on_without_the_sites_that_fall(lived: tuple[Day, Ended]) -> None:
    day, ended = lived
    assert ended.outcome["status"] == "completed", ended.outcome["reason"]
    assert ended.outcome["flare"] == "FINISHED:COMPLETED"
    assert [record["sites"] for record in ended.outcome["rounds"]] == list(map(without, day.sums))


def test_each_fall_is_noticed_and_named(lived: tuple[Day, Ended]) -> None:
    day, ended = lived
    *silences, unpublished = ended.outcome["warnings"]
    for fall, warning in zip(day.falls, silences, strict=True):
        assert f"site {fall.site!r}: its job process has been silent for 1" in warning
        assert "it was killed, ran out of memory, or lost its connection" in warning
        took = ended.noticed[fall.site] - ended.fell[fall.site]
        assert SILENCE_SECONDS - 4 < took < SOON_SECONDS, f"{fall}: {took:.1f} s"
    assert unpublished.startswith(f"{', '.join(day.lost)} did not store the model")


def test_flare_knows_of_the_dead_and_lets_the_job_go_on(
    ward: Consortium, lived: tuple[Day, Ended]
) -> None:
    day, _ = lived
    said = ward.log(SERVER)
    for fall in day.falls:
        if fall.how == "die" and fall.task != PUBLISH:
            assert f"client {fall.site} is placed on dead client watch list" in said
    assert "is deemed disconnected" not in said


def test_the_transcript_says_who_was_there_whose_updates_count_and_who_signed(
    lived: tuple[Day, Ended],
) -> None:
    day, ended = lived
    records = [entry.record for entry in ended.rounds]
    assert [list(record["roster"]) for record in records] == list(map(without, day.rosters))
    assert [record["survivors"] for record in records] == list(map(without, day.sums))
    assert [list(entry.signers) for entry in ended.rounds] == list(map(without, day.receipts))


def test_everybody_who_is_left_stores_the_same_ensemble(
    ward: Consortium, lived: tuple[Day, Ended]
) -> None:
    day, ended = lived
    stored = [site for site in SITES if ward.stored(site, ended.outcome["ensemble"])]
    assert stored == [site for site in SITES if site not in day.lost]


def test_the_sites_live_on(ward: Consortium, lived: tuple[Day, Ended]) -> None:
    assert all(ward.local.running[site].is_running() for site in SITES)
    ward.local.wait_for(SITES)


@pytest.fixture(scope="module")
def uninterrupted(ward: Consortium) -> Ended:
    """A job in which nothing happens, of sites that have never trained before."""
    ward.forget()
    return ward.live(job(FOUR, ROUNDS))


@pytest.fixture(scope="module")
def crashed(ward: Consortium, uninterrupted: Ended) -> dict[str, Any]:
    """The outcome of the same job, whose server was killed in the second round's training."""
    ward.forget()
    with ward.patients["bonn"].suffers(falls_in(TRAIN, 2, "hang")):
        job_id = ward.submit(job(FOUR, ROUNDS))
        until(lambda: ward.patients["bonn"].fell, "the second round to be trained")
    ward.local.running[SERVER].kill()
    began = time.monotonic()
    ward.local.start_server()
    outcome = ward.ended(job_id)
    measured("server killed, job closed", began)
    ward.local.wait_for(SITES)
    measured("server killed, all sites back", began)
    until(lambda: not ward.job_processes(*SITES), "the sites to end the job")
    measured("server killed, job processes gone", began)
    return outcome


@pytest.fixture(scope="module")
def stopped(ward: Consortium, crashed: dict[str, Any]) -> Ended:
    """It goes on, and two of its four sites fall in the third round."""
    falls = Fall("leuven", VECTOR, call=2), Fall("ulm", VECTOR, call=2, chunk=0)
    return ward.live(job(FOUR, ROUNDS, resume_from=crashed["job"]), falls)


@pytest.fixture(scope="module")
def resumed(ward: Consortium, stopped: Ended) -> Ended:
    """It goes on again, to its end."""
    return ward.live(job(FOUR, ROUNDS, resume_from=stopped.outcome["job"]))


def test_all_sites_work_together_after_all_this(ward: Consortium, uninterrupted: Ended) -> None:
    outcome = uninterrupted.outcome
    assert outcome["status"] == "completed", outcome["reason"]
    assert outcome["warnings"] == []
    for entry in uninterrupted.rounds:
        assert entry.signers == tuple(entry.record["survivors"]) == FOUR
        assert tuple(entry.record["roster"]) == FOUR
    assert all(ward.stored(site, outcome["ensemble"]) for site in FOUR)
    assert not ward.checkpoints


def test_a_killed_servers_job_says_how_to_go_on(crashed: dict[str, Any]) -> None:
    assert crashed["flare"] == "FINISHED:ABANDONED"
    assert crashed["status"] == "failed"
    assert f"submit the job again, with resume_from={crashed['job']} to go on" in crashed["reason"]


def test_a_killed_server_costs_no_complete_round_and_no_bit_of_the_model(
    ward: Consortium, uninterrupted: Ended, crashed: dict[str, Any], stopped: Ended
) -> None:
    assert [entry.record["round"] for entry in stopped.rounds] == [1, 2]
    jobs = [entry.record["job"] for entry in stopped.rounds]
    assert jobs == [crashed["job"], stopped.outcome["job"]]
    assert stopped.models == uninterrupted.models[:2]
    for site in FOUR:
        assert ward.vectors(site, crashed["job"]) == 1, "of the first round"


def test_two_of_four_sites_that_fall_in_one_round_end_the_job_with_a_sentence(
    ward: Consortium, stopped: Ended
) -> None:
    outcome = stopped.outcome
    assert (outcome["status"], outcome["flare"]) == ("failed", "FINISHED:EXECUTION_EXCEPTION")
    assert outcome["reason"] == (
        "round 3: 2 sites are there, the job asks for 3 (lost: leuven, ulm); bring the lost sites"
        " back; round 2 is kept: to go on from it, submit the job again with"
        f" resume_from={outcome['job']}."
    )
    for site in ("leuven", "ulm"):
        assert any(f"phase fgm_vector: site {site!r}: its" in w for w in outcome["warnings"])
        assert stopped.noticed[site] - stopped.fell[site] < SOON_SECONDS
    assert "ensemble" not in outcome


def test_a_resumed_job_completes_the_model(
    ward: Consortium, uninterrupted: Ended, stopped: Ended, resumed: Ended
) -> None:
    outcome = resumed.outcome
    assert outcome["status"] == "completed", outcome["reason"]
    assert outcome["resumed_from"] == stopped.outcome["job"]
    assert [record["round"] for record in outcome["rounds"]] == [1, 2, 3]
    assert [tuple(record["sites"]) for record in outcome["rounds"]] == [FOUR] * 3
    assert outcome["warnings"] == []
    assert all(ward.stored(site, outcome["ensemble"]) for site in FOUR)
    assert ward.checkpoints == [crashed_job(stopped)]


def test_a_round_whose_vectors_had_left_is_trained_with_other_draws(
    ward: Consortium, uninterrupted: Ended, resumed: Ended
) -> None:
    """Two sums of the same updates, one with a site and one without, would show that site's."""
    assert resumed.models[:2] == uninterrupted.models[:2]
    assert resumed.models[2] != uninterrupted.models[2]
    sent = {site: ward.sent(site, resumed.models[1]) for site in FOUR}
    assert sent == {"aachen": 2, "bonn": 2, "leuven": 1, "ulm": 2}


def crashed_job(stopped: Ended) -> str:
    """The job of the first round."""
    return str(stopped.rounds[0].record["job"])
