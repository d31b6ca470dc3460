"""Sites that are lost, late, silent or slow cost their own update and nothing else.

The published model must equal, bit for bit, the plain fixed-point mean of exactly those updates
that the record of the round names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from consortium import Consortium, Plain, Run, Script, Summed, one_network
from nvflare.apis.shareable import Shareable

from fedgestalt.federation.job import transfer
from fedgestalt.federation.job.transfer import DOWNLOAD, UPLOAD
from fedgestalt.jobs import TrainingJob

JOB = TrainingJob(ensemble=one_network(), rounds=1)
TRUSTING = {"threat_model": "honest-but-curious"}

BEFORE_THE_SESSION = [
    ("fgm_join", "before", 1),
    ("fgm_join", "after", 1),
    ("fgm_train", "before", 1),
    ("fgm_train", "after", 1),
    ("fgm_keys", "before", 1),
    ("fgm_keys", "after", 1),
    ("fgm_shares", "before", 1),
    ("fgm_shares", "after", 1),
]
"""Where a site is killed, and at which time that it comes there."""
BEFORE_ITS_VECTOR_COUNTS = [
    ("fgm_vector", "before", 1),
    (UPLOAD, "before", 1),
    (UPLOAD, "before", 3),
    ("fgm_vector", "after", 1),
]
WITH_ITS_VECTOR = [
    ("fgm_survivors", "before", 1),
    ("fgm_survivors", "after", 1),
    ("fgm_unmask", "before", 1),
    ("fgm_unmask", "after", 1),
    ("fgm_apply", "before", 1),
    (DOWNLOAD, "before", 3),
    ("fgm_apply", "after", 1),
    ("fgm_publish", "before", 1),
    ("fgm_publish", "after", 1),
]
ANYWHERE = BEFORE_THE_SESSION + BEFORE_ITS_VECTOR_COUNTS + WITH_ITS_VECTOR
Point = tuple[str, str, int]


def named(point: object) -> str:
    return "-".join(map(str, point)) if isinstance(point, tuple) else ""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector of several chunks, so that a site can be lost between two of them."""
    monkeypatch.setattr(transfer, "CHUNK_WORDS", 64)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4 * 64)


def stored(consortium: Consortium) -> dict[str, list[str]]:
    """Digests of the ensembles that each site holds."""
    return {
        site: [path.name for path in consortium.store(site).glob("ensembles/*")]
        for site in consortium.sites
    }


def check(
    run: Run, consortium: Consortium, plain: Plain, *rounds: Summed, without: tuple[str, ...] = ()
) -> None:
    """A complete job: these sums, signed as such, in everybody's store but of those ``without``."""
    assert run.outcome["status"] == "completed", run.outcome
    assert [r["sites"] for r in run.outcome["rounds"]] == [sorted(r.survivors) for r in rounds]
    assert [r["survivors"] for r in run.signed] == [sorted(r.survivors) for r in rounds]
    rosters = [sorted(r.session or r.survivors) for r in rounds]
    assert [sorted(r["roster"]) for r in run.signed] == rosters
    digest = plain.digest(*rounds)
    assert run.outcome["ensemble"] == digest
    held = stored(consortium)
    assert {site: held[site] for site in consortium.sites if site not in without} == {
        site: [digest] for site in consortium.sites if site not in without
    }
    told = " ".join(run.outcome["warnings"])
    for site in without:
        assert f"site '{site}': its job process has " in told
        assert site in run.outcome["warnings"][-1]
        assert run.outcome["warnings"][-1].endswith(
            "did not store the model: run a job with them, or copy it."
        )


def summed(all_sites: tuple[str, ...], lost: Mapping[str, Point]) -> Summed:
    """What is in the sum if ``lost`` are lost where they are."""
    late = {site for site, point in lost.items() if point in WITH_ITS_VECTOR}
    in_session = {site for site, point in lost.items() if point not in BEFORE_THE_SESSION}
    return Summed(
        [site for site in all_sites if site not in lost or site in late],
        [site for site in all_sites if site not in lost or site in in_session],
    )


# --- one site is killed --------------------------------------------------------------------------


@pytest.mark.parametrize("point", ANYWHERE, ids=named)
def test_a_site_that_is_killed_is_left_out_and_the_others_go_on(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain, point: Point
) -> None:
    task, when, turn = point
    script = Script().kill("bonn", task, when, turn)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    run = consortium.run(JOB)
    assert script.done == [("bonn", task)]
    expected = summed(tuple(four_sites.sites), {"bonn": point})
    check(run, consortium, plain_four, expected, without=("bonn",))
    assert [r["attempt"] for r in run.signed] == [2 if task in {"fgm_keys", "fgm_shares"} else 1]


@pytest.mark.parametrize("point", ANYWHERE[::2], ids=named)
def test_of_five_sites_the_first_may_be_killed_as_well(
    tmp_path: Path, five_sites: Consortium, plain_five: Plain, point: Point
) -> None:
    task, when, turn = point
    script = Script().kill("berlin", task, when, turn)
    consortium = Consortium(tmp_path, source=five_sites, on_task=script)
    run = consortium.run(JOB)
    assert script.done == [("berlin", task)]
    expected = summed(tuple(five_sites.sites), {"berlin": point})
    check(run, consortium, plain_five, expected, without=("berlin",))


# --- two at once ---------------------------------------------------------------------------------

UPLOADS = (UPLOAD, "before", 2)
KEYS, SHARES = ("fgm_keys", "before", 1), ("fgm_shares", "after", 1)
TRAIN, VECTOR = ("fgm_train", "after", 1), ("fgm_vector", "after", 1)
SURVIVORS, UNMASK = ("fgm_survivors", "before", 1), ("fgm_unmask", "before", 1)
APPLY = ("fgm_apply", "before", 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TRAIN, TRAIN),
        (TRAIN, KEYS),
        (KEYS, SHARES),
        (SHARES, SHARES),
        (UPLOADS, VECTOR),
        (VECTOR, SURVIVORS),
        (VECTOR, UNMASK),
        (SURVIVORS, UNMASK),
        (UNMASK, APPLY),
    ],
    ids=named,
)
def test_two_sites_may_be_killed_where_the_threshold_allows_it(
    tmp_path: Path, five_sites: Consortium, plain_five: Plain, first: Point, second: Point
) -> None:
    """Five sites that trust the server to follow the protocol open a sum with three."""
    lost = {"leuven": first, "ulm": second}
    script = Script()
    for site, (task, when, turn) in lost.items():
        script.kill(site, task, when, turn)
    consortium = Consortium(tmp_path, source=five_sites, on_task=script, settings=TRUSTING)
    run = consortium.run(JOB.model_copy(update=TRUSTING))
    assert len(script.done) == 2
    expected = summed(tuple(five_sites.sites), lost)
    check(run, consortium, plain_five, expected, without=("leuven", "ulm"))
    assert run.signed[0]["threshold"] == len(expected.session) // 2 + 1


@pytest.mark.parametrize(
    ("first", "second"), [(UPLOADS, VECTOR), (VECTOR, SURVIVORS), (SURVIVORS, UNMASK)], ids=named
)
def test_one_more_than_the_threshold_allows_and_the_round_begins_anew(
    tmp_path: Path, five_sites: Consortium, plain_five: Plain, first: Point, second: Point
) -> None:
    """Against a malicious server, five sites open a sum with four."""
    script = Script().kill("leuven", *first).kill("ulm", *second)
    consortium = Consortium(tmp_path, source=five_sites, on_task=script)
    run = consortium.run(JOB)
    left = ("berlin", "bonn", "paris")
    # Their vectors had left already: they trained with other random draws.
    again = Summed(left, repeats=dict.fromkeys(left, 1))
    check(run, consortium, plain_five, again, without=("leuven", "ulm"))
    (warning,) = [w for w in run.outcome["warnings"] if "begins anew" in w]
    assert warning.startswith("round 1 begins anew: session: 3 of 5 sites have ")
    assert "4 are needed" in warning
    assert run.outcome["ensemble"] != plain_five.digest(Summed(left))


@pytest.mark.parametrize(
    "point", [TRAIN, KEYS, SHARES, UPLOADS, VECTOR, SURVIVORS, UNMASK], ids=named
)
def test_too_few_sites_end_the_job_with_a_sentence(
    tmp_path: Path, four_sites: Consortium, point: Point
) -> None:
    script = Script().kill("leuven", *point).kill("ulm", *point)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    run = consortium.run(JOB)
    assert run.outcome["status"] == "failed"
    assert run.outcome["reason"] == (
        "round 1: 2 sites are there, the job asks for 3 (lost: leuven, ulm); bring the lost sites"
        " back."
    )
    assert run.panics == [run.outcome["reason"]]
    assert not any(stored(consortium).values())
    assert run.signed == []


def test_a_sum_that_too_few_sites_have_applied_ends_the_job(
    tmp_path: Path, four_sites: Consortium
) -> None:
    script = Script().kill("leuven", *APPLY).kill("ulm", *APPLY)
    run = Consortium(tmp_path, source=four_sites, on_task=script).run(JOB)
    assert run.outcome["status"] == "failed"
    assert run.outcome["reason"] == "round 1: 2 sites have applied the sum, 3 are needed."
    assert run.signed == []


def test_a_job_that_asks_for_more_sites_does_not_go_on_with_fewer(
    tmp_path: Path, four_sites: Consortium
) -> None:
    script = Script().kill("ulm", *TRAIN)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    run = consortium.run(JOB.model_copy(update={"minimum_sites": 4}))
    assert run.outcome["reason"].startswith("round 1: 3 sites are there, the job asks for 4")


@pytest.mark.parametrize(
    ("policy", "point", "says"),
    [
        ("minimum_sites", TRAIN, "3 sites take part, this site's policy asks for 4"),
        ("minimum_survivors", TRAIN, "3 sites take part, this site's policy asks for 4"),
        ("minimum_survivors", UPLOADS, "3 sites are left in the sum, this site's policy asks for"),
    ],
)
def test_a_site_that_asks_for_more_sites_helps_to_open_no_smaller_sum(
    tmp_path: Path, four_sites: Consortium, policy: str, point: Point, says: str
) -> None:
    consortium = Consortium(
        tmp_path,
        source=four_sites,
        on_task=Script().kill("ulm", *point),
        site_settings={"bonn": {policy: 4}},
    )
    run = consortium.run(JOB)
    assert run.outcome["status"] == "failed"
    assert run.outcome["reason"].startswith(f"site 'bonn': bonn: {says}")
    assert run.signed == []
    assert not any(stored(consortium).values())


@pytest.mark.parametrize("strict", [True, False])
def test_of_three_sites_one_may_be_lost_if_all_of_them_allow_a_sum_of_two(
    tmp_path: Path, three_sites: Consortium, strict: bool
) -> None:
    """The two that are left can tell each other's update from the sum."""
    consortium = Consortium(
        tmp_path,
        source=three_sites,
        on_task=Script().kill("leuven", *UPLOADS),
        settings={"minimum_survivors": 2, **TRUSTING},
        site_settings={"bonn": {"minimum_survivors": 3}} if strict else {},
    )
    run = consortium.run(JOB.model_copy(update=TRUSTING))
    if strict:
        assert run.outcome["status"] == "failed"
        assert run.outcome["reason"].startswith(
            "site 'bonn': bonn: 2 sites are left in the sum, this site's policy asks for 3"
        )
    else:
        expected = Summed([s for s in three_sites.sites if s != "leuven"], three_sites.sites)
        check(run, consortium, Plain(three_sites, JOB), expected, without=("leuven",))


# --- a connection that is cut for a while --------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "back", "counts"),
    [
        (("fgm_train", "before"), ("fgm_vector", "before"), False),
        (("fgm_keys", "after"), ("fgm_shares", "before"), False),
        (("fgm_shares", "after"), ("fgm_apply", "before"), False),
        (("fgm_vector", "after"), ("fgm_survivors", "before"), False),
        (("fgm_vector", "sent"), ("fgm_unmask", "before"), True),
        (("fgm_survivors", "after"), ("fgm_unmask", "before"), True),
        (("fgm_survivors", "sent"), ("fgm_apply", "before"), True),
        (("fgm_unmask", "sent"), ("fgm_apply", "after"), True),
        (("fgm_apply", "after"), ("fgm_train", "before"), True),
    ],
    ids=named,
)
def test_a_site_that_was_silent_takes_part_again_with_the_current_model(
    tmp_path: Path,
    four_sites: Consortium,
    plain_four: Plain,
    point: tuple[str, str],
    back: tuple[str, str],
    counts: bool,
) -> None:
    """Its connection is cut in round 2 and mended later in that round, or in round 3."""
    script = Script()
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    script.at("leuven", *point, lambda: consortium.cut("leuven"), time=2)
    turn = 3 if back[0] == "fgm_train" else 2
    script.at("berlin", *back, lambda: consortium.restore("leuven"), time=turn)
    run = consortium.run(JOB.model_copy(update={"rounds": 4}))
    assert len(script.done) == 2
    everybody = four_sites.sites
    others = [site for site in everybody if site != "leuven"]
    in_session = point[0] in {"fgm_vector", "fgm_survivors", "fgm_unmask", "fgm_apply"}
    second = Summed(everybody if counts else others, everybody if in_session else others)
    third = Summed(others if back[0] == "fgm_train" else everybody)
    rounds = Summed(everybody), second, third, Summed(everybody)
    check(run, consortium, plain_four, *rounds)
    if point not in {("fgm_survivors", "sent"), ("fgm_unmask", "sent")}:  # nobody may have noticed
        told = " ".join(run.outcome["warnings"])
        assert "site 'leuven': its job process has been silent" in told


def test_a_site_that_missed_a_round_downloads_the_model_and_nobody_else_does(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain
) -> None:
    script = Script()
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    script.at("leuven", "fgm_train", "before", lambda: consortium.cut("leuven"))
    script.at("berlin", "fgm_apply", "before", lambda: consortium.restore("leuven"))
    run = consortium.run(JOB.model_copy(update={"rounds": 2}))
    others = [site for site in four_sites.sites if site != "leuven"]
    check(run, consortium, plain_four, Summed(others), Summed(four_sites.sites))
    sessions = {record["session"] for record in run.signed}
    models = {
        (m.site, m.reply["fedgestalt"]["name"])
        for m in run.received
        if m.task == DOWNLOAD and m.reply["fedgestalt"]["name"] not in sessions
    }
    assert models == {("leuven", run.signed[0]["model_after"])}


# --- a site that is alive and slow ---------------------------------------------------------------


@pytest.mark.parametrize("task", ["fgm_train", "fgm_keys", "fgm_shares", "fgm_vector", "fgm_apply"])
def test_a_site_that_is_too_slow_is_left_out_of_one_round(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain, task: str
) -> None:
    script = Script()
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    script.at("ulm", task, "after", consortium.phase_ends_without("ulm", task))
    run = consortium.run(JOB.model_copy(update={"rounds": 2}))
    everybody, others = four_sites.sites, four_sites.sites[:3]
    first = {
        "fgm_vector": Summed(others, everybody),
        "fgm_apply": Summed(everybody),
    }.get(task, Summed(others))
    check(run, consortium, plain_four, first, Summed(everybody))
    assert run.outcome["warnings"] == [
        f"phase {task}: site 'ulm': no answer within 3600 seconds; look at its log, or raise the"
        " job's limits."
    ]


def test_the_sum_is_opened_without_waiting_for_the_slowest(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain
) -> None:
    def wait_for_the_next_phase() -> None:
        while consortium.bus.waiting[0] == "fgm_unmask":
            time.sleep(0.002)

    script = Script().at("ulm", "fgm_unmask", "before", wait_for_the_next_phase)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    run = consortium.run(JOB)
    check(run, consortium, plain_four, Summed(four_sites.sites))
    assert run.outcome["warnings"] == []


# --- a site whose process comes up late ----------------------------------------------------------


def late(
    folder: Path, source: Consortium, job: TrainingJob, **settings: Any
) -> tuple[Consortium, Run]:
    """A job in which ulm's process comes up when the sites apply the first sum."""
    script = Script()
    consortium = Consortium(
        folder,
        source=source,
        on_task=script,
        late=("ulm",),
        workflow_settings={"start_limit_seconds": 0.0},
        **settings,
    )
    script.at("berlin", "fgm_apply", "before", lambda: consortium.come_up("ulm"))
    run = consortium.run(job)
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["warnings"][0] == (
        "site 'ulm': its job process has not come up within 0 seconds; look at its log, or raise"
        " the job's limits."
    )
    return consortium, run


TWO_ROUNDS = JOB.model_copy(update={"rounds": 2})


def test_a_site_that_comes_up_late_joins_in_a_later_round(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain
) -> None:
    consortium, run = late(tmp_path, four_sites, TWO_ROUNDS)
    check(run, consortium, plain_four, Summed(four_sites.sites[:3]), Summed(four_sites.sites))
    assert len(run.outcome["warnings"]) == 1
    assert len(run.orders("fgm_join", "berlin")) == 1


def states_another(fact: str, value: str) -> Callable[[str, str, Shareable], Shareable]:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("ulm", "fgm_join"):
            facts = data["fedgestalt"]["facts"]
            data["fedgestalt"]["facts"] = {**facts, fact: value}
        return data

    return tamper


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("fedgestalt", "0.0.9"),
        ("label map", "0" * 64),
        ("classes", "7"),
        ("start model", "0" * 64),
        ("number plan", "0" * 64),
    ],
)
def test_a_site_that_comes_up_late_and_differs_is_left_out(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain, fact: str, value: str
) -> None:
    consortium, run = late(tmp_path, four_sites, TWO_ROUNDS, on_upload=states_another(fact, value))
    assert [r["sites"] for r in run.outcome["rounds"]] == [list(four_sites.sites[:3])] * 2
    assert run.outcome["ensemble"] == plain_four.digest(*[Summed(four_sites.sites[:3])] * 2)
    assert stored(consortium)["ulm"] == []
    shown = value[:12]
    assert run.outcome["warnings"][1].startswith("site 'ulm' came late and is left out: ")
    assert f"{fact} is {shown}, with " in run.outcome["warnings"][1]
    assert run.outcome["warnings"][2].startswith("ulm did not store the model")


def test_a_site_that_comes_up_late_and_refuses_is_left_out(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain
) -> None:
    policy = {"ulm": {"excluded_sites": ["bonn"]}}
    job = TWO_ROUNDS.model_copy(update={"rounds": 3})
    _, run = late(tmp_path, four_sites, job, site_settings=policy)
    assert run.outcome["ensemble"] == plain_four.digest(*[Summed(four_sites.sites[:3])] * 3)
    assert len(run.outcome["warnings"]) == 3, "it is asked and named once"
    assert "does not work with bonn" in run.outcome["warnings"][1]


def test_a_site_that_never_comes_up_is_named(
    tmp_path: Path, four_sites: Consortium, plain_four: Plain
) -> None:
    settings = {"start_limit_seconds": 0.0}
    consortium = Consortium(tmp_path, source=four_sites, late=("ulm",), workflow_settings=settings)
    run = consortium.run(JOB)
    check(run, consortium, plain_four, Summed(four_sites.sites[:3]), without=("ulm",))


def test_a_site_that_joins_twice_is_compared_with_the_others_anew(
    tmp_path: Path, four_sites: Consortium
) -> None:
    """A late site is compared with what the others agreed on, not with what it says itself."""
    tamper = states_another("classes", "7")
    _, run = late(tmp_path, four_sites, TWO_ROUNDS, on_upload=tamper)
    assert run.outcome["classes"] == 3
