"""The server's side of one session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedgestalt.errors import PeerError, ServerError
from fedgestalt.keys import CIPHERTEXT_BYTES, TAG_BYTES, PrivateKey, PublicKey, Verifier
from fedgestalt.secagg import binding
from fedgestalt.secagg.facts import SessionFacts
from fedgestalt.secagg.messages import (
    Endorsement,
    Endorsements,
    KeyList,
    KeyOffer,
    ShareDelivery,
    ShareHeader,
    ShareOffer,
    Survivors,
    UnmaskShares,
)
from fedgestalt.secagg.shamir import SHARE_BYTES, combine
from fedgestalt.secagg.site import check_header
from fedgestalt.secagg.stream import Stream, Vector, Words, add_streams


class ServerSession:
    """The server's side of one session: it relays, adds, and opens the sum of the survivors.

    Every message is checked before it is relayed, so that a wrong one is its sender's fault.

    Args:
        facts: of the session.
        peers: the checked certificates of all sites.

    Raises:
        ServerError: the facts cannot be right.
        PlanError: the sum could overflow.
    """

    def __init__(self, facts: SessionFacts, peers: Mapping[str, Verifier]) -> None:
        facts.check()
        if set(peers) != set(facts.roster):
            raise ServerError("a certificate of the roster is missing", where="session")
        self.facts, self._peers = facts, dict(peers)
        self._offers: dict[str, KeyOffer] = {}
        self._public: dict[str, PublicKey] = {}
        self._headers: dict[str, ShareHeader] = {}
        self._boxes: dict[str, Mapping[str, bytes]] = {}
        self._vectors: dict[str, Vector] = {}
        self._survivors: tuple[str, ...] = ()
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, Mapping[str, bytes]] = {}
        self._broken = ""
        self.agreement = b""
        """Digest of all keys and share headers, once all have come."""

    # 1. keys

    def accept_keys(self, site: str, offer: KeyOffer) -> None:
        """Take a site's public keys.

        Raises:
            PeerError: it is not in the roster, has sent them before, sees another session, did not
                sign them, or they are no keys of its own.
        """
        self._check(site, offer.session, self._offers)
        statement = binding.key_statement(self.facts, site, offer.mask_key, offer.channel_key)
        self._peers[site].verify(statement, offer.signature)
        taken = {k for o in self._offers.values() for k in (o.mask_key, o.channel_key)}
        if offer.mask_key == offer.channel_key or {offer.mask_key, offer.channel_key} & taken:
            raise PeerError("its keys are not its own and distinct", site=site)
        try:
            PublicKey(offer.channel_key)
            self._public[site] = PublicKey(offer.mask_key)
        except ValueError:
            raise PeerError("it signed keys that are none", site=site) from None
        self._offers[site] = offer
        if len(self._offers) == len(self.facts.roster):
            self._keys = binding.keys_digest(self.facts, self._offers)

    def key_list(self) -> KeyList:
        """Everybody's keys; raises ServerError while one is missing."""
        self._complete(self._offers, "keys")
        return KeyList(dict(self._offers))

    # 2. shares

    def accept_shares(self, site: str, offer: ShareOffer) -> None:
        """Take a site's share header and its boxes for all others.

        Raises:
            PeerError: it is not in the roster, has sent them before, sees another session, or its
                header or boxes are not right.
        """
        self._complete(self._offers, "keys")
        self._check(site, offer.session, self._headers)
        header = offer.header
        check_header(self.facts, site, header)
        self._peers[site].verify(
            binding.header_statement(self._keys, site, header), header.signature
        )
        if offer.boxes.keys() != header.boxes.keys():
            raise PeerError("its boxes are not for all other sites", site=site)
        for peer, box in offer.boxes.items():
            if binding.box_digest(self._keys, site, peer, box) != header.boxes[peer]:
                raise PeerError(f"its box for {peer} is not the one that it signed", site=site)
            extra = len(header.common_secret) + (CIPHERTEXT_BYTES if site < peer else 0)
            if len(box) != CIPHERTEXT_BYTES + 2 * SHARE_BYTES + TAG_BYTES + extra:
                raise PeerError(f"its box for {peer} has another length", site=site)
        self._headers[site], self._boxes[site] = header, dict(offer.boxes)
        if len(self._headers) == len(self.facts.roster):
            self.agreement = binding.shares_digest(self.facts, self._keys, self._headers)

    def delivery(self, site: str) -> ShareDelivery:
        """All headers and the boxes for one site; raises ServerError while one is missing."""
        self._complete(self._headers, "shares")
        self._check(site, self.facts.digest, ())
        boxes = {sender: sent[site] for sender, sent in self._boxes.items() if sender != site}
        return ShareDelivery(dict(self._headers), boxes)

    # 3. vectors

    def accept_vector(self, site: str, vector: Vector, size: int) -> None:
        """Take note that a site's masked vector is there, all of it.

        It is read once, in :meth:`total`, together with the others: one pass over all of them takes
        half the time of adding one after the other, and the sum has no state in between.

        Args:
            site: its sender.
            vector: gives its words; of an upload that is complete and does not change.
            size: how many words it has.

        Raises:
            PeerError: the site is not in the roster, has sent before, or the size does not fit the
                plan.
        """
        self._complete(self._headers, "shares")
        self._check(site, self.facts.digest, self._vectors)
        if self._survivors:
            raise PeerError("its vector came after the sum was closed", site=site)
        self._check_sound()
        if size != (words := self.facts.plan.words):
            raise PeerError(f"its vector has {size} words, the plan {words}", site=site)
        self._vectors[site] = vector

    # 4. survivors

    @property
    def arrived(self) -> frozenset[str]:
        """Sites whose vectors are there."""
        return frozenset(self._vectors)

    def close(self) -> Survivors:
        """End the sum: whoever has not sent a vector is not in it.

        Raises:
            ServerError: fewer vectors than the threshold have come; the sum stays closed for ever.
        """
        if not self._broken and len(self._vectors) < self.facts.threshold:
            self._broken = (
                f"{len(self._vectors)} of {len(self.facts.roster)} sites have sent their vectors,"
                f" {self.facts.threshold} are needed: the sum stays closed"
            )
        self._check_sound()
        self._survivors = tuple(sorted(self._vectors))
        return Survivors(self.facts.digest, self._survivors)

    def accept_endorsement(self, site: str, endorsement: Endorsement) -> None:
        """Take a survivor's signature.

        Raises:
            PeerError: it is no survivor, has signed before, or signed something else.
        """
        self._check_survivor(site, endorsement.session, self._signatures)
        statement = binding.survivors_statement(self.agreement, self._survivors)
        self._peers[site].verify(statement, endorsement.signature)
        self._signatures[site] = endorsement.signature

    def endorsements(self) -> Endorsements:
        """All signatures; raises ServerError while there are fewer than the threshold."""
        self._enough(self._signatures, "signed the survivors")
        return Endorsements(self.facts.digest, self._survivors, dict(self._signatures))

    # 5. unmask

    def accept_unmask(self, site: str, unmask: UnmaskShares) -> None:
        """Take a survivor's shares.

        Raises:
            PeerError: it is no survivor, has sent them before, or a share is not the one that its
                dealer committed to. The others' shares may still be enough.
        """
        self._check_survivor(site, unmask.session, self._shares)
        if unmask.shares.keys() != self.facts.roster.keys():
            raise PeerError("its shares are not those of the roster", site=site)
        for dealer, share in unmask.shares.items():
            what, committed = (
                ("seed share", self._headers[dealer].seed_shares)
                if dealer in self._survivors
                else ("root share", self._headers[dealer].root_shares)
            )
            if binding.commitment(what, self._keys, dealer, site, share) != committed[site]:
                raise PeerError(f"its {what} of site {dealer!r} is a wrong one", site=site)
        self._shares[site] = dict(unmask.shares)

    def total(self, *, threads: int = 1) -> Words:
        """The sum of the survivors' words; with the sites' common mask where only they learn it.

        Args:
            threads: how many share the work.

        Returns:
            (plan.words,) uint32; the session is over.

        Raises:
            ServerError: fewer shares than the threshold have come.
            PeerError: a dealer's shares do not give what it committed to; the sum stays closed.
            Exception: what a vector raises that cannot be read; the session is over.
        """
        self._check_sound()
        self._enough(self._shares, "sent their shares")
        helpers = sorted(self._shares)[: self.facts.threshold]
        streams = [
            Stream(
                binding.self_stream(self._seed_of(site, helpers), self.agreement, site),
                subtract=True,
            )
            for site in self._survivors
        ]
        for lost in sorted(self.facts.roster.keys() - set(self._survivors)):
            streams += self._pair_streams(lost, helpers)
        self._broken = "the sum was opened before"
        total = np.zeros(self.facts.plan.words, np.uint32)
        vectors = [self._checked(site) for site in self._survivors]
        add_streams(total, streams, vectors=vectors, cipher=self.facts.cipher, threads=threads)
        return total

    def _checked(self, site: str) -> Vector:
        """A survivor's vector, which gives as many words as it is asked for."""
        vector = self._vectors[site]

        def read(first: int, end: int) -> Words:
            words = vector(first, end)
            if words.shape != (end - first,) or words.dtype != np.uint32:
                what = f"the vector of site {site!r} does not have its words {first} to {end}"
                raise ServerError(what, where="session", remedy="begin a new round")
            return words

        return read

    def _seed_of(self, site: str, helpers: list[str]) -> bytes:
        seed = self._rebuild(site, helpers)
        told = binding.commitment("self seed", self._keys, site, "", seed)
        if told != self._headers[site].seed_commitment:
            raise PeerError("its shares do not give the self seed it committed to", site=site)
        return seed

    def _pair_streams(self, lost: str, helpers: list[str]) -> list[Stream]:
        """What the survivors' words hold because of a lost site, to be taken off."""
        facts, header = self.facts, self._headers[lost]
        root = self._rebuild(lost, helpers)
        private = PrivateKey(root)
        if private.public.encoded != self._offers[lost].mask_key:
            raise PeerError("its shares do not give the key that it offered", site=lost)
        later = facts.sites[facts.sites.index(lost) + 1 :]
        escrowed = binding.open_escrow(root, self._keys, header.escrow, later)
        streams = []
        for site in self._survivors:
            if lost < site:
                secret = escrowed.get(site, b"")
                told = binding.commitment("pair secret", self._keys, lost, site, secret)
                if told != header.pair_secrets[site]:
                    raise PeerError("its escrow is not what it committed to", site=lost)
            else:
                secret = private.decapsulate(self._boxes[site][lost][-CIPHERTEXT_BYTES:])
                told = binding.commitment("pair secret", self._keys, site, lost, secret)
                if told != self._headers[site].pair_secrets[lost]:
                    what = f"its pair secret with {lost} is not the one that it committed to"
                    raise PeerError(what, site=site)
            exchanged = private.exchange(self._public[site])
            key = binding.pair_stream(exchanged, secret, self.agreement, lost, site)
            streams.append(Stream(key, subtract=site < lost))
        return streams

    def _rebuild(self, dealer: str, helpers: list[str]) -> bytes:
        numbers = {site: index + 1 for index, site in enumerate(self.facts.sites)}
        try:
            return combine({numbers[site]: self._shares[site][dealer] for site in helpers})
        except ValueError:
            raise PeerError("its shares do not belong together", site=dealer) from None

    # checks

    def _check(self, site: str, session: bytes, seen: Iterable[str]) -> None:
        if site not in self.facts.roster:
            raise PeerError("it is not in the roster of this session", site=site)
        if site in seen:
            raise PeerError("it has already sent this message", site=site)
        if session != self.facts.digest:
            raise PeerError(
                "it sees another session (job, round, model, number plan, roster or threshold"
                " differ)",
                site=site,
            )

    def _check_survivor(self, site: str, session: bytes, seen: Iterable[str]) -> None:
        self._check(site, session, seen)
        if site not in self._survivors:
            raise PeerError("it is not among the survivors of this session", site=site)

    def _check_sound(self) -> None:
        if self._broken:
            raise ServerError(self._broken, where="session", remedy="begin a new round")

    def _complete(self, present: Iterable[str], what: str) -> None:
        missing = sorted(self.facts.roster.keys() - set(present))
        if missing:
            raise ServerError(f"no {what} from {', '.join(missing)}", where="session")

    def _enough(self, present: Mapping[str, object], what: str) -> None:
        if len(present) < self.facts.threshold or not self._survivors:
            raise ServerError(
                f"{len(present)} of {len(self.facts.roster)} sites have {what},"
                f" {self.facts.threshold} are needed",
                where="session",
                remedy="the sum stays closed; begin a new round",
            )
