"""The transcript of a training job: one record per round, signed by the sites.

A record says who took part in a sum, under which agreement, and which model came out of it; nothing
in it is private. Each names the digest of the one before. The server collects the sites' signatures
and leaves ``transcript.json`` in the job's result, where anybody who holds the consortium's root
certificate can check it, without the server.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.errors import ConfigError, PeerError
from fedgestalt.federation.job.identity import Trust, fingerprint_of
from fedgestalt.keys import digest
from fedgestalt.secagg import MINIMUM_SITES, Recipient, SessionFacts, ThreatModel
from fedgestalt.secagg.facts import session_digest

TRANSCRIPT_FILE: Final = "transcript.json"
_SCHEMA, _RECORD = "fedgestalt.transcript/1", "fedgestalt.round-record/1"
_KEYS: Final = {
    "schema": str,
    "job": str,
    "round": int,
    "attempt": int,
    "session": str,
    "agreement": str,
    "roster": dict,
    "threshold": int,
    "recipient": str,
    "cipher": str,
    "plan": str,
    "words": int,
    "survivors": list,
    "sum": str,
    "weight": (int, type(None)),
    "clipped": (int, type(None)),
    "model_before": str,
    "model_after": str,
    "previous": str,
}


def round_record(
    facts: SessionFacts,
    *,
    agreement: bytes,
    survivors: Collection[str],
    sum_digest: bytes,
    weight: int,
    clipped: int,
    model_after: bytes,
    previous: bytes,
) -> bytes:
    """The record of a round as canonical JSON; the same bytes at every party.

    Args:
        facts: of its session.
        agreement: digest of all keys and share headers of the session.
        survivors: whose updates are in the sum.
        sum_digest: SHA-256 of the sum's words as they left the server.
        weight: sum of the sites' weights; left out where the server must not learn the sum.
        clipped: number of clipped values, likewise.
        model_after: digest of the model that came out of it.
        previous: digest of the record before; empty for the first.
    """
    shown = facts.recipient is Recipient.SERVER
    record = {
        "schema": _RECORD,
        "job": facts.job,
        "round": facts.round,
        "attempt": facts.attempt,
        "session": facts.digest.hex(),
        "agreement": agreement.hex(),
        "roster": {site: fingerprint.hex() for site, fingerprint in facts.roster.items()},
        "threshold": facts.threshold,
        "recipient": str(facts.recipient),
        "cipher": facts.cipher,
        "plan": facts.plan.digest.hex(),
        "words": facts.plan.words,
        "survivors": sorted(survivors),
        "sum": sum_digest.hex(),
        "weight": weight if shown else None,
        "clipped": clipped if shown else None,
        "model_before": facts.model_digest.hex(),
        "model_after": model_after.hex(),
        "previous": previous.hex(),
    }
    return _canonical(record)


def record_digest(record: bytes) -> bytes:
    """What a site signs, and what the next record names."""
    return digest("round record", record)


@dataclass
class Transcript:
    """Records with their signatures, as the server collects them.

    Attributes:
        certificates: PEM, by fingerprint in hexadecimal: a site may get a new one.
        rounds: records, and signatures in hexadecimal by site.
    """

    certificates: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, record: bytes, signatures: Mapping[str, bytes], certificates: Mapping[str, bytes]
    ) -> None:
        """Append a round, with signatures and certificates by site."""
        self.certificates |= {
            fingerprint_of(pem).hex(): pem.decode() for pem in certificates.values()
        }
        told = {site: signature.hex() for site, signature in sorted(signatures.items())}
        self.rounds.append({"record": json.loads(record), "signatures": told})

    @property
    def last(self) -> bytes:
        """Digest of the last record; empty if there is none."""
        return record_digest(_canonical(self.rounds[-1]["record"])) if self.rounds else b""

    @property
    def model_after(self) -> bytes:
        """Digest of the model after the last round."""
        return bytes.fromhex(self.rounds[-1]["record"]["model_after"])

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": _SCHEMA,
            "notice": RESEARCH_USE_ONLY,
            "certificates": self.certificates,
            "rounds": self.rounds,
        }

    @classmethod
    def of(cls, document: object) -> Transcript:
        """Read a document back, unchecked beyond its outline.

        Raises:
            ConfigError: it is no transcript.
        """
        if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
            raise ConfigError(f"is no {_SCHEMA}", where=TRANSCRIPT_FILE)
        certificates, rounds = document.get("certificates"), document.get("rounds")
        if not isinstance(certificates, dict) or not isinstance(rounds, list):
            raise ConfigError("certificates or rounds are missing", where=TRANSCRIPT_FILE)
        return cls(certificates, rounds)

    def write(self, folder: Path) -> None:
        """Write ``transcript.json``."""
        text = json.dumps(self.document(), indent=1)
        (folder / TRANSCRIPT_FILE).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class CheckedRound:
    """A round whose record holds.

    Attributes:
        record: its fields.
        signers: sites that signed it.
    """

    record: Mapping[str, Any]
    signers: tuple[str, ...]


def find_transcript(result: Path) -> Path:
    """The transcript in a downloaded result, or ``result`` itself if it is a file.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if not result.is_dir():
        return result
    found = sorted(result.rglob(TRANSCRIPT_FILE))
    if len(found) != 1:
        what = "several transcripts" if found else f"no {TRANSCRIPT_FILE}"
        raise ConfigError(
            f"holds {what}",
            where=str(result),
            remedy="name the result of one training job, as `nvflare job download` or"
            " `fedgestalt job watch --download` leave it",
        )
    return found[0]


def check_transcript(path: Path, root: bytes) -> list[CheckedRound]:
    """Check a transcript against the consortium's root certificate.

    Of each round: the certificates are the consortium's and those of the roster; at least the
    threshold of survivors signed the record, and it is one that sites agree to; its session digest
    follows from its own facts; it names the record before; and rounds follow one another, from the
    first on. Certificates may have expired since.

    Args:
        path: of ``transcript.json``.
        root: the root certificate, PEM.

    Raises:
        ConfigError: the first thing that does not hold, with its round.
        SiteError: the root certificate is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except (ValueError, RecursionError):
        raise ConfigError("is not JSON", where=str(path)) from None
    transcript, trust = Transcript.of(document), Trust.from_root(root)
    checked: list[CheckedRound] = []
    previous = b""
    for number, entry in enumerate(transcript.rounds, 1):
        where = f"{path.name}, entry {number}"
        record, signatures = _entry(entry, where)
        _check_follows(record, checked, previous, where)
        signers = _check_signers(record, signatures, transcript.certificates, trust, where)
        previous = record_digest(_canonical(record))
        checked.append(CheckedRound(record, signers))
    if not checked:
        raise ConfigError("holds no round", where=str(path))
    return checked


def _entry(entry: object, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    record = entry.get("record") if isinstance(entry, dict) else None
    signatures = entry.get("signatures") if isinstance(entry, dict) else None
    if not isinstance(record, dict) or not isinstance(signatures, dict):
        raise ConfigError("is no record with signatures", where=where)
    if record.get("schema") != _RECORD:
        raise ConfigError(f"is no {_RECORD}", where=where)
    if record.keys() != _KEYS.keys():
        differing = sorted(record.keys() ^ _KEYS.keys())
        raise ConfigError(f"field {differing[0]!r} is missing or unknown", where=where)
    for name, kind in _KEYS.items():
        if not isinstance(record[name], kind) or isinstance(record[name], bool):  # type: ignore[arg-type]
            raise ConfigError(f"field {name!r} has the wrong type", where=where)
    if not all(isinstance(v, str) for v in [*record["survivors"], *record["roster"].values()]):
        raise ConfigError("survivors or roster have the wrong type", where=where)
    return record, signatures


def _check_follows(
    record: Mapping[str, Any], before: list[CheckedRound], previous: bytes, where: str
) -> None:
    if record["previous"] != previous.hex():
        raise ConfigError("does not follow the record before it", where=where)
    last = before[-1].record if before else {"round": 0, "model_after": record["model_before"]}
    if record["round"] != last["round"] + 1 or record["model_before"] != last["model_after"]:
        raise ConfigError("its round or model does not follow the one before", where=where)
    survivors, count = set(record["survivors"]), len(record["roster"])
    least = ThreatModel.HONEST_BUT_CURIOUS.threshold(count)
    if count < MINIMUM_SITES or record["threshold"] < least:
        raise ConfigError("no site agrees to so small a roster or threshold", where=where)
    if not survivors <= record["roster"].keys() or len(survivors) < record["threshold"]:
        raise ConfigError("its survivors are no threshold of its roster", where=where)
    try:
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
    except (ValueError, OverflowError):
        raise ConfigError("a digest or number in it cannot be read", where=where) from None
    if told.hex() != record["session"]:
        raise ConfigError("its session does not follow from its own facts", where=where)


def _check_signers(
    record: Mapping[str, Any],
    signatures: Mapping[str, str],
    certificates: Mapping[str, object],
    trust: Trust,
    where: str,
) -> tuple[str, ...]:
    if not signatures.keys() <= record["roster"].keys():
        raise ConfigError("somebody who was not in its roster has signed it", where=where)
    if len(signatures.keys() & set(record["survivors"])) < record["threshold"]:
        raise ConfigError(
            f"{len(signatures)} sites have signed it, {record['threshold']} are needed", where=where
        )
    statement = record_digest(_canonical(record))
    for site, signature in signatures.items():
        pem = certificates.get(record["roster"][site])
        encoded = pem.encode("utf-8", "replace") if isinstance(pem, str) else b""
        try:
            peer = trust.check(site, encoded, None)
            if fingerprint_of(encoded).hex() != record["roster"][site]:
                raise PeerError("its certificate is not the one of the roster", site=site)
            peer.verify(statement, bytes.fromhex(signature))
        except PeerError as error:
            raise ConfigError(str(error), where=where) from None
        except (ValueError, TypeError):
            raise ConfigError(f"the signature of {site!r} cannot be read", where=where) from None
    return tuple(sorted(signatures))


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
