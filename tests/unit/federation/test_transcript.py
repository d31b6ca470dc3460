"""The transcript of a job: what sites signed holds, and whatever else it says is found."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cli import CALL_WRONG, main
from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.federation.job.identity import Identity, fingerprint_of
from fedgestalt.federation.training.transcript import (
    TRANSCRIPT_FILE,
    CheckedRound,
    Transcript,
    check_transcript,
    find_transcript,
    record_digest,
    round_record,
)
from fedgestalt.secagg import (
    AES,
    CHACHA20,
    NumberPlan,
    Recipient,
    SessionFacts,
    TensorPlan,
    ThreatModel,
)
from fedgestalt.secagg.facts import session_digest

SITES = ("berlin", "bonn", "kiel", "leuven", "ulm")
"""Of whom four must agree."""
DAY = timedelta(days=1)
ROUNDS = 3


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Root:
    """The root of a consortium, whose certificates ended yesterday."""

    def __init__(self) -> None:
        self._key = ed25519.Ed25519PrivateKey.generate()
        self.pem = self.certify("trial", self._key, issues=True)

    def certify(self, name: str, key: ed25519.Ed25519PrivateKey, *, issues: bool = False) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name_of(name))
            .issuer_name(name_of("trial"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now - DAY)
        )
        if issues:
            basic = x509.BasicConstraints(ca=True, path_length=None)
            builder = builder.add_extension(basic, critical=True)
        return builder.sign(self._key, None).public_bytes(Encoding.PEM)

    def identity(self, name: str) -> Identity:
        key = ed25519.Ed25519PrivateKey.generate()
        return Identity(name, self.certify(name, key), key)


ROOT, OTHER_ROOT = Root(), Root()
IDENTITIES = {site: ROOT.identity(site) for site in (*SITES, "mainz")}
PRINTS = {site: fingerprint_of(own.certificate).hex() for site, own in IDENTITIES.items()}
PLAN = NumberPlan(5, 100, (TensorPlan("a/head/bias", (7,), 0),))


def digest_of(number: int) -> bytes:
    """Something of 32 bytes."""
    return bytes([number]) * 32


def facts_of(number: int, sites: Collection[str] = SITES, **changes: Any) -> SessionFacts:
    facts = SessionFacts(
        job="job-1",
        round=number,
        attempt=number,
        model_digest=digest_of(number - 1),
        plan=replace(PLAN, sites=len(sites)),
        roster={site: bytes.fromhex(PRINTS[site]) for site in sites},
        threshold=ThreatModel.MALICIOUS.threshold(len(sites)),
    )
    return replace(facts, **changes)


@dataclass
class Job:
    """A training job whose sites sign what happened."""

    transcript: Transcript = field(default_factory=Transcript)

    def round(
        self,
        facts: SessionFacts,
        *,
        survivors: Collection[str] = (),
        signers: Collection[str] = (),
        others: Mapping[str, Identity] | None = None,
        **changes: Any,
    ) -> Job:
        """Add a round; all take part and sign, as themselves, unless said otherwise."""
        survivors = survivors or facts.sites
        told = {
            "agreement": digest_of(40 + facts.round),
            "sum_digest": digest_of(80 + facts.round),
            "weight": 123,
            "clipped": 4,
            "model_after": digest_of(facts.round),
            "previous": self.transcript.last,
        }
        record = round_record(facts, survivors=survivors, **{**told, **changes})
        self.sign(record, signers or survivors, **others or {})
        return self

    def sign(self, record: bytes, signers: Collection[str], **others: Identity) -> None:
        """Add a record, whatever it is."""
        statement, own = record_digest(record), {**IDENTITIES, **others}
        self.transcript.add(
            record,
            {site: own[site].sign(statement) for site in signers},
            {site: own[site].certificate for site in signers},
        )

    @property
    def document(self) -> dict[str, Any]:
        return copy.deepcopy(self.transcript.document())


def job_of(rounds: int = ROUNDS) -> Job:
    job = Job()
    for number in range(1, rounds + 1):
        job.round(facts_of(number))
    return job


@functools.cache
def honest() -> str:
    return json.dumps(job_of().document)


def document() -> dict[str, Any]:
    """That of an honest job of three rounds, to be altered."""
    read: dict[str, Any] = json.loads(honest())
    return read


def written(folder: Path, said: object) -> Path:
    path = folder / TRANSCRIPT_FILE
    path.write_text(said if isinstance(said, str) else json.dumps(said), encoding="utf-8")
    return path


def check(folder: Path, said: object, root: bytes = ROOT.pem) -> list[CheckedRound]:
    return check_transcript(written(folder, said), root)


def refused(folder: Path, said: object, entry: int = 0, root: bytes = ROOT.pem) -> str:
    """Why a transcript is not believed, in one sentence that names the entry, if it is one's."""
    path = written(folder, said)
    with pytest.raises(ConfigError) as fault:
        check_transcript(path, root)
    told = str(fault.value)
    assert told.endswith(".")
    assert "\n" not in told
    assert len(told) < 600
    places = [f"{TRANSCRIPT_FILE}, entry {entry}"] if entry else [TRANSCRIPT_FILE, str(path)]
    assert fault.value.where in places
    return fault.value.what


# --- what holds ----------------------------------------------------------------------------------


def test_an_honest_transcript_holds_long_after_its_certificates_have_ended(tmp_path: Path) -> None:
    found = check(tmp_path, document())
    assert [entry.record["round"] for entry in found] == [1, 2, 3]
    assert [entry.signers for entry in found] == [SITES] * 3
    assert [entry.record for entry in found] == [e["record"] for e in document()["rounds"]]


def test_a_record_says_what_happened_and_nothing_else() -> None:
    facts = facts_of(2)
    job = job_of(1).round(facts, survivors=SITES[1:])
    (_, entry) = job.document["rounds"]
    assert entry["record"] == {
        "schema": "fedgestalt.round-record/1",
        "job": "job-1",
        "round": 2,
        "attempt": 2,
        "session": facts.digest.hex(),
        "agreement": digest_of(42).hex(),
        "roster": {site: PRINTS[site] for site in SITES},
        "threshold": 4,
        "recipient": "server",
        "cipher": AES,
        "plan": facts.plan.digest.hex(),
        "words": facts.plan.words,
        "survivors": list(SITES[1:]),
        "sum": digest_of(82).hex(),
        "weight": 123,
        "clipped": 4,
        "model_before": digest_of(1).hex(),
        "model_after": digest_of(2).hex(),
        "previous": job_of(1).transcript.last.hex(),
    }


def leaves_of(value: object) -> list[object]:
    """Every single value of a JSON document."""
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves_of(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves_of(part)]
    return [value]


def test_the_search_for_a_value_in_a_record_finds_the_weight_that_may_be_told() -> None:
    assert 123 in leaves_of(Job().round(facts_of(1)).document["rounds"][0]["record"])


def test_every_party_writes_a_record_with_the_same_bytes() -> None:
    facts = facts_of(1)
    turned = replace(facts, roster=dict(reversed(facts.roster.items())))
    common: dict[str, Any] = {
        "agreement": digest_of(1),
        "sum_digest": digest_of(2),
        "weight": 1,
        "clipped": 0,
        "model_after": digest_of(3),
        "previous": b"",
    }
    assert round_record(facts, survivors=SITES, **common) == round_record(
        turned, survivors=set(SITES), **common
    )


def test_where_the_server_must_not_learn_the_sum_the_record_does_not_tell_of_it(
    tmp_path: Path,
) -> None:
    said = Job().round(facts_of(1, recipient=Recipient.SITES)).document
    assert said["rounds"][0]["record"]["weight"] is None
    assert said["rounds"][0]["record"]["clipped"] is None
    assert 123 not in leaves_of(said["rounds"][0]["record"])
    (entry,) = check(tmp_path, said)
    assert entry.record["recipient"] == "sites"


def test_as_many_signatures_as_the_threshold_are_enough(tmp_path: Path) -> None:
    said = Job().round(facts_of(1), survivors=SITES[1:]).document
    (entry,) = check(tmp_path, said)
    assert entry.signers == SITES[1:]
    said = Job().round(facts_of(1), signers=SITES[1:]).document
    assert check(tmp_path, said)[0].signers == SITES[1:]


def test_the_roster_may_change_from_round_to_round(tmp_path: Path) -> None:
    job = Job().round(facts_of(1, SITES[:3])).round(facts_of(2)).round(facts_of(3, SITES[1:]))
    assert [entry.signers for entry in check(tmp_path, job.document)] == [
        SITES[:3],
        SITES,
        SITES[1:],
    ]


def test_a_job_that_was_resumed_goes_on_in_one_transcript(tmp_path: Path) -> None:
    transcript = Transcript.of(json.loads(json.dumps(job_of(2).document)))
    said = Job(transcript).round(facts_of(3, job="job-2", attempt=1)).document
    assert [entry.record["job"] for entry in check(tmp_path, said)] == ["job-1", "job-1", "job-2"]


def test_a_site_may_have_got_a_new_kit_before_the_job_was_resumed(tmp_path: Path) -> None:
    new = ROOT.identity("bonn")
    roster = facts_of(3).roster | {"bonn": fingerprint_of(new.certificate)}
    said = job_of(2).round(facts_of(3, roster=roster), others={"bonn": new}).document
    assert [entry.signers for entry in check(tmp_path, said)] == [SITES] * 3
    assert len(said["certificates"]) == len(SITES) + 1


def test_a_threshold_for_a_server_that_follows_the_protocol_holds_as_well(tmp_path: Path) -> None:
    least = ThreatModel.HONEST_BUT_CURIOUS.threshold(5)
    facts = facts_of(1, threshold=least, cipher=CHACHA20)
    assert check(tmp_path, Job().round(facts, survivors=SITES[:least]).document)


def test_a_site_that_was_lost_before_the_sum_may_sign_what_it_sees(tmp_path: Path) -> None:
    said = Job().round(facts_of(1), survivors=SITES[1:], signers=SITES).document
    assert check(tmp_path, said)[0].signers == SITES
    too_few = Job().round(facts_of(1), survivors=SITES[1:], signers=SITES[:4]).document
    assert "4 are needed" in refused(tmp_path, too_few, 1)


def test_rounds_that_were_cut_off_at_the_end_cannot_be_missed(tmp_path: Path) -> None:
    """Nothing in the rounds before says that there were more."""
    said = document()
    said["rounds"].pop()
    assert len(check(tmp_path, said)) == 2


# --- the document --------------------------------------------------------------------------------


def test_a_transcript_comes_back_from_its_document() -> None:
    transcript = job_of().transcript
    again = Transcript.of(json.loads(json.dumps(transcript.document())))
    assert again == transcript
    assert again.last == transcript.last
    assert again.model_after == digest_of(ROUNDS)


def test_before_the_first_round_there_is_no_last_record() -> None:
    assert Transcript().last == b""


def test_a_transcript_is_written_with_what_it_is_not_for(tmp_path: Path) -> None:
    job_of().transcript.write(tmp_path)
    said = json.loads((tmp_path / TRANSCRIPT_FILE).read_text())
    assert said["notice"] == RESEARCH_USE_ONLY
    assert Transcript.of(said).document() == said
    assert len(check_transcript(tmp_path / TRANSCRIPT_FILE, ROOT.pem)) == ROUNDS


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)") as fault:
        check_transcript(tmp_path / "none.json", ROOT.pem)
    assert fault.value.where == str(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        check_transcript(tmp_path, ROOT.pem)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "NaN,", "9" * 5000, '"\\ud8'])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text) == "is not JSON"


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / TRANSCRIPT_FILE
    path.write_bytes(honest().encode("utf-16"))
    with pytest.raises(ConfigError, match="is not JSON"):
        check_transcript(path, ROOT.pem)


@pytest.mark.parametrize("said", ["null", "5", "[]", "{}", '{"schema": "fedgestalt.transcript/2"}'])
def test_another_document_is_refused(tmp_path: Path, said: str) -> None:
    assert refused(tmp_path, said) == "is no fedgestalt.transcript/1"


@pytest.mark.parametrize("key", ["certificates", "rounds"])
@pytest.mark.parametrize("value", [None, 5, "x"])
def test_a_document_without_certificates_or_rounds_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    assert "are missing" in refused(tmp_path, {**document(), key: value})


def test_a_transcript_without_rounds_proves_nothing(tmp_path: Path) -> None:
    assert refused(tmp_path, {**document(), "rounds": []}) == "holds no round"


@pytest.mark.parametrize("root", [b"", b"PEM", IDENTITIES["bonn"].certificate])
def test_a_root_that_is_none_is_the_readers_own_fault(tmp_path: Path, root: bytes) -> None:
    with pytest.raises(SiteError, match="rootCA"):
        check(tmp_path, document(), root)


# --- tampering -----------------------------------------------------------------------------------

Record = dict[str, Any]

INSTEAD: dict[str, list[object]] = {
    "schema": ["fedgestalt.round-record/2", ""],
    "job": ["job-2", ""],
    "round": [0, 4, -1, 2**64, 10**400],
    "attempt": [0, 9, -1, 2**64],
    "session": [digest_of(9).hex(), "", "zz"],
    "agreement": [digest_of(9).hex(), ""],
    "roster": [{}, {"mainz": digest_of(9).hex()}],
    "threshold": [0, -1, 1, 2, 3, 5, 6, 2**64],
    "recipient": ["sites", ""],
    "cipher": [CHACHA20, ""],
    "plan": [digest_of(9).hex(), "", "not hexadecimal"],
    "words": [0, 16, -1, 10**400],
    "survivors": [[], SITES[1:], ["mainz", *SITES], [*SITES[:4], "mainz"], SITES[:3]],
    "sum": [digest_of(9).hex(), ""],
    "weight": [0, 124, None, 10**400],
    "clipped": [0, 5, None],
    "model_before": [digest_of(9).hex(), "", "x" * 64],
    "model_after": [digest_of(9).hex(), ""],
    "previous": [digest_of(9).hex(), "", "x"],
}
TAMPERED = [
    (name, value, number)
    for name, values in INSTEAD.items()
    for value in values
    for number in range(1, ROUNDS + 1)
]


def settle(record: Record) -> None:
    """Make the digest of the session that of its facts again, as any forger can."""
    told = session_digest(
        job=record["job"],
        round=record["round"],
        attempt=record["attempt"],
        model_digest=bytes.fromhex(record["model_before"]),
        plan_digest=bytes.fromhex(record["plan"]),
        roster={site: bytes.fromhex(text) for site, text in record["roster"].items()},
        threshold=record["threshold"],
        recipient=record["recipient"],
        cipher=record["cipher"],
    )
    record["session"] = told.hex()


def chain(said: dict[str, Any]) -> None:
    """Have every record name the one before it again, as any forger can."""
    previous = b""
    for entry in said["rounds"]:
        entry["record"]["previous"] = previous.hex()
        text = json.dumps(entry["record"], sort_keys=True, separators=(",", ":"))
        previous = record_digest(text.encode())


def test_every_field_of_a_record_is_tampered_with_here() -> None:
    for entry in document()["rounds"]:
        assert entry["record"].keys() == INSTEAD.keys()


def changed(name: str, value: object, number: int) -> dict[str, Any] | None:
    """The document with one field altered; None if that is what it was."""
    said = document()
    record = said["rounds"][number - 1]["record"]
    if record[name] == (list(value) if isinstance(value, tuple) else value):
        return None
    record[name] = value
    return said


@pytest.mark.parametrize(("name", "value", "number"), TAMPERED)
def test_no_field_of_a_record_can_be_altered(
    tmp_path: Path, name: str, value: object, number: int
) -> None:
    if said := changed(name, value, number):
        refused(tmp_path, said, number)


@pytest.mark.parametrize(("name", "value", "number"), TAMPERED)
def test_no_field_of_a_record_can_be_altered_with_all_digests_made_to_fit(
    tmp_path: Path, name: str, value: object, number: int
) -> None:
    said = changed(name, value, number)
    if said is None or name in ("previous", "session"):
        return
    try:
        settle(said["rounds"][number - 1]["record"])
    except (ValueError, OverflowError):
        return
    chain(said)
    refused(tmp_path, said, number)


@pytest.mark.parametrize("value", [None, True, 1.0, "x", 5, [], {}, [5], {"bonn": 5}])
@pytest.mark.parametrize("name", INSTEAD)
def test_a_field_of_another_kind_is_refused(tmp_path: Path, name: str, value: object) -> None:
    said = document()
    kind = type(said["rounds"][1]["record"][name])
    said["rounds"][1]["record"][name] = value
    told = refused(tmp_path, said, 2)
    if not isinstance(value, kind) and value is not None and name != "schema":
        assert told == f"field {name!r} has the wrong type"


@pytest.mark.parametrize("name", INSTEAD)
def test_a_field_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    said = document()
    del said["rounds"][1]["record"][name]
    told = refused(tmp_path, said, 2)
    assert told in (f"field {name!r} is missing or unknown", "is no fedgestalt.round-record/1")


def test_a_field_too_many_is_named(tmp_path: Path) -> None:
    said = document()
    said["rounds"][1]["record"]["more"] = 1
    assert refused(tmp_path, said, 2) == "field 'more' is missing or unknown"


@pytest.mark.parametrize("entry", [None, 5, [], {}, {"record": {}}, {"signatures": {}}])
def test_an_entry_that_is_none_is_named(tmp_path: Path, entry: object) -> None:
    said = document()
    said["rounds"][1] = entry
    assert refused(tmp_path, said, 2) == "is no record with signatures"


@pytest.mark.parametrize("member", [5, None, ["x"], {}])
def test_members_of_survivors_and_roster_are_names_and_fingerprints(
    tmp_path: Path, member: object
) -> None:
    said = document()
    said["rounds"][0]["record"]["survivors"][0] = member
    assert "have the wrong type" in refused(tmp_path, said, 1)
    said = document()
    said["rounds"][0]["record"]["roster"]["bonn"] = member
    assert "have the wrong type" in refused(tmp_path, said, 1)


@pytest.mark.parametrize("site", SITES)
def test_a_fingerprint_of_the_roster_cannot_be_altered(tmp_path: Path, site: str) -> None:
    said = document()
    record = said["rounds"][2]["record"]
    record["roster"][site] = digest_of(9).hex()
    assert "session does not follow" in refused(tmp_path, said, 3)
    settle(record)
    refused(tmp_path, said, 3)


@pytest.mark.parametrize("text", ["\ud800", "\0", "e\u0301", "x" * 10_000])
def test_odd_names_are_refused_like_others(tmp_path: Path, text: str) -> None:
    said = document()
    said["rounds"][0]["record"]["job"] = text
    refused(tmp_path, said, 1)
    said = document()
    roster = said["rounds"][0]["record"]["roster"]
    roster[text] = roster.pop("bonn")
    refused(tmp_path, said, 1)
    said = document()
    said["rounds"][0]["signatures"][text] = "00"
    refused(tmp_path, said, 1)


# signatures


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("number", range(1, ROUNDS + 1))
def test_every_signature_is_checked(tmp_path: Path, site: str, number: int) -> None:
    said = document()
    signatures = said["rounds"][number - 1]["signatures"]
    first = signatures[site][0]
    signatures[site] = ("0" if first != "0" else "1") + signatures[site][1:]
    told = refused(tmp_path, said, number)
    assert f"site {site!r}: its signature does not fit" in told


def test_one_wrong_signature_is_one_too_many_however_many_are_right(tmp_path: Path) -> None:
    said = document()
    said["rounds"][0]["signatures"]["bonn"] = said["rounds"][0]["signatures"]["ulm"]
    assert "site 'bonn': its signature does not fit" in refused(tmp_path, said, 1)


def test_the_signature_of_another_round_does_not_fit(tmp_path: Path) -> None:
    said = document()
    said["rounds"][2]["signatures"] = said["rounds"][1]["signatures"]
    assert "its signature does not fit" in refused(tmp_path, said, 3)


@pytest.mark.parametrize("value", [None, 5, [], "", "0", "zz", "ü", "ab" * 1025, "\ud800"])
def test_what_is_no_signature_is_refused(tmp_path: Path, value: object) -> None:
    said = document()
    said["rounds"][1]["signatures"]["bonn"] = value
    assert "signature" in refused(tmp_path, said, 2)


@pytest.mark.parametrize("number", range(1, ROUNDS + 1))
def test_fewer_signatures_than_the_threshold_are_too_few(tmp_path: Path, number: int) -> None:
    said = document()
    signatures = said["rounds"][number - 1]["signatures"]
    del signatures["bonn"]
    check(tmp_path, said)
    del signatures["ulm"]
    assert refused(tmp_path, said, number) == "3 sites have signed it, 4 are needed"


def test_a_site_that_was_not_in_the_roster_cannot_sign(tmp_path: Path) -> None:
    said = Job().round(facts_of(1), signers=(*SITES, "mainz")).document
    assert "not in its roster has signed" in refused(tmp_path, said, 1)


def test_nobodys_record_is_refused_though_it_asks_for_nobodys_signature(tmp_path: Path) -> None:
    for sites, threshold in ((SITES, 0), (SITES, -1), ((), 0), (("mainz",), 0)):
        said = document()
        record = said["rounds"][2]["record"]
        record["survivors"], record["threshold"] = [], threshold
        record["roster"] = {site: digest_of(9).hex() for site in sites}
        said["rounds"][2]["signatures"] = {}
        if threshold >= 0:
            settle(record)
        assert "no site agrees to" in refused(tmp_path, said, 3)


@pytest.mark.parametrize(
    ("sites", "threshold"),
    [(("mainz",), 1), (("bonn", "mainz"), 2), (SITES, 1), (SITES, 2), (("bonn", "kiel", "ulm"), 1)],
)
def test_a_few_sites_cannot_agree_to_less_than_others_would(
    tmp_path: Path, sites: tuple[str, ...], threshold: int
) -> None:
    """They sign among themselves; no site outside would have taken part in that."""
    facts = facts_of(1, sites, threshold=threshold)
    said = Job().round(facts, survivors=sites[:threshold]).document
    assert "no site agrees to" in refused(tmp_path, said, 1)


def test_a_threshold_that_nobody_can_reach_is_refused(tmp_path: Path) -> None:
    said = Job().round(facts_of(1, threshold=6)).document
    assert "no threshold of its roster" in refused(tmp_path, said, 1)


def test_survivors_from_outside_the_roster_are_refused_whoever_signs(tmp_path: Path) -> None:
    said = Job().round(facts_of(1), survivors=(*SITES, "mainz"), signers=SITES).document
    assert "no threshold of its roster" in refused(tmp_path, said, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "fedgestalt.round-record/2"}, "is no fedgestalt.round-record/1"),
        ({"attempt": 2}, "its session does not follow from its own facts"),
        ({"session": "ab" * 32}, "its session does not follow from its own facts"),
        ({"more": 1}, "field 'more' is missing or unknown"),
        ({"weight": True}, "field 'weight' has the wrong type"),
        ({"words": False}, "field 'words' has the wrong type"),
        ({"clipped": 1.0}, "field 'clipped' has the wrong type"),
        ({"sum": None}, "field 'sum' has the wrong type"),
    ],
)
def test_even_what_all_have_signed_must_be_a_record(
    tmp_path: Path, change: Record, says: str
) -> None:
    record = job_of(1).document["rounds"][0]["record"] | change
    job = Job()
    job.sign(json.dumps(record, sort_keys=True, separators=(",", ":")).encode(), SITES)
    assert refused(tmp_path, job.document, 1) == says


# certificates


def test_a_transcript_is_not_believed_by_another_consortium(tmp_path: Path) -> None:
    told = refused(tmp_path, document(), 1, root=OTHER_ROOT.pem)
    assert "without its valid signature" in told


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    "wrong",
    [
        None,
        5,
        "",
        "PEM",
        "\ud800",
        ROOT.pem.decode(),
        IDENTITIES["mainz"].certificate.decode(),
        ROOT.identity("bonn").certificate.decode(),
        ROOT.identity("ulm").certificate.decode(),
        OTHER_ROOT.identity("bonn").certificate.decode(),
    ],
)
def test_every_certificate_is_that_of_its_site_and_of_the_roster(
    tmp_path: Path, site: str, wrong: object
) -> None:
    said = document()
    said["certificates"][PRINTS[site]] = wrong
    assert f"site {site!r}: " in refused(tmp_path, said, 1)
    del said["certificates"][PRINTS[site]]
    assert f"site {site!r}: " in refused(tmp_path, said, 1)


@pytest.mark.parametrize(
    "more", ["\n", " ", "# comment\n", "\ud800", IDENTITIES["ulm"].certificate.decode()]
)
def test_nothing_can_stand_beside_a_certificate(tmp_path: Path, more: str) -> None:
    for text in ("{0}{1}", "{1}{0}"):
        said = document()
        own = said["certificates"][PRINTS["bonn"]]
        said["certificates"][PRINTS["bonn"]] = text.format(own, more)
        assert "site 'bonn': " in refused(tmp_path, said, 1)


def test_a_new_certificate_of_the_same_site_is_not_the_one_that_took_part(tmp_path: Path) -> None:
    said = document()
    said["certificates"][PRINTS["bonn"]] = ROOT.identity("bonn").certificate.decode()
    told = refused(tmp_path, said, 1)
    assert told == "site 'bonn': its certificate is not the one of the roster"


def test_no_certificate_is_taken_for_that_of_another_site(tmp_path: Path) -> None:
    roster = facts_of(1).roster | {"bonn": bytes.fromhex(PRINTS["mainz"])}
    mallory = {"bonn": IDENTITIES["mainz"]}
    said = Job().round(facts_of(1, roster=roster), others=mallory).document
    assert "made out to 'mainz', not to 'bonn'" in refused(tmp_path, said, 1)


# order


@pytest.mark.parametrize(
    ("order", "entry"),
    [
        ((1, 0, 2), 1),
        ((0, 2, 1), 2),
        ((2, 1, 0), 1),
        ((0, 0, 1, 2), 2),
        ((0, 1, 1, 2), 3),
        ((0, 1, 2, 2), 4),
        ((1, 2), 1),
        ((0, 2), 2),
        ((2,), 1),
    ],
)
def test_rounds_stand_in_their_order_each_once_and_none_is_missing(
    tmp_path: Path, order: tuple[int, ...], entry: int
) -> None:
    said = document()
    said["rounds"] = [said["rounds"][index] for index in order]
    assert refused(tmp_path, said, entry) == "does not follow the record before it"


@pytest.mark.parametrize("second", [1, 3, 9])
def test_signed_rounds_that_do_not_follow_one_another_are_refused(
    tmp_path: Path, second: int
) -> None:
    job = Job().round(facts_of(1)).round(facts_of(second, model_digest=digest_of(1)))
    told = refused(tmp_path, job.document, 2)
    assert told == "its round or model does not follow the one before"


def test_a_signed_round_from_another_model_is_refused(tmp_path: Path) -> None:
    job = Job().round(facts_of(1)).round(facts_of(2, model_digest=digest_of(9)))
    assert "round or model does not follow" in refused(tmp_path, job.document, 2)


@pytest.mark.parametrize("first", [0, 2])
def test_the_first_round_is_the_first(tmp_path: Path, first: int) -> None:
    said = Job().round(facts_of(1, round=first)).document
    assert "round or model does not follow" in refused(tmp_path, said, 1)


def test_two_transcripts_cannot_be_joined(tmp_path: Path) -> None:
    said, other = document(), Job().round(facts_of(1, job="job-2")).round(facts_of(2, job="job-2"))
    said["rounds"][0] = other.document["rounds"][0]
    assert "does not follow" in refused(tmp_path, said, 2)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """The result of a training job as it is downloaded."""
    folder = tmp_path / "result" / "workspace"
    folder.mkdir(parents=True)
    written(folder, document())
    (tmp_path / "rootCA.pem").write_bytes(ROOT.pem)
    return tmp_path / "result"


def verify(result: Path, *more: str) -> Result:
    root = result.parent / "rootCA.pem"
    done = CliRunner().invoke(main, ["job", "verify", str(result), "--root-ca", str(root), *more])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_the_transcript_of_a_result_is_found_wherever_it_lies(result: Path) -> None:
    path = result / "workspace" / TRANSCRIPT_FILE
    assert find_transcript(result) == find_transcript(path) == path
    assert find_transcript(result / "none.json") == result / "none.json"


def test_a_result_with_no_or_two_transcripts_is_refused(result: Path) -> None:
    path = result / "workspace" / TRANSCRIPT_FILE
    written(result, document())
    with pytest.raises(ConfigError, match="holds several transcripts; name the result of one"):
        find_transcript(result)
    for each in (path, result / TRANSCRIPT_FILE):
        each.unlink()
    with pytest.raises(ConfigError, match=r"holds no transcript\.json; name the result of one"):
        find_transcript(result)


def test_the_command_shows_every_round_that_holds(result: Path) -> None:
    done = verify(result)
    assert done.exit_code == 0
    assert "3 rounds hold" in done.stdout
    assert done.stdout.count("berlin, bonn, kiel, leuven, ulm") == ROUNDS
    assert RESEARCH_USE_ONLY in done.stdout


def test_a_program_gets_the_records_and_who_signed_them(result: Path) -> None:
    said = json.loads(verify(result, "--json").stdout)
    assert said["ok"] is True
    right = [{**e["record"], "signed_by": [*SITES]} for e in document()["rounds"]]
    assert said["rounds"] == right


def test_the_command_says_in_a_sentence_what_does_not_hold(result: Path) -> None:
    said = document()
    said["rounds"][1]["record"]["weight"] = 7
    written(result / "workspace", said)
    done = verify(result)
    assert done.exit_code == CALL_WRONG
    assert done.stdout == ""
    assert done.stderr.startswith(f"fedgestalt: {TRANSCRIPT_FILE}, entry 2: site 'berlin': its sig")


# --- anything ------------------------------------------------------------------------------------


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["0" * 64, "ab" * 64, *SITES, "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*INSTEAD, *SITES]) | st.text(), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all parts of a document, but for the notice."""
    found = [path]
    keys: Collection[Any] = ()
    if isinstance(value, dict):
        keys = value.keys() - {"notice"}
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        found += places(value[key], (*path, key))  # type: ignore[index]
    return found


PLACES = sorted(filter(None, places(document())), key=str)


@given(place=st.sampled_from(PLACES), value=junk)
@settings(deadline=None, max_examples=250)
@example(place=("certificates", PRINTS["bonn"]), value="\ud800")
@example(place=("rounds", 0, "record", "threshold"), value=0)
@example(place=("rounds", 0, "signatures"), value={"\ud800": ""})
def test_junk_anywhere_is_refused_and_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], value: object
) -> None:
    said = document()
    inner: Any = said
    for key in place[:-1]:
        inner = inner[key]
    if inner[place[-1]] == value:
        return
    inner[place[-1]] = value
    refused_somewhere(tmp_path_factory.mktemp("fuzz"), json.dumps(said))


def refused_somewhere(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError) as fault:
        check_transcript(written(folder, text), ROOT.pem)
    assert TRANSCRIPT_FILE in fault.value.where
    assert "\n" not in str(fault.value)
    str(fault.value).encode()


@given(
    said=junk
    | st.fixed_dictionaries(
        {
            "schema": st.just("fedgestalt.transcript/1"),
            "certificates": junk,
            "rounds": st.lists(
                st.fixed_dictionaries({"record": junk, "signatures": junk}) | junk, max_size=3
            ),
        }
    )
)
@settings(deadline=None)
def test_a_document_of_junk_is_refused_and_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, said: object
) -> None:
    refused_somewhere(tmp_path_factory.mktemp("fuzz"), json.dumps(said))


@given(at=st.integers(0), octets=st.binary(max_size=3), cut=st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_a_file_that_was_altered_anywhere_says_the_same_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, octets: bytes, cut: int
) -> None:
    whole = honest().encode()
    at %= len(whole)
    path = tmp_path_factory.mktemp("fuzz") / TRANSCRIPT_FILE
    path.write_bytes(whole[:at] + octets + whole[at + cut :])
    try:
        found = check_transcript(path, ROOT.pem)
    except ConfigError as fault:
        assert TRANSCRIPT_FILE in fault.where  # noqa: PT017  either is right
    else:
        right = [entry["record"] for entry in document()["rounds"]]
        assert [entry.record for entry in found] == right[: len(found)]
