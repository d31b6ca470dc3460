"""A site's side of one session."""

from __future__ import annotations

import enum
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedgestalt.errors import FedgestaltError, PeerError, ServerError, SiteError
from fedgestalt.keys import (
    CIPHERTEXT_BYTES,
    Entropy,
    PrivateKey,
    PublicKey,
    Signer,
    Verifier,
    seal,
    unseal,
)
from fedgestalt.secagg import binding
from fedgestalt.secagg.facts import Recipient, SessionFacts, SitePolicy
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
from fedgestalt.secagg.shamir import SECRET_BYTES, SHARE_BYTES, split
from fedgestalt.secagg.stream import Stream, Words, add_streams

_Shares = tuple[bytes, bytes]
"""Of one dealer's self seed, and of its root."""


class _Step(enum.IntEnum):
    CLOSED, OPEN, OFFERED, SHARED, RECEIVED, MASKED, ENDORSED, DONE = range(-1, 7)


class SiteSession:
    """One site's side of one session; each method once, in the order in which they stand here.

    A method that fails, or is called out of order, closes the session for good.

    Args:
        site: this site's name.
        facts: what this site was told about the session, and what it knows itself.
        signer: this site's certificate key.
        peers: the checked certificates of all other sites.
        policy: this site's own.
        entropy: returns that many random bytes; only tests replace it.

    Raises:
        SiteError: this site's policy forbids the session.
        ServerError: the session cannot be right.
        PlanError: the sum could overflow.
    """

    def __init__(
        self,
        site: str,
        facts: SessionFacts,
        signer: Signer,
        peers: Mapping[str, Verifier],
        *,
        policy: SitePolicy | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        if site not in facts.roster or set(facts.roster) - {site} != set(peers):
            raise ServerError("the roster is not the one whose certificates came", where=site)
        facts.check()
        self._policy = policy or SitePolicy()
        self._policy.check(site, facts)
        self._site, self._facts, self._signer, self._peers = site, facts, signer, dict(peers)
        self._index = facts.sites.index(site)
        self._step = _Step.OPEN
        self._root, self._seed = entropy(SECRET_BYTES), entropy(SECRET_BYTES)
        self._mask_key, self._channel_key = PrivateKey(self._root), PrivateKey(entropy(32))
        leads = facts.recipient is Recipient.SITES and self._index == 0
        self._common = entropy(SECRET_BYTES) if leads else b""
        self._entropy = entropy
        self._kem_secrets: dict[str, bytes] = {}
        self._held: dict[str, _Shares] = {}
        self._streams: list[Stream] = []
        self._survivors: tuple[str, ...] = ()
        self.agreement = b""
        """Digest of all keys and share headers, once :meth:`receive` has accepted them."""

    # 1. keys

    def offer_keys(self) -> KeyOffer:
        """This site's public keys for the session."""
        self._enter(_Step.OFFERED)
        keys = self._mask_key.public.encoded, self._channel_key.public.encoded
        statement = binding.key_statement(self._facts, self._site, *keys)
        self._offer = KeyOffer(self._facts.digest, *keys, self._signer.sign(statement))
        self._step = _Step.OFFERED
        return self._offer

    # 2. shares

    def share(self, keys: KeyList) -> ShareOffer:
        """Deal shares of this site's secrets, once everybody's keys are known.

        Raises:
            ServerError: the list is not the roster's, or holds a key that its owner did not sign.
            PeerError: a peer signed another session, or keys that are none.
        """
        self._enter(_Step.SHARED)
        facts, me = self._facts, self._site
        self._check_roster(keys.offers, "keys")
        if keys.offers[me] != self._offer:
            raise ServerError("this site's own keys came back altered", where=me)
        self._public = {site: self._peer_keys(site, keys.offers[site]) for site in self._peers}
        every = [k for o in keys.offers.values() for k in (o.mask_key, o.channel_key)]
        if len(set(every)) != len(every):
            raise ServerError("a key occurs twice in the list", where=me)
        self._keys = binding.keys_digest(facts, keys.offers)
        count, threshold = len(facts.sites), facts.threshold
        seed_shares = split(self._seed, threshold, count, self._entropy)
        root_shares = split(self._root, threshold, count, self._entropy)
        self._held[me] = seed_shares[self._index], root_shares[self._index]
        boxes, digests = {}, {}
        for index, peer in enumerate(facts.sites):
            if peer != me:
                boxes[peer] = self._box(peer, seed_shares[index] + root_shares[index])
                digests[peer] = binding.box_digest(self._keys, me, peer, boxes[peer])
        later = {peer: self._kem_secrets[peer] for peer in facts.sites[self._index + 1 :]}
        header = ShareHeader(
            seed_commitment=self._commit("self seed", "", self._seed),
            seed_shares=self._commit_each("seed share", facts.sites, seed_shares),
            root_shares=self._commit_each("root share", facts.sites, root_shares),
            pair_secrets=self._commit_each("pair secret", list(later), list(later.values())),
            escrow=binding.seal_escrow(self._root, self._keys, later),
            boxes=digests,
            common_secret=self._commit("common secret", "", self._common) if self._common else b"",
            signature=bytes(64),
        )
        statement = binding.header_statement(self._keys, me, header)
        self._header = replace(header, signature=self._signer.sign(statement))
        self._step = _Step.SHARED
        return ShareOffer(facts.digest, self._header, boxes)

    def _peer_keys(self, site: str, offer: KeyOffer) -> tuple[PublicKey, PublicKey]:
        keys = offer.mask_key, offer.channel_key
        if offer.session != self._facts.digest:
            raise ServerError(f"the keys of site {site!r} are of another session", where=self._site)
        _signed(
            self._peers[site],
            binding.key_statement(self._facts, site, *keys),
            offer.signature,
            f"the keys of site {site!r} do not carry its signature for this session",
            self._site,
        )
        try:
            return PublicKey(keys[0]), PublicKey(keys[1])
        except ValueError:
            raise PeerError("it signed keys that are none", site=site) from None

    def _box(self, peer: str, shares: bytes) -> bytes:
        mask_key, channel_key = self._public[peer]
        secret, ciphertext = channel_key.encapsulate()
        exchanged = self._channel_key.exchange(channel_key)
        key, context = binding.channel(self._keys, self._site, peer, exchanged, secret, ciphertext)
        box = ciphertext + seal(key, shares + self._common, context)
        if self._site < peer:
            self._kem_secrets[peer], for_mask = mask_key.encapsulate()
            box += for_mask
        return box

    # 3. masks

    def receive(self, delivery: ShareDelivery) -> None:
        """Open the boxes and derive the masks.

        Raises:
            ServerError: a header or box is not what its sender signed.
            PeerError: a peer's shares, secrets or boxes are not what its header says.
        """
        self._enter(_Step.RECEIVED)
        facts, me = self._facts, self._site
        self._check_roster(delivery.headers, "share headers")
        if delivery.headers[me] != self._header:
            raise ServerError("this site's own share header came back altered", where=me)
        if delivery.boxes.keys() != self._peers.keys():
            raise ServerError("the boxes are not those of all other sites", where=me)
        for peer in self._peers:
            self._open(peer, delivery.headers[peer], delivery.boxes[peer])
        shares = self.agreement = binding.shares_digest(facts, self._keys, delivery.headers)
        self._streams = [Stream(binding.self_stream(self._seed, shares, me))]
        for peer, (mask_key, _) in self._public.items():
            exchanged = self._mask_key.exchange(mask_key)
            key = binding.pair_stream(exchanged, self._kem_secrets[peer], shares, me, peer)
            self._streams.append(Stream(key, subtract=me > peer))
        if self._common:
            self._streams.append(Stream(binding.common_stream(self._common, shares, me)))
        self._root = self._seed = b""
        self._kem_secrets.clear()
        self._step = _Step.RECEIVED

    def _open(self, peer: str, header: ShareHeader, box: bytes) -> None:
        me = self._site
        _signed(
            self._peers[peer],
            binding.header_statement(self._keys, peer, header),
            header.signature,
            f"the share header of site {peer!r} does not carry its signature for these keys",
            me,
        )
        check_header(self._facts, peer, header)
        if binding.box_digest(self._keys, peer, me, box) != header.boxes[me]:
            raise ServerError(f"the box of site {peer!r} is not the one that it signed", where=me)
        leads = bool(header.common_secret)
        sealed_end = len(box) - (CIPHERTEXT_BYTES if peer < me else 0)
        ciphertext, sealed = box[:CIPHERTEXT_BYTES], box[CIPHERTEXT_BYTES:sealed_end]
        exchanged = self._channel_key.exchange(self._public[peer][1])
        secret = self._channel_key.decapsulate(ciphertext)
        key, context = binding.channel(self._keys, peer, me, exchanged, secret, ciphertext)
        plain = unseal(key, sealed, context)
        if plain is None or len(plain) != 2 * SHARE_BYTES + SECRET_BYTES * leads:
            raise PeerError("its box cannot be opened", site=peer)
        seed_share, root_share = plain[:SHARE_BYTES], plain[SHARE_BYTES : 2 * SHARE_BYTES]
        for what, share, committed in (
            ("seed share", seed_share, header.seed_shares[me]),
            ("root share", root_share, header.root_shares[me]),
        ):
            if binding.commitment(what, self._keys, peer, me, share) != committed:
                raise PeerError(f"its {what} is not the one that it committed to", site=peer)
        self._held[peer] = seed_share, root_share
        if peer < me:
            self._kem_secrets[peer] = self._mask_key.decapsulate(box[sealed_end:])
            told = binding.commitment("pair secret", self._keys, peer, me, self._kem_secrets[peer])
            if told != header.pair_secrets[me]:
                raise PeerError("its pair secret is not the one that it committed to", site=peer)
        if leads:
            self._common = plain[2 * SHARE_BYTES :]
            told = binding.commitment("common secret", self._keys, peer, "", self._common)
            if told != header.common_secret:
                raise PeerError("its common secret is not the one that it committed to", site=peer)

    def mask(self, words: Words, *, threads: int = 1) -> None:
        """Mask an encoded update in place; the plain words are gone afterwards.

        Args:
            words: (plan.words,) uint32, from :meth:`NumberPlan.encode`.
            threads: how many may work on it.

        Raises:
            SiteError: the vector does not fit the plan; another one may.
            ServerError: this session has masked one before.
        """
        if not self._fits(words):
            raise SiteError("the vector does not fit the number plan", where=self._site)
        self._enter(_Step.MASKED)
        streams, self._streams = self._streams, []
        add_streams(words, streams, cipher=self._facts.cipher, threads=threads)
        self._step = _Step.MASKED

    # 4. survivors

    def endorse(self, survivors: Survivors) -> Endorsement:
        """Sign whose vectors are in the sum; one set per session, ever.

        Raises:
            ServerError: the set cannot be right, or another one came before.
            SiteError: it is smaller than this site's policy asks for.
        """
        self._enter(_Step.ENDORSED)
        facts, sites = self._facts, survivors.sites
        if survivors.session != facts.digest:
            raise ServerError("the survivors are those of another session", where=self._site)
        self._check_survivors(sites)
        if self._site not in sites:
            raise ServerError(
                "this site has sent its vector and is not among the survivors", where=self._site
            )
        if len(sites) < self._policy.minimum_survivors:
            raise SiteError(
                f"{len(sites)} sites are left in the sum, this site's policy asks for"
                f" {self._policy.minimum_survivors}",
                where=self._site,
                remedy="nothing was opened; the job can go on when the others are back",
            )
        self._survivors = tuple(sites)
        statement = binding.survivors_statement(self.agreement, sites)
        self._endorsement = self._signer.sign(statement)
        self._step = _Step.ENDORSED
        return Endorsement(facts.digest, self._endorsement)

    # 5. unmask

    def unmask(self, endorsements: Endorsements) -> UnmaskShares:
        """Give up the shares that open the sum over the survivors, and nothing else.

        Raises:
            ServerError: fewer than the threshold have signed these survivors, or a signature is
                not for them.
        """
        self._enter(_Step.DONE)
        facts, me = self._facts, self._site
        if endorsements.session != facts.digest or tuple(endorsements.sites) != self._survivors:
            raise ServerError("the survivors are not those that this site signed", where=me)
        if not endorsements.signatures.keys() <= set(self._survivors):
            raise ServerError("a signature is not of a survivor", where=me)
        if len(endorsements.signatures) < facts.threshold:
            raise ServerError(
                f"{len(endorsements.signatures)} survivors have signed, the threshold is"
                f" {facts.threshold}",
                where=me,
            )
        statement = binding.survivors_statement(self.agreement, self._survivors)
        for site, signature in endorsements.signatures.items():
            if site == me:
                if signature != self._endorsement:
                    raise ServerError("this site's own signature came back altered", where=me)
                continue
            _signed(
                self._peers[site],
                statement,
                signature,
                f"the signature of site {site!r} is not for the survivors that this site signed",
                me,
            )
        shares = {
            site: seed if site in self._survivors else root
            for site, (seed, root) in self._held.items()
        }
        self._held.clear()
        self._step = _Step.DONE
        return UnmaskShares(facts.digest, shares)

    # after the session

    def unveil(self, total: Words, survivors: Sequence[str], *, threads: int = 1) -> None:
        """Take the sites' common mask off the sum, in place, where only sites learn the sum.

        Raises:
            ServerError: the survivors are not those that this site signed, or, if it signed none,
                could not be; or the sum does not fit the plan.
        """
        if not self._common or self._step < _Step.MASKED:
            raise self._out_of_order()
        if self._step >= _Step.ENDORSED and tuple(survivors) != self._survivors:
            raise ServerError("the sum is of other sites than this one signed", where=self._site)
        self._check_survivors(survivors)
        if not self._fits(total):
            raise ServerError("the sum does not fit the number plan", where=self._site)
        streams = [
            Stream(binding.common_stream(self._common, self.agreement, site), subtract=True)
            for site in survivors
        ]
        add_streams(total, streams, cipher=self._facts.cipher, threads=threads)
        self._common = b""

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose vectors are in the sum, as this site signed it; empty before."""
        return self._survivors

    def _enter(self, step: _Step) -> None:
        """Close the session until the end of the step: one that fails leaves it closed."""
        reached, self._step = self._step, _Step.CLOSED
        if reached != step - 1:
            raise self._out_of_order()

    def _out_of_order(self) -> FedgestaltError:
        return ServerError(
            "a message of the session came twice or out of order",
            where=self._site,
            remedy="nothing more was sent; the job must begin a new round",
        )

    def _check_roster(self, came: Mapping[str, object], what: str) -> None:
        if came.keys() != self._facts.roster.keys():
            raise ServerError(f"the {what} are not those of the agreed roster", where=self._site)

    def _check_survivors(self, sites: Sequence[str]) -> None:
        if list(sites) != sorted(set(sites)) or not set(sites) <= self._facts.roster.keys():
            raise ServerError("the survivors are no subset of the roster", where=self._site)
        if len(sites) < self._facts.threshold:
            raise ServerError(
                f"{len(sites)} sites survive, the threshold is {self._facts.threshold}",
                where=self._site,
            )

    def _fits(self, words: Words) -> bool:
        return words.shape == (self._facts.plan.words,) and words.dtype == np.uint32

    def _commit(self, what: str, holder: str, secret: bytes) -> bytes:
        return binding.commitment(what, self._keys, self._site, holder, secret)

    def _commit_each(
        self, what: str, holders: Sequence[str], contents: Sequence[bytes]
    ) -> dict[str, bytes]:
        pairs = zip(holders, contents, strict=True)
        return {holder: self._commit(what, holder, content) for holder, content in pairs}


def check_header(facts: SessionFacts, site: str, header: ShareHeader) -> None:
    """Raise PeerError if a header does not speak of exactly the right sites."""
    index = facts.sites.index(site)
    leads = facts.recipient is Recipient.SITES and index == 0
    right = (
        header.seed_shares.keys() == facts.roster.keys()
        and header.root_shares.keys() == facts.roster.keys()
        and header.boxes.keys() == facts.roster.keys() - {site}
        and header.pair_secrets.keys() == set(facts.sites[index + 1 :])
        and len(header.common_secret) == (32 if leads else 0)
    )
    if not right:
        raise PeerError("its share header does not speak of the sites of the roster", site=site)


def _signed(peer: Verifier, statement: bytes, signature: bytes, what: str, where: str) -> None:
    """The server relays only what it has checked: a wrong signature is its fault."""
    try:
        peer.verify(statement, signature)
    except PeerError:
        raise ServerError(
            what, where=where, remedy="somebody between the sites altered it, or sees another job"
        ) from None
