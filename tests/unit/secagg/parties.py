"""A server and its sites in one process: test identities, and every message over the wire."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import hashlib
import hmac
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from numpy.typing import NDArray

from fedgestalt.errors import FedgestaltError, PeerError, ServerError
from fedgestalt.keys import CIPHERTEXT_BYTES, PrivateKey, PublicKey
from fedgestalt.messages import Message, from_server, from_site
from fedgestalt.secagg import (
    CountPlan,
    Endorsement,
    KeyOffer,
    NumberPlan,
    ServerSession,
    SessionFacts,
    ShareHeader,
    ShareOffer,
    SitePolicy,
    SiteSession,
    TensorPlan,
    ThreatModel,
    UnmaskShares,
    Words,
    binding,
)
from fedgestalt.secagg.stream import Stream, Vector

NAMES: Final = tuple(f"site-{i:02d}" for i in range(16))
LENIENT: Final = SitePolicy(minimum_survivors=2, threat_model=ThreatModel.HONEST_BUT_CURIOUS)
"""What a site must allow before one of three sites may be lost."""
LOST: Final = object()
"""What a wire makes of a message that does not arrive."""

Wire = Callable[[type[Message], str, dict[str, Any]], object]
"""Takes a message's kind, the site that sends or gets it, and its fields; returns what arrives."""


class Identity:
    """A site's certificate: Ed25519, always the same for a name."""

    def __init__(self, site: str) -> None:
        self.site = site
        self._key = ed25519.Ed25519PrivateKey.from_private_bytes(fingerprint("key of " + site))

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)

    def verify(self, statement: bytes, signature: bytes) -> None:
        try:
            self._key.public_key().verify(signature, statement)
        except InvalidSignature:
            raise PeerError("its signature is wrong", site=self.site) from None


class QuickIdentity(Identity):
    """The same for tests of many messages, a hundred times faster: a MAC that all can check."""

    def sign(self, statement: bytes) -> bytes:
        return hmac.digest(self.site.encode(), statement, "sha512")

    def verify(self, statement: bytes, signature: bytes) -> None:
        if self.sign(statement) != signature:
            raise PeerError("its signature is wrong", site=self.site)


def fingerprint(name: str) -> bytes:
    """32 bytes that are always the same for a name."""
    return hashlib.sha256(name.encode()).digest()


def plan_for(sites: int, words: int = 79) -> NumberPlan:
    """A plan with every kind of content; ``words`` is the length of a masked vector."""
    tensors = TensorPlan("encoder", (words - 39,), 0), TensorPlan("classes", (6, 5), -3, "images")
    return NumberPlan(sites, 100, tensors, (CountPlan("images", 6, 100),))


def facts_for(sites: int | Collection[str], threshold: int = 0, **changes: Any) -> SessionFacts:
    """A session of some sites; with the threshold against a malicious server if none is given."""
    names = NAMES[:sites] if isinstance(sites, int) else sites
    facts = SessionFacts(
        job="job",
        round=1,
        attempt=1,
        model_digest=bytes(32),
        plan=plan_for(len(names)),
        roster={site: fingerprint(site) for site in names},
        threshold=threshold or ThreatModel.MALICIOUS.threshold(len(names)),
    )
    return replace(facts, **changes)


def updates_for(facts: SessionFacts, seed: int = 0) -> dict[str, Words]:
    """An encoded update for each site."""
    rng = np.random.default_rng(seed)
    encoded = {}
    for site in facts.sites:
        update = {
            tensor.name: rng.normal(0, 2.0**tensor.exponent / 2, tensor.shape).astype(np.float32)
            for tensor in facts.plan.tensors
        }
        counts = {count.name: rng.integers(0, 101, count.size) for count in facts.plan.counts}
        encoded[site] = facts.plan.encode(update, int(rng.integers(1, 101)), counts)
    return encoded


class Parties:
    """All state machines of one session, and the wire between them.

    Args:
        facts: what the server and all sites believe.
        told: what some sites believe instead.
        policy: of all sites.
        wire: may change or lose any message on its way.
        identity: makes the sites' certificates.
        seed: of the updates.
    """

    def __init__(
        self,
        facts: SessionFacts,
        *,
        told: Mapping[str, SessionFacts] | None = None,
        policy: SitePolicy = LENIENT,
        wire: Wire | None = None,
        identity: type[Identity] = Identity,
        seed: int = 0,
    ) -> None:
        self.facts, self.wire = facts, wire or (lambda kind, site, fields: fields)
        self.identities = {site: identity(site) for site in facts.sites}
        self.server = ServerSession(facts, self.identities)
        self.sites = {
            site: SiteSession(
                site,
                (told or {}).get(site, facts),
                self.identities[site],
                {peer: key for peer, key in self.identities.items() if peer != site},
                policy=policy,
            )
            for site in facts.sites
        }
        self.plain = updates_for(facts, seed)
        self.masked: dict[str, Words] = {}
        self._begun = 0

    def copy(self) -> Parties:
        """The session as it stands, to go on with apart from this one."""
        twin = copied(self)
        twin.server = copied(self.server)
        twin.sites = {site: copied(session) for site, session in self.sites.items()}
        return twin

    def up(self, site: str, message: Message) -> None:
        """Send a message from a site to the server."""
        kind = type(message)
        fields = self.wire(kind, site, message.to_fields())
        if fields is not LOST:
            accept(self.server, site, kind.from_fields(fields, from_site(site)))

    def down(self, site: str, message: Message) -> Any:
        """Send a message from the server to a site; returns it as it arrives."""
        kind = type(message)
        fields = self.wire(kind, site, message.to_fields())
        return fields if fields is LOST else kind.from_fields(fields, from_server)

    def offer_keys(self, *, without: Collection[str] = ()) -> None:
        for site in self._all(without):
            self.up(site, self.sites[site].offer_keys())

    def share(self, *, without: Collection[str] = ()) -> None:
        keys = self.server.key_list()
        for site in self._all(without):
            if (message := self.down(site, keys)) is not LOST:
                self.up(site, self.sites[site].share(message))

    def receive(self, *, without: Collection[str] = ()) -> None:
        for site in self._all(without):
            if (message := self.down(site, self.server.delivery(site))) is not LOST:
                self.sites[site].receive(message)

    def mask(self, *, without: Collection[str] = ()) -> None:
        for site in self._all(without):
            words = self.plain[site].copy()
            self.sites[site].mask(words)
            self.masked[site] = words

    def upload(self, *, without: Collection[str] = ()) -> None:
        for site in sorted(self.masked.keys() - set(without)):
            self.server.accept_vector(site, vector_of(self.masked[site]), self.masked[site].size)

    def endorse(self, *, without: Collection[str] = ()) -> None:
        survivors = self.server.close()
        for site in survivors.sites:
            if site not in without and (message := self.down(site, survivors)) is not LOST:
                self.up(site, self.sites[site].endorse(message))

    def unmask(self, *, without: Collection[str] = ()) -> None:
        endorsements = self.server.endorsements()
        for site in endorsements.sites:
            if site not in without and (message := self.down(site, endorsements)) is not LOST:
                self.up(site, self.sites[site].unmask(message))

    def until(self, step: Callable[..., None]) -> Parties:
        """Go on until a step, of which nothing has happened then."""
        begun, self._begun = self._begun, STEPS.index(step)
        for each in STEPS[begun : self._begun]:
            each(self)
        return self

    def sum_of(self, sites: Collection[str]) -> Words:
        """What the sum of these sites must be, from their plain words."""
        return np.add.reduce([self.plain[site] for site in sites], dtype=np.uint32)

    @property
    def keys(self) -> bytes:
        """Digest of the key list."""
        return binding.keys_digest(self.facts, self.server.key_list().offers)

    def _all(self, without: Collection[str]) -> list[str]:
        return [site for site in self.facts.sites if site not in without]


STEPS: Final = (
    Parties.offer_keys,
    Parties.share,
    Parties.receive,
    Parties.mask,
    Parties.upload,
    Parties.endorse,
    Parties.unmask,
)


def accept(server: ServerSession, site: str, message: Message) -> None:
    """Give a decoded message to the server."""
    {
        KeyOffer: server.accept_keys,
        ShareOffer: server.accept_shares,
        Endorsement: server.accept_endorsement,
        UnmaskShares: server.accept_unmask,
    }[type(message)](site, message)


def vector_of(words: Words) -> Vector:
    """A vector as the server reads it."""
    return lambda first, end: words[first:end]


def copied(machine: Any) -> Any:
    """A state machine as it stands: what it holds is immutable, or one container deep."""
    twin = copy.copy(machine)
    for name, value in vars(machine).items():
        if isinstance(value, dict | list | set | np.ndarray):
            setattr(twin, name, value.copy())
    return twin


class Lost(enum.Enum):
    """When a site falls silent."""

    BEFORE_KEYS = enum.auto()
    AFTER_KEYS = enum.auto()
    AFTER_SHARES = enum.auto()
    IN_MID_UPLOAD = enum.auto()
    AFTER_UPLOAD = enum.auto()
    BEFORE_UNMASK = enum.auto()


EARLY: Final = (Lost.BEFORE_KEYS, Lost.AFTER_KEYS)
"""Costs a new session."""
LATE: Final = tuple(Lost)[2:]
"""Costs the site's part in the sum, if its vector has not arrived, and nothing else."""

Losses = Mapping[str, Lost]


@dataclass(frozen=True)
class Opened:
    """An opened sum, and the parties behind it."""

    total: Words
    survivors: tuple[str, ...]
    parties: Parties

    @property
    def is_exact(self) -> bool:
        """The sum has the bits of the survivors' sum, and says the same."""
        plan, exact = self.parties.facts.plan, self.parties.sum_of(self.survivors)
        if not np.array_equal(self.total, exact):
            return False
        said, right = plan.decode(self.total), plan.decode(exact)
        return (
            all(np.array_equal(said.mean[name], right.mean[name]) for name in right.mean)
            and all(np.array_equal(said.counts[name], right.counts[name]) for name in right.counts)
            and (said.weight, dict(said.clipped)) == (right.weight, dict(right.clipped))
        )


def open_sum(parties: Parties, losses: Losses | None = None) -> Opened:
    """Go on from a session whose shares are dealt, while sites are lost; leaves it as it stands.

    Where all sites have masked their vectors already, those that are lost before just do not send.
    """
    parties, gone = parties.copy(), functools.partial(_gone, losses or {})
    if not parties.masked:
        parties.receive(without=gone(Lost.AFTER_SHARES))
        parties.mask(without=gone(Lost.AFTER_SHARES))
    for site in gone(Lost.IN_MID_UPLOAD) - gone(Lost.AFTER_SHARES):
        part = parties.masked[site][:50]
        with refused(PeerError, "its vector has 50 words", by=site):
            parties.server.accept_vector(site, vector_of(part), part.size)
    parties.upload(without=gone(Lost.IN_MID_UPLOAD))
    parties.endorse(without=gone(Lost.AFTER_UPLOAD))
    parties.unmask(without=gone(Lost.BEFORE_UNMASK))
    return Opened(parties.server.total(), tuple(sorted(parties.server.arrived)), parties)


def open_round(facts: SessionFacts, threat: ThreatModel, losses: Losses | None = None) -> Opened:
    """A whole round: whoever is lost early costs a new session of those that remain."""
    parties = Parties(facts)
    for when, step, then, what in (
        (Lost.BEFORE_KEYS, parties.offer_keys, parties.share, "keys"),
        (Lost.AFTER_KEYS, parties.share, parties.receive, "shares"),
    ):
        lost = {site for site in facts.sites if (losses or {}).get(site) is when}
        step(without=lost)
        if lost:
            with refused(ServerError, f"no {what} from {', '.join(sorted(lost))}"):
                then()
            return open_round(begun_again(facts, threat, lost), threat, losses)
    return open_sum(parties, {s: at for s, at in (losses or {}).items() if s in facts.roster})


def begun_again(
    facts: SessionFacts, threat: ThreatModel, without: Collection[str] = ()
) -> SessionFacts:
    """The facts of the round's next session, among those that remain."""
    roster = {site: digest for site, digest in facts.roster.items() if site not in without}
    return replace(
        facts,
        attempt=facts.attempt + 1,
        plan=plan_for(len(roster), facts.plan.words),
        roster=roster,
        threshold=threat.threshold(len(roster)),
    )


def _gone(losses: Losses, now: Lost) -> set[str]:
    """Sites that are silent by now."""
    return {site for site, when in losses.items() if when.value <= now.value}


@contextlib.contextmanager
def refused(kind: type[FedgestaltError], says: str, *, by: str = "") -> Iterator[None]:
    """Something is refused with exactly this class, these words and, as culprit, this site."""
    with pytest.raises(FedgestaltError) as caught:
        yield
    assert type(caught.value) is kind, caught.value
    assert says in str(caught.value)
    assert getattr(caught.value, "site", "") == by


def looks_uniform(words: NDArray[np.uint32]) -> bool:
    """Chi-square over the bytes; a uniform vector fails once in a hundred billion."""
    octets = words.astype("<u4").tobytes()
    counts = np.bincount(np.frombuffer(octets, np.uint8), minlength=256)
    expected = len(octets) / 256
    return float(((counts - expected) ** 2).sum() / expected) < 430


# --- misbehaviour --------------------------------------------------------------------------------


def altering(kind: type[Message], at: str, change: Callable[[dict[str, Any]], object]) -> Wire:
    """A wire that alters one message: that of this kind, from or to this site."""

    def wire(came: type[Message], site: str, fields: dict[str, Any]) -> object:
        return change(fields) if (came, site) == (kind, at) else fields

    return wire


def flipped(content: bytes, at: int = 0) -> bytes:
    """The same bytes but for one bit."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def some_keys() -> tuple[bytes, bytes]:
    """A mask key and a channel key of nobody in the roster."""
    mask, channel = (PrivateKey(fingerprint(use)).public.encoded for use in ("mask", "channel"))
    return mask, channel


def signed_keys(parties: Parties, site: str, mask_key: bytes, channel_key: bytes) -> KeyOffer:
    """What a site that chose these keys itself would offer."""
    statement = binding.key_statement(parties.facts, site, mask_key, channel_key)
    signature = parties.identities[site].sign(statement)
    return KeyOffer(parties.facts.digest, mask_key, channel_key, signature)


def signed_header(parties: Parties, site: str, header: ShareHeader, **changes: Any) -> ShareHeader:
    """A header that a site has changed itself."""
    changed = replace(header, **changes)
    statement = binding.header_statement(parties.keys, site, changed)
    return replace(changed, signature=parties.identities[site].sign(statement))


def deal_with_lies(parties: Parties, dealer: str, **instead: Any) -> ShareOffer:
    """What a site deals that has other functions, by their names in :mod:`.site`."""
    keys = parties.server.key_list()
    with pytest.MonkeyPatch.context() as patch:
        for name, function in instead.items():
            patch.setattr(f"fedgestalt.secagg.site.{name.replace('__', '.')}", function)
        return parties.sites[dealer].share(keys)


def pair_streams_of(
    parties: Parties, site: str, root: bytes, peers: tuple[str, ...]
) -> list[Stream]:
    """What takes the pair streams off a vector, for whoever has its site's root."""
    private, server, streams = PrivateKey(root), parties.server, []
    later = parties.facts.sites[parties.facts.sites.index(site) + 1 :]
    escrow = server.delivery(site).headers[site].escrow
    escrowed = binding.open_escrow(root, parties.keys, escrow, later)
    for peer in peers:
        ciphertext = server.delivery(site).boxes[peer][-CIPHERTEXT_BYTES:]
        secret = escrowed.get(peer) or private.decapsulate(ciphertext)
        exchanged = private.exchange(PublicKey(server.key_list().offers[peer].mask_key))
        key = binding.pair_stream(exchanged, secret, server.agreement, site, peer)
        streams.append(Stream(key, subtract=site < peer))
    return streams
