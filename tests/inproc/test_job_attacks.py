"""A server that lies to sites: the attacked site refuses with a sentence, and nothing is published.

The server here is the honest one, with somebody between it and the sites who changes what passes.
Where the honest server would notice first, :func:`gullible` takes its own checks away.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, Plain, Run, Script, Summed, one_network, write_kits
from nvflare.apis.shareable import Shareable

import fedgestalt.federation.training.workflow as workflow_module
from fedgestalt.errors import ConfigError
from fedgestalt.federation.job.identity import Trust, ephemeral_identity
from fedgestalt.federation.job.transfer import DOWNLOAD, UPLOAD
from fedgestalt.federation.job.wire import fault_of
from fedgestalt.federation.training.checkpoints import MODELS_FOLDER, SiteCheckpoints
from fedgestalt.federation.training.transcript import check_transcript
from fedgestalt.jobs import TrainingJob
from fedgestalt.secagg import ServerSession

JOB = TrainingJob(ensemble=one_network(), rounds=1)
Fields = dict[str, Any]
Change = Callable[[Fields], object]


def told(victim: str, task: str, change: Change) -> Callable[[str, str, Shareable], Shareable]:
    """A tamper function: what ``victim`` gets with ``task`` is changed on its way."""

    def tamper(site: str, name: str, data: Shareable) -> Shareable:
        if (site, name) == (victim, task):
            change(data["fedgestalt"])
        return data

    return tamper


def nothing_is_published(run: Run, consortium: Consortium) -> str:
    """Returns why the job failed."""
    assert run.outcome["status"] == "failed", run.outcome
    assert run.panics == [run.outcome["reason"]]
    assert not list(consortium.folder.glob("stores/*/ensembles"))
    assert not list((run.root / "server").rglob("*.safetensors"))
    assert run.signed == []
    return str(run.outcome["reason"])


def attacked(
    folder: Path, source: Consortium, change: Change, task: str, victim: str = "bonn"
) -> str:
    """What is said of a job in which one message to ``victim`` was changed."""
    seen: list[bool] = []

    def noted(fields: Fields) -> None:
        change(fields)
        seen.append(True)

    consortium = Consortium(folder, source=source, on_download=told(victim, task, noted))
    said = nothing_is_published(consortium.run(JOB), consortium)
    assert seen, "the attack has not taken place"
    return said


@pytest.fixture
def gullible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that relays whatever a site sends, of whichever session, signed by whomever."""

    class Anybody:
        def __init__(self, identity: Any) -> None:
            self.fingerprint = identity.fingerprint

        def verify(self, statement: bytes, signature: bytes) -> None:
            """Believe it."""

    class Believing(Trust):
        def check(self, *arguments: Any) -> Any:
            return Anybody(super().check(*arguments))

    class Server(Trust):
        """The server's alone; sites use the real one."""

        of_anybody = classmethod(lambda cls: Believing(None))  # type: ignore[assignment]

    def check(self: ServerSession, site: str, session: bytes, seen: Any) -> None:
        assert site in self.facts.roster
        assert site not in seen

    monkeypatch.setattr(workflow_module, "Trust", Server)
    monkeypatch.setattr(ServerSession, "_check", check)


# --- keys, roster and certificates ---------------------------------------------------------------


def swapped_keys(fields: Fields) -> None:
    """Bonn is shown leuven's keys as berlin's."""
    fields["offers"]["berlin"] = fields["offers"]["leuven"]


def unsigned_keys(fields: Fields) -> None:
    """Bonn is shown keys of the server's own as berlin's."""
    mine = bytes(range(256)) * 5
    fields["offers"]["berlin"] = {**fields["offers"]["berlin"], "mask_key": mine[:1216]}


def missing_keys(fields: Fields) -> None:
    del fields["offers"]["berlin"]


def own_keys_changed(fields: Fields) -> None:
    mine = fields["offers"]["bonn"]
    fields["offers"]["bonn"] = {**mine, "mask_key": mine["channel_key"]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swapped_keys, "the keys of site 'berlin' do not carry its signature for this session"),
        (unsigned_keys, "the keys of site 'berlin' do not carry its signature for this session"),
        (missing_keys, "the keys are not those of the agreed roster"),
        (own_keys_changed, "this site's own keys came back altered"),
    ],
)
def test_a_site_refuses_keys_that_are_not_what_their_owner_signed(
    tmp_path: Path, three_sites: Consortium, change: Change, says: str
) -> None:
    said = attacked(tmp_path, three_sites, change, "fgm_shares")
    assert said.startswith(f"site 'bonn': bonn: {says}")


def lower_threshold(fields: Fields) -> None:
    fields["threshold"] = 2


def senseless_threshold(fields: Fields) -> None:
    fields["threshold"] = 1


def smaller_roster(fields: Fields) -> None:
    del fields["certificates"]["berlin"]
    fields["threshold"] = 2


def stranger(fields: Fields) -> None:
    fields["certificates"]["mallory"] = ephemeral_identity("mallory").certificate


def wrong_name(fields: Fields) -> None:
    fields["certificates"]["berlin"] = fields["certificates"]["leuven"]


def own_certificate(fields: Fields) -> None:
    fields["certificates"]["bonn"] = ephemeral_identity("bonn").certificate


def other_round(fields: Fields) -> None:
    fields["round"] = 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lower_threshold,
            "bonn: 2 of 3 sites could open the sum, this site's policy (malicious) asks for 3",
        ),
        (senseless_threshold, "session: a threshold of 1 for 3 sites, not 2..3"),
        (smaller_roster, "bonn: 2 sites take part, this site's policy asks for 3"),
        (stranger, "bonn: a site takes part that is not in the job's roster"),
        (wrong_name, "site 'berlin': the certificate is made out to 'leuven', not to 'berlin'"),
        (own_certificate, "bonn: this site's own certificate came back altered"),
        (other_round, "bonn: a session came without an update to sum"),
    ],
)
def test_a_site_refuses_a_session_that_cannot_be_right(
    tmp_path: Path, three_sites: Consortium, change: Change, says: str
) -> None:
    said = attacked(tmp_path, three_sites, change, "fgm_keys")
    assert said.startswith(f"site 'bonn': {says}")


def another_certificate(fields: Fields) -> None:
    """In a simulation everybody can make one for any name."""
    fields["certificates"]["berlin"] = ephemeral_identity("berlin").certificate


def other_attempt(fields: Fields) -> None:
    fields["attempt"] += 1


def other_cipher(fields: Fields) -> None:
    fields["cipher"] = {"aes-256-ctr": "chacha20"}.get(fields["cipher"], "aes-256-ctr")


DIFFERENT = [another_certificate, other_attempt, other_cipher]


@pytest.mark.parametrize("change", DIFFERENT)
def test_a_site_that_was_told_of_another_session_is_noticed_by_an_honest_server(
    tmp_path: Path, three_sites: Consortium, change: Change
) -> None:
    said = attacked(tmp_path, three_sites, change, "fgm_keys")
    assert said.startswith("site 'bonn': it sees another session")


@pytest.mark.usefixtures("gullible")
@pytest.mark.parametrize("change", DIFFERENT)
def test_sites_that_were_told_of_different_sessions_do_not_come_together(
    tmp_path: Path, three_sites: Consortium, change: Change
) -> None:
    """Whichever looks first refuses: bonn the others' keys, or the others bonn's."""
    said = attacked(tmp_path, three_sites, change, "fgm_keys")
    assert "are of another session" in said
    assert said.startswith(("site 'bonn': bonn: the keys of site ", "site 'berlin': ", "site 'leu"))
    assert said.startswith("site 'bonn'") or "the keys of site 'bonn' are of" in said


# --- another model -------------------------------------------------------------------------------


@pytest.mark.usefixtures("gullible")
def test_a_site_that_was_given_a_model_of_its_own_does_not_come_together_with_the_others(
    tmp_path: Path, three_sites: Consortium
) -> None:
    """Bonn is made to train on a model that would show its images, under its right digest."""
    plain = Plain(three_sites, JOB)
    state = {name: values * np.float32(0.5) for name, values in plain.start.items()}
    chosen = workflow_module.GlobalModel(state)
    fetched: list[bool] = []

    def on_download(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_train"):
            data["fedgestalt"]["model"] = chosen.digest
        if (site, task) == ("bonn", DOWNLOAD):
            fetched.append(True)
            content = chosen.flat.tobytes()
            data["fedgestalt"].update(words=content, checksum=zlib.crc32(content))
        return data

    def on_upload(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", DOWNLOAD):
            data["fedgestalt"]["name"] = plain_digest
        return data

    plain_digest = workflow_module.GlobalModel(plain.start).digest.hex()
    consortium = Consortium(
        tmp_path, source=three_sites, on_download=on_download, on_upload=on_upload
    )
    run = consortium.run(JOB)
    assert fetched
    assert "are of another session" in nothing_is_published(run, consortium)
    assert "bonn" in run.replies("fgm_train"), "it has trained, and nothing has left it"
    assert UPLOAD not in {message.task for message in run.received}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.float32(1.5), "bonn: the model does not have the digest it names"),
        (np.float32(np.nan), "bonn: the model holds NaN or infinity"),
    ],
)
def test_a_site_refuses_a_model_that_does_not_have_its_digest(
    tmp_path: Path, three_sites: Consortium, value: np.float32, says: str
) -> None:
    def on_download(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_train"):
            data["fedgestalt"]["model"] = bytes(32)
        if (site, task) == ("bonn", DOWNLOAD):
            flat = np.frombuffer(data["fedgestalt"]["words"], np.float32).copy()
            flat[7] = value
            content = flat.tobytes()
            data["fedgestalt"].update(words=content, checksum=zlib.crc32(content))
        return data

    def on_upload(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", DOWNLOAD):
            data["fedgestalt"]["name"] = right
        return data

    right = workflow_module.GlobalModel(Plain(three_sites, JOB).start).digest.hex()
    consortium = Consortium(
        tmp_path, source=three_sites, on_download=on_download, on_upload=on_upload
    )
    said = nothing_is_published(consortium.run(JOB), consortium)
    assert said.startswith(f"site 'bonn': {says}")


# --- shares --------------------------------------------------------------------------------------


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def altered_box(fields: Fields) -> None:
    boxes = fields["delivery"]["boxes"]
    boxes["berlin"] = flipped(boxes["berlin"])


def another_box(fields: Fields) -> None:
    boxes = fields["delivery"]["boxes"]
    boxes["berlin"], boxes["leuven"] = boxes["leuven"], boxes["berlin"]


def missing_box(fields: Fields) -> None:
    del fields["delivery"]["boxes"]["berlin"]


def altered_header(fields: Fields) -> None:
    headers = fields["delivery"]["headers"]
    headers["berlin"] = {**headers["berlin"], "seed_commitment": bytes(32)}


def swapped_headers(fields: Fields) -> None:
    headers = fields["delivery"]["headers"]
    headers["berlin"] = headers["leuven"]


def own_header(fields: Fields) -> None:
    headers = fields["delivery"]["headers"]
    headers["bonn"] = {**headers["bonn"], "seed_commitment": bytes(32)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (altered_box, "the box of site 'berlin' is not the one that it signed"),
        (another_box, "' is not the one that it signed"),
        (missing_box, "the boxes are not those of all other sites"),
        (altered_header, "the share header of site 'berlin' does not carry its signature"),
        (swapped_headers, "the share header of site 'berlin' does not carry its signature"),
        (own_header, "this site's own share header came back altered"),
    ],
)
def test_a_site_refuses_shares_that_are_not_what_their_dealer_signed(
    tmp_path: Path, three_sites: Consortium, change: Change, says: str
) -> None:
    said = attacked(tmp_path, three_sites, change, "fgm_vector")
    assert said.startswith("site 'bonn': bonn: ")
    assert says in said


def test_a_site_that_refuses_its_shares_has_sent_nothing(
    tmp_path: Path, three_sites: Consortium
) -> None:
    consortium = Consortium(
        tmp_path, source=three_sites, on_download=told("bonn", "fgm_vector", altered_box)
    )
    run = consortium.run(JOB)
    assert "bonn" not in {m.site for m in run.received if m.task == UPLOAD}
    kept = SiteCheckpoints(consortium.store("bonn") / MODELS_FOLDER)
    start = workflow_module.GlobalModel(Plain(three_sites, JOB).start)
    assert kept.times_sent(start.digest) == 0


# --- survivors -----------------------------------------------------------------------------------


def without_leuven(fields: Fields) -> None:
    fields["sites"] = tuple(site for site in fields["sites"] if site != "leuven")


def without_itself(fields: Fields) -> None:
    fields["sites"] = tuple(site for site in fields["sites"] if site != "bonn")


def without_two(fields: Fields) -> None:
    fields["sites"] = ("berlin", "bonn")


def of_another_session(fields: Fields) -> None:
    fields["session"] = bytes(32)


def with_a_stranger(fields: Fields) -> None:
    fields["sites"] = (*fields["sites"], "zagreb")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_itself, "this site has sent its vector and is not among the survivors"),
        (without_two, "2 sites survive, the threshold is 3"),
        (of_another_session, "the survivors are those of another session"),
        (with_a_stranger, "the survivors are no subset of the roster"),
    ],
)
def test_a_site_signs_no_survivors_that_cannot_be_right(
    tmp_path: Path, four_sites: Consortium, change: Change, says: str
) -> None:
    said = attacked(tmp_path, four_sites, change, "fgm_survivors")
    assert said.startswith(f"site 'bonn': bonn: {says}")


def test_a_site_that_was_told_of_other_survivors_is_noticed_by_an_honest_server(
    tmp_path: Path, four_sites: Consortium
) -> None:
    said = attacked(tmp_path, four_sites, without_leuven, "fgm_survivors")
    assert said.startswith("site 'bonn': its signature does not fit")


@pytest.mark.usefixtures("gullible")
def test_two_sets_of_survivors_open_nothing(tmp_path: Path, four_sites: Consortium) -> None:
    """Two sums whose difference is leuven's update: bonn signs the one, the others the other."""
    said = attacked(tmp_path, four_sites, without_leuven, "fgm_survivors")
    assert "survivors" in said
    assert said.startswith(
        (
            "site 'bonn': bonn: the survivors are not those that this site signed",
            "site 'berlin': berlin: the signature of site 'bonn' is not for the survivors",
            "site 'leuven': leuven: the signature of site 'bonn' is not for the survivors",
            "site 'ulm': ulm: the signature of site 'bonn' is not for the survivors",
        )
    )


def other_set(fields: Fields) -> None:
    fields["sites"] = ("berlin", "bonn", "leuven")
    fields["signatures"] = {s: fields["signatures"][s] for s in fields["sites"]}


def too_few_signatures(fields: Fields) -> None:
    fields["signatures"] = {s: fields["signatures"][s] for s in ("berlin", "bonn")}


def swapped_signatures(fields: Fields) -> None:
    signatures = fields["signatures"]
    signatures["berlin"], signatures["leuven"] = signatures["leuven"], signatures["berlin"]


def own_signature(fields: Fields) -> None:
    fields["signatures"]["bonn"] = fields["signatures"]["berlin"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_set, "the survivors are not those that this site signed"),
        (too_few_signatures, "2 survivors have signed, the threshold is 3"),
        (swapped_signatures, "' is not for the survivors that this site signed"),
        (own_signature, "this site's own signature came back altered"),
        (of_another_session, "the survivors are not those that this site signed"),
    ],
)
def test_a_site_opens_no_sum_that_a_threshold_has_not_signed(
    tmp_path: Path, four_sites: Consortium, change: Change, says: str
) -> None:
    seen: list[bool] = []
    consortium = Consortium(tmp_path, source=four_sites)

    def on_download(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_unmask"):
            change(data["fedgestalt"])
            seen.append(True)
        return data

    def bonn_answers_first(site: str, task: str, when: str) -> None:
        while site != "bonn" and (task, when) == ("fgm_unmask", "before"):
            if "bonn" not in consortium.bus.waiting[1] or consortium.bus.done.wait(0.002):
                return

    consortium.on_download, consortium.on_task = on_download, bonn_answers_first
    said = nothing_is_published(consortium.run(JOB), consortium)
    assert seen
    assert said.startswith("site 'bonn': bonn: ")
    assert says in said


# --- the same again ------------------------------------------------------------------------------


def demands(
    folder: Path, source: Consortium, at: tuple[str, str], again: str, change: Change | None = None
) -> tuple[str, Run, Consortium]:
    """Have bonn asked once more what it was asked last with the task ``again``; its answer."""
    answers: list[str] = []
    script = Script()
    consortium = Consortium(folder, source=source, on_task=script)

    def demand() -> None:
        fields = dict(consortium.bus.run.orders(again, "bonn")[-1])
        if change:
            change(fields)
        answers.append(fault_of(consortium.demand("bonn", again, fields)))

    def until_bonn_has_answered() -> None:
        """Or the others, a threshold, open the sum before bonn says that it takes no more part."""
        while not any(
            (m.site, m.task) == ("bonn", "fgm_unmask") for m in consortium.bus.run.received
        ):
            time.sleep(0.002)

    script.at("bonn", *at, demand)
    if at[0] == "fgm_survivors":
        for site in set(consortium.sites) - {"bonn"}:
            script.at(site, "fgm_unmask", "before", until_bonn_has_answered)
    run = consortium.run(JOB)
    (answer,) = answers
    return answer, run, consortium


TWICE = "bonn: a message of the session came twice or out of order"


def next_attempt(fields: Fields) -> None:
    fields["attempt"] += 1


@pytest.mark.parametrize(
    ("at", "again", "change", "says"),
    [
        (("fgm_keys", "after"), "fgm_keys", None, "bonn: a session came for the second time"),
        (("fgm_shares", "after"), "fgm_shares", None, TWICE),
        (("fgm_vector", "after"), "fgm_vector", None, TWICE),
        (
            ("fgm_vector", "after"),
            "fgm_keys",
            next_attempt,
            "bonn: a session came without an update to sum",
        ),
        (("fgm_survivors", "after"), "fgm_survivors", None, TWICE),
        (("fgm_survivors", "after"), "fgm_survivors", without_leuven, TWICE),
    ],
)
def test_what_a_site_did_once_it_does_not_do_again(
    tmp_path: Path,
    four_sites: Consortium,
    at: tuple[str, str],
    again: str,
    change: Change | None,
    says: str,
) -> None:
    answer, run, consortium = demands(tmp_path, four_sites, at, again, change)
    assert answer.startswith(says)
    if says == TWICE:  # it closes the session: the attack opens nothing, for nobody
        said = nothing_is_published(run, consortium)
        assert "a message of the session came twice or out of order" in said


@pytest.mark.parametrize("change", [None, other_set])
def test_a_site_gives_its_shares_once(
    tmp_path: Path, four_sites: Consortium, change: Change | None
) -> None:
    """A second answer for other survivors would give seed and root of one site away."""
    answer, run, _ = demands(tmp_path, four_sites, ("fgm_unmask", "after"), "fgm_unmask", change)
    assert answer.startswith(TWICE)
    assert run.outcome["status"] == "completed", run.outcome


def test_a_site_that_signed_no_survivors_accepts_no_small_sum(
    tmp_path: Path, four_sites: Consortium
) -> None:
    answers: list[str] = []
    script = Script()
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)

    def demand() -> None:
        received = list(consortium.bus.run.received)
        name = next(m.reply["fedgestalt"]["name"] for m in received if m.task == UPLOAD)
        for survivors in ((), ("bonn",), ("berlin", "bonn", "zagreb")):
            fields = {
                "schema": "fedgestalt.training.apply/1",
                "session": bytes.fromhex(name),
                "survivors": survivors,
                "previous": b"",
            }
            answers.append(fault_of(consortium.demand("bonn", "fgm_apply", fields)))

    script.at("bonn", "fgm_vector", "after", demand)
    run = consortium.run(JOB)
    assert run.outcome["status"] == "completed", run.outcome
    assert answers == ["bonn: the sum is not the one that this site helped to open."] * 3


# --- the sum -------------------------------------------------------------------------------------


def wrong_sum(site: str, task: str, data: Shareable) -> Shareable:
    """Bonn gets another sum than the others; all else is right."""
    if (site, task) == ("bonn", DOWNLOAD):
        words = np.frombuffer(data["fedgestalt"]["words"], np.uint32).copy()
        words[5] += 1000
        content = words.tobytes()
        data["fedgestalt"].update(words=content, checksum=zlib.crc32(content))
    return data


def test_a_site_that_was_given_another_sum_signs_another_record(
    tmp_path: Path, three_sites: Consortium
) -> None:
    script = Script()
    consortium = Consortium(tmp_path, source=three_sites, on_download=wrong_sum, on_task=script)

    def until_the_others_have_signed() -> None:
        while len(consortium.bus.run.replies("fgm_apply")) < 2:
            time.sleep(0.002)

    script.at("bonn", "fgm_apply", "after", until_the_others_have_signed)
    run = consortium.run(JOB)
    said = nothing_is_published(run, consortium)
    assert said == "site 'bonn': its record of the round differs from that of the others."
    records = {
        site: json.loads(fields["record"]) for site, fields in run.replies("fgm_apply").items()
    }
    right = next(record for site, record in records.items() if site != "bonn")
    differing = {key for key, value in records["bonn"].items() if right[key] != value}
    assert differing == {"sum", "model_after"}


def other_survivors(fields: Fields) -> None:
    fields["survivors"] = ("berlin", "bonn", "leuven")


def other_history(fields: Fields) -> None:
    fields["previous"] = bytes(32)


@pytest.mark.parametrize("change", [of_another_session, other_survivors])
def test_a_site_applies_no_sum_but_the_one_that_it_helped_to_open(
    tmp_path: Path, four_sites: Consortium, change: Change
) -> None:
    said = attacked(tmp_path, four_sites, change, "fgm_apply")
    assert said.startswith(
        "site 'bonn': bonn: the sum is not the one that this site helped to open"
    )


def test_a_site_does_not_go_on_from_a_record_that_it_has_not_signed(
    tmp_path: Path, three_sites: Consortium
) -> None:
    turns: list[bytes] = []

    def change(fields: Fields) -> None:
        turns.append(fields["previous"])
        if len(turns) == 2:
            other_history(fields)

    consortium = Consortium(
        tmp_path, source=three_sites, on_download=told("bonn", "fgm_apply", change)
    )
    run = consortium.run(JOB.model_copy(update={"rounds": 2}))
    assert run.outcome["reason"].startswith(
        "site 'bonn': bonn: the record before is not the one this site signed"
    )
    assert len(run.signed) == 1
    assert not list(tmp_path.glob("stores/*/ensembles"))


# --- certificates of real kits -------------------------------------------------------------------


def with_kits(folder: Path, source: Consortium, kits: Path, **changes: Any) -> Consortium:
    return Consortium(folder, source=source, kits=kits, **changes)


@pytest.fixture(scope="module")
def signed(
    tmp_path_factory: pytest.TempPathFactory, three_sites: Consortium, kits: Path
) -> tuple[Run, bytes]:
    """Two rounds of sites with kits, and the root certificate."""
    consortium = with_kits(tmp_path_factory.mktemp("signed"), three_sites, kits)
    run = consortium.run(JOB.model_copy(update={"rounds": 2}))
    assert run.outcome["status"] == "completed", run.outcome
    plain = Plain(three_sites, JOB)
    assert run.outcome["ensemble"] == plain.digest(*[Summed(three_sites.sites)] * 2)
    return run, (kits / "berlin" / "rootCA.pem").read_bytes()


def test_a_site_without_a_kit_of_the_consortium_is_named(
    tmp_path: Path, three_sites: Consortium, kits: Path
) -> None:
    own = {"bonn": {"identity": "ephemeral"}}
    consortium = with_kits(tmp_path, three_sites, kits, site_settings=own)
    said = nothing_is_published(consortium.run(JOB), consortium)
    assert said.startswith(
        "site 'bonn': the certificate was issued by 'bonn', not by the root 'fedgestalt'"
    )


@pytest.mark.parametrize("issuer", ["itself", "another consortium"])
def test_a_certificate_that_the_server_made_up_is_refused_by_the_sites(
    tmp_path: Path, three_sites: Consortium, kits: Path, issuer: str
) -> None:
    if issuer == "itself":
        forged = ephemeral_identity("berlin").certificate
        says = "the certificate was issued by 'berlin', not by the root 'fedgestalt'"
    else:
        others = write_kits(tmp_path / "others", ("berlin",))
        forged = (others / "berlin" / "client.crt").read_bytes()
        says = "the certificate names the root 'fedgestalt' without its valid signature"

    def change(fields: Fields) -> None:
        fields["certificates"]["berlin"] = forged

    consortium = with_kits(
        tmp_path, three_sites, kits, on_download=told("bonn", "fgm_keys", change)
    )
    said = nothing_is_published(consortium.run(JOB), consortium)
    assert said.startswith(f"site 'bonn': site 'berlin': {says}")


def test_the_transcript_holds_under_the_root_certificate_alone(signed: tuple[Run, bytes]) -> None:
    run, root = signed
    checked = check_transcript(run.folder / "transcript.json", root)
    assert [entry.record["round"] for entry in checked] == [1, 2]
    assert [entry.signers for entry in checked] == [("berlin", "bonn", "leuven")] * 2
    assert [dict(entry.record) for entry in checked] == run.signed


def edited(change: Callable[[Fields], object]) -> Callable[[Mapping[str, Any]], Fields]:
    def edit(document: Mapping[str, Any]) -> Fields:
        copy = json.loads(json.dumps(document))
        change(copy)
        return copy

    return edit


def of_record(number: int, key: str, value: object) -> Callable[[Fields], None]:
    def change(document: Fields) -> None:
        record = document["rounds"][number]["record"]
        record[key] = value(record[key]) if callable(value) else value

    return change


def swap_signatures(document: Fields) -> None:
    signatures = document["rounds"][1]["signatures"]
    signatures["berlin"], signatures["bonn"] = signatures["bonn"], signatures["berlin"]


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (of_record(0, "weight", lambda weight: weight + 1), 1),
        (of_record(0, "sum", lambda digest: digest[::-1]), 1),
        (of_record(1, "model_after", lambda digest: digest[::-1]), 2),
        (of_record(0, "model_after", lambda digest: digest[::-1]), 1),
        (of_record(1, "survivors", ["berlin", "bonn"]), 2),
        (of_record(1, "threshold", 2), 2),
        (of_record(1, "attempt", 7), 2),
        (of_record(1, "previous", ""), 2),
        (lambda document: document["rounds"].pop(0), 1),
        (lambda document: document["rounds"].reverse(), 1),
        (lambda document: document["rounds"].append(document["rounds"][-1]), 3),
        (lambda document: document["rounds"][1]["signatures"].pop("bonn"), 2),
        (swap_signatures, 2),
    ],
    ids=range(13),
)
def test_a_transcript_that_was_tampered_with_does_not_hold(
    tmp_path: Path, signed: tuple[Run, bytes], change: Callable[[Fields], object], entry: int
) -> None:
    run, root = signed
    document = json.loads((run.folder / "transcript.json").read_text())
    path = tmp_path / "transcript.json"
    path.write_text(json.dumps(edited(change)(document)))
    with pytest.raises(ConfigError, match=f"transcript.json, entry {entry}: "):
        check_transcript(path, root)
    path.write_text(json.dumps(document))
    assert len(check_transcript(path, root)) == 2


def test_a_transcript_does_not_hold_under_another_root(
    tmp_path: Path, signed: tuple[Run, bytes]
) -> None:
    others = write_kits(tmp_path / "others", (), root="elsewhere")
    root = (others / "server" / "rootCA.pem").read_bytes()
    with pytest.raises(ConfigError, match="not by the root 'elsewhere'"):
        check_transcript(signed[0].folder / "transcript.json", root)


def test_a_transcript_goes_on_over_two_jobs(tmp_path: Path, four_sites: Consortium) -> None:
    kits = write_kits(tmp_path / "kits", four_sites.sites)
    script = Script().kill("leuven", "fgm_train", time=2).kill("ulm", "fgm_train", time=2)
    consortium = with_kits(tmp_path, four_sites, kits, on_task=script)
    job = JOB.model_copy(update={"rounds": 2})
    first = consortium.run(job)
    consortium.on_task = lambda *_: None
    again = job.model_copy(update={"resume_from": "job-1"})
    second = consortium.run(again, job_id="job-2", root=first.root)
    assert second.outcome["status"] == "completed", second.outcome
    root = (kits / "berlin" / "rootCA.pem").read_bytes()
    checked = check_transcript(second.folder / "transcript.json", root)
    assert [entry.record["job"] for entry in checked] == ["job-1", "job-2"]
