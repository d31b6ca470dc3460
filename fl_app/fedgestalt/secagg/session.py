"""One round of secure aggregation, as two state machines without I/O.

The rules:

- Every site computes the session digest itself, from the job, the attempt, the round, the global
  model, the number plan and the roster. Two sites that were told different things cannot agree on a
  mask.
- A site takes part only with the whole roster and with at least ``minimum_sites`` sites.
- Mask keys are fresh for every session and come from the operating system.
- For a pair i < j the streams cancel: i adds, j subtracts. Without all other sites' streams a
  masked vector is uniformly random.
- One session masks one vector, ever: the difference of two would be somebody's update.
- The server adds a vector only when it is complete and fits the plan.

What this protects, and what not: the server, following the protocol, learns the sum and nothing
else. Keys are not yet signed, so a server that *replaces* keys is not detected; and a site that
leaves in mid-round stops the round.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedgestalt.errors import PeerError, ServerError, SiteError
from fedgestalt.messages import Message, array, octets, octets_by_site
from fedgestalt.secagg.plan import Aggregate, NumberPlan, Words
from fedgestalt.secagg.stream import add_stream

MINIMUM_SITES: Final = 3
"""With two sites each could subtract its own update from the sum and see the other's."""

Entropy = Callable[[int], bytes]


@dataclass(frozen=True)
class SessionFacts:
    """What all sites of a round must agree on.

    Attributes:
        job: the job's id.
        attempt: which submission of the job this is.
        round: counted from 1.
        model_digest: of the global model that the updates are deltas to, 32 bytes.
        plan: the number plan.
        roster: all sites of the round, sorted.
    """

    job: str
    attempt: int
    round: int
    model_digest: bytes
    plan: NumberPlan
    roster: tuple[str, ...]

    @property
    def digest(self) -> bytes:
        """SHA-256 over the facts, 32 bytes."""
        head = f"secagg/1|{self.job}|{self.attempt}|{self.round}".encode()
        names = [name.encode() for name in self.roster]
        return _hash(head, self.model_digest, self.plan.digest, *names)


@dataclass(frozen=True)
class KeyOffer(Message):
    """Site to server: a mask key for one session."""

    schema: ClassVar[str] = "fedgestalt.secagg.key-offer/1"
    session: bytes = octets(32)
    public_key: bytes = octets(32)


@dataclass(frozen=True)
class KeyRoster(Message):
    """Server to sites: everybody's key."""

    schema: ClassVar[str] = "fedgestalt.secagg.key-roster/1"
    public_keys: Mapping[str, bytes] = octets_by_site(32)


@dataclass(frozen=True)
class MaskedVector(Message):
    """Site to server: the update in the ring, under all pairwise masks."""

    schema: ClassVar[str] = "fedgestalt.secagg.masked-vector/1"
    session: bytes = octets(32)
    words: NDArray[np.uint32] = array("uint32", 1)


class SiteSession:
    """One site's side of one round: :meth:`offer_key`, then :meth:`mask`, once each.

    Args:
        site: this site's name.
        facts: what this site was told about the round.
        minimum_sites: this site's own policy.
        entropy: returns that many random bytes; only tests replace it.

    Raises:
        SiteError: this site's policy forbids the round.
        ServerError: the roster cannot be right.
    """

    def __init__(
        self,
        site: str,
        facts: SessionFacts,
        *,
        minimum_sites: int = MINIMUM_SITES,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        roster = facts.roster
        if list(roster) != sorted(set(roster)) or site not in roster:
            raise ServerError(
                "the roster is unsorted, repeats a site or lacks this one", where=site
            )
        if len(roster) != facts.plan.sites:
            raise ServerError(
                f"the number plan is for {facts.plan.sites} sites, the roster has {len(roster)}",
                where=site,
            )
        if len(roster) < minimum_sites:
            raise SiteError(
                f"{len(roster)} sites take part, this site's policy asks for {minimum_sites}",
                where=site,
                remedy="wait for more sites: with fewer, single updates could be told from the sum",
            )
        facts.plan.check()
        self._site, self._facts = site, facts
        self._private: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(entropy(32))
        self._public = self._private.public_key().public_bytes_raw()

    def offer_key(self) -> KeyOffer:
        """The public key for this session."""
        return KeyOffer(self._facts.digest, self._public)

    def mask(self, keys: KeyRoster, words: Words) -> MaskedVector:
        """Mask an encoded update; the session ends with it.

        Args:
            keys: the keys of the whole roster, this site's own included.
            words: from :meth:`NumberPlan.encode`; not changed.

        Raises:
            ServerError: the keys are not those of the roster.
            PeerError: a peer's key is degenerate.
            SiteError: this session has masked a vector before.
        """
        facts = self._facts
        if self._private is None:
            raise SiteError("this session has already masked a vector", where=self._site)
        if tuple(sorted(keys.public_keys)) != facts.roster:
            raise ServerError("the keys are not those of the agreed roster", where=self._site)
        if keys.public_keys[self._site] != self._public:
            raise ServerError("this site's own key came back altered", where=self._site)
        if len(set(keys.public_keys.values())) != len(facts.roster):
            raise ServerError("two sites have the same key", where=self._site)
        if words.shape != (facts.plan.words,) or words.dtype != np.uint32:
            raise SiteError("the vector does not fit the number plan", where=self._site)
        private, self._private = self._private, None
        masked = words.copy()
        for peer in facts.roster:
            if peer != self._site:
                key = _pair_key(private, keys.public_keys[peer], facts, self._site, peer)
                add_stream(masked, key, subtract=self._site > peer)
        return MaskedVector(facts.digest, masked)


class ServerSession:
    """The server's side of one round: collects keys, then vectors, then gives the sum."""

    def __init__(self, facts: SessionFacts) -> None:
        self._facts = facts
        self._keys: dict[str, bytes] = {}
        self._total = np.zeros(facts.plan.words, np.uint32)
        self._arrived: set[str] = set()

    def accept_key(self, site: str, offer: KeyOffer) -> None:
        """Take a site's key.

        Raises:
            PeerError: the site is not in the roster, has offered before, or sees another session.
        """
        self._check(site, offer.session, self._keys.keys())
        if offer.public_key in self._keys.values():
            raise PeerError("its key equals another site's", site=site)
        self._keys[site] = offer.public_key

    def key_roster(self) -> KeyRoster:
        """Everybody's keys.

        Raises:
            ServerError: a key is still missing.
        """
        self._complete(self._keys.keys(), "key")
        return KeyRoster(dict(self._keys))

    def accept_vector(self, site: str, vector: MaskedVector) -> None:
        """Add a site's masked vector to the sum.

        Raises:
            PeerError: the site is not in the roster, has sent before, sees another session, or the
                vector does not fit the plan. The sum is unchanged then.
        """
        self._check(site, vector.session, self._arrived)
        if vector.words.shape != self._total.shape:
            raise PeerError(
                f"its vector has {vector.words.size} words, the plan {self._total.size}", site=site
            )
        np.add(self._total, vector.words, out=self._total)
        self._arrived.add(site)

    def aggregate(self) -> Aggregate:
        """The weighted mean of all updates.

        Raises:
            ServerError: a vector is still missing; the masks do not cancel without it.
        """
        self._complete(self._arrived, "vector")
        return self._facts.plan.decode(self._total)

    def _check(self, site: str, session: bytes, seen: object) -> None:
        if site not in self._facts.roster:
            raise PeerError("it is not in the roster of this round", site=site)
        if site in seen:  # type: ignore[operator]
            raise PeerError("it has already sent this message", site=site)
        if session != self._facts.digest:
            raise PeerError(
                "it sees another session (job, round, model, number plan or roster differ)",
                site=site,
            )

    def _complete(self, present: object, what: str) -> None:
        missing = [site for site in self._facts.roster if site not in present]  # type: ignore[operator]
        if missing:
            raise ServerError(f"no {what} from {', '.join(missing)}", where="server")


def _hash(*parts: bytes) -> bytes:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.digest()


def _pair_key(
    private: X25519PrivateKey, peer_key: bytes, facts: SessionFacts, site: str, peer: str
) -> bytes:
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(peer_key))
    except ValueError:
        raise PeerError("its key is degenerate", site=peer) from None
    first, second = sorted((site, peer))
    info = _hash(b"fedgestalt pairwise mask/1", first.encode(), second.encode())
    return HKDF(hashes.SHA256(), 32, salt=facts.digest, info=info).derive(shared)
