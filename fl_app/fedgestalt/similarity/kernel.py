"""The kernel configuration: what sites share so that their masked encodings can be compared.

The rules:

- A kernel is its secret and what it is for: ensemble, layout of the encodings, matching strategy,
  version. Its public id is a hash of all of it, so that encodings of different models, or under
  different secrets, can never be taken for comparable ones.
- Sites agree on the secret: each draws a contribution from the operating system and seals it for
  each peer alone. The secret comes from all contributions and the transcript of keys: one honest
  site's contribution makes it unpredictable. The server relays boxes that it cannot open.
- A later site gets the kernel from one that has it, sealed for it alone.
- Keys of an exchange are fresh, hybrid (X25519 and ML-KEM-768), and signed with the sites' FLARE
  certificates over all facts of the session: a server that swaps a key, or shows sites different
  rosters, is caught before anything secret is sealed.
- Masking seed and label key are derived from the secret, separately.

Any one site that hands the secret to the server gives away every site's encodings. Rotation, a new
version under a new secret, ends that for whatever is sent afterwards.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from fedgestalt.errors import PeerError, ServerError, SiteError
from fedgestalt.keys import (
    CIPHERTEXT_BYTES,
    PUBLIC_BYTES,
    TAG_BYTES,
    Entropy,
    PrivateKey,
    PublicKey,
    Signer,
    Verifier,
    derive,
    digest,
    seal,
    unseal,
)
from fedgestalt.messages import (
    Fault,
    Message,
    hexadecimal,
    integer,
    message_by_site,
    octets,
    octets_by_site,
    text,
    word,
)

MINIMUM_SITES: Final = 2
MAXIMUM_VERSION: Final = 10**6
_SECRET_BYTES = 32
_ID_BYTES = 16
_SIGNATURE_LIMIT = 1024
_BOX_BYTES = CIPHERTEXT_BYTES + _SECRET_BYTES + TAG_BYTES


@dataclass(frozen=True, repr=False)
class Kernel(Message):
    """An agreed kernel; only sites hold one.

    Attributes:
        version: counts the rotations, from 1.
        ensemble: digest of the model that encodes, hexadecimal.
        layout: of an encoding, as the ensemble says it: members, variants and sizes.
        strategy: name of the matching strategy.
        secret: 32 bytes.
    """

    schema: ClassVar[str] = "fedgestalt.similarity.kernel/1"
    version: int = integer(1, MAXIMUM_VERSION)
    ensemble: str = hexadecimal()
    layout: str = text()
    strategy: str = word(64)
    secret: bytes = octets(_SECRET_BYTES)

    @property
    def id(self) -> str:
        """16 bytes, hexadecimal; public, and different if anything of the kernel is."""
        purpose = (str(self.version), self.ensemble, self.layout, self.strategy)
        parts = [part.encode() for part in purpose]
        return derive(self.secret, "kernel id", *parts, size=_ID_BYTES).hex()

    @property
    def masking_seed(self) -> bytes:
        """32 bytes, for the matching strategy."""
        return derive(self.secret, "kernel masking seed", self.id.encode())

    @property
    def label_key(self) -> bytes:
        """32 bytes, for :mod:`fedgestalt.similarity.labels`."""
        return derive(self.secret, "kernel label key", self.id.encode())

    def transfer_key(self, job: str) -> bytes:
        """32 bytes, for one ensemble that a newcomer gets in a job."""
        return derive(self.secret, "kernel ensemble transfer", self.id.encode(), job.encode())

    def __repr__(self) -> str:
        return f"Kernel({self.id}, version {self.version}, {self.strategy})"

    def check(self, ensemble: str, layout: str, strategy: str, fault: Fault) -> None:
        """Raise ``fault`` if the kernel is not for these encodings, naming both."""
        for what, own, asked in (
            ("ensemble", self.ensemble, ensemble),
            ("layout", self.layout, layout),
            ("strategy", self.strategy, strategy),
        ):
            if own != asked:
                raise fault(
                    f"kernel {self.id} compares encodings of {what} {own[:64]}, not of {asked[:64]}"
                )


@dataclass(frozen=True)
class KernelFacts:
    """What all parties of an exchange agree on.

    Attributes:
        job: the job's id.
        attempt: counted from 1; an exchange begins anew if a site is lost.
        version: of the kernel.
        ensemble, layout, strategy: see :class:`Kernel`.
        roster: who takes part, with the fingerprint of each certificate (32 bytes).
        sponsor: who hands an existing kernel over; empty if all agree on a new one.
        held: id of a kernel that all hold already, and meet under to seal for each other.
    """

    job: str
    attempt: int
    version: int
    ensemble: str
    layout: str
    strategy: str
    roster: Mapping[str, bytes]
    sponsor: str = ""
    held: str = ""

    @property
    def sites(self) -> tuple[str, ...]:
        """Who takes part, in order."""
        return tuple(sorted(self.roster))

    @property
    def digest(self) -> bytes:
        """SHA-256 over the facts, 32 bytes; every party computes it for itself."""
        texts = (
            *(self.job, str(self.attempt), str(self.version), self.ensemble, self.layout),
            *(self.strategy, self.sponsor, self.held),
        )
        roster = [part for site in self.sites for part in (site.encode(), self.roster[site])]
        return digest("kernel session", *(text.encode() for text in texts), *roster)


@dataclass(frozen=True)
class KernelKey(Message):
    """Site to server: a fresh public key for this exchange, signed."""

    schema: ClassVar[str] = "fedgestalt.similarity.kernel-key/2"
    session: bytes = octets(32)
    public_key: bytes = octets(PUBLIC_BYTES)
    signature: bytes = octets(1, _SIGNATURE_LIMIT)


@dataclass(frozen=True)
class KernelKeys(Message):
    """Server to sites: everybody's key."""

    schema: ClassVar[str] = "fedgestalt.similarity.kernel-keys/2"
    keys: Mapping[str, KernelKey] = message_by_site(KernelKey)


@dataclass(frozen=True)
class SealedContributions(Message):
    """A site's contribution sealed for each peer; on its way down, each peer's for one site."""

    schema: ClassVar[str] = "fedgestalt.similarity.sealed-contributions/2"
    boxes: Mapping[str, bytes] = octets_by_site(_BOX_BYTES)


@dataclass(frozen=True)
class SealedKernels(Message):
    """Sponsor to server: a kernel sealed for each newcomer; on its way down, for one site."""

    schema: ClassVar[str] = "fedgestalt.similarity.sealed-kernels/1"
    boxes: Mapping[str, bytes] = octets_by_site(CIPHERTEXT_BYTES + TAG_BYTES, 1 << 14)


class KernelExchange:
    """One site's side of an exchange.

    To agree on a new one: :meth:`offer`, :meth:`meet`, :meth:`contribute`, :meth:`agree`. To pass
    one on: :meth:`offer` and :meth:`meet` by all, then :meth:`hand_over` by the sponsor and
    :meth:`take_over` by the others. To seal for each other under one that all hold: :meth:`offer`
    and :meth:`meet`, then :meth:`seal_for` and :meth:`open_from`.

    Args:
        site: this site's name.
        facts: what this site was told, and checked itself.
        signer: its certificate key.
        peers: the checked certificates of the others.
        minimum_sites: this site's own policy, for an agreement.
        entropy: returns that many random bytes; only tests replace it.

    Raises:
        ServerError: the facts cannot be right.
        SiteError: this site's policy asks for more sites.
    """

    def __init__(
        self,
        site: str,
        facts: KernelFacts,
        signer: Signer,
        peers: Mapping[str, Verifier],
        *,
        minimum_sites: int = MINIMUM_SITES,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        if site not in facts.roster or set(peers) != set(facts.roster) - {site}:
            raise ServerError("the roster lacks this site or a certificate", where=site)
        if facts.sponsor and facts.sponsor not in facts.roster:
            raise ServerError("the sponsor takes no part", where=site)
        if not facts.sponsor and len(facts.roster) < minimum_sites:
            raise SiteError(
                f"{len(facts.roster)} sites agree on a kernel, this site's policy asks for"
                f" {minimum_sites}",
                where=site,
            )
        self._site, self._facts, self._signer, self._peers = site, facts, signer, dict(peers)
        self._private = PrivateKey(entropy(_SECRET_BYTES))
        self._contribution = entropy(_SECRET_BYTES)
        self._keys: dict[str, PublicKey] = {}
        self._transcript = b""

    def offer(self) -> KernelKey:
        """The public key for this exchange."""
        public = self._private.public.encoded
        statement = _statement(self._facts, self._site, public)
        return KernelKey(self._facts.digest, public, self._signer.sign(statement))

    def meet(self, offered: KernelKeys) -> None:
        """Check everybody's keys.

        Raises:
            ServerError: they are not those of the roster.
            PeerError: one is not signed by its site for these facts, or is none.
        """
        keys = offered.keys
        if tuple(sorted(keys)) != self._facts.sites:
            raise ServerError("the keys are not those of the agreed roster", where=self._site)
        if keys[self._site].public_key != self._private.public.encoded:
            raise ServerError("this site's own key came back altered", where=self._site)
        if len({key.public_key for key in keys.values()}) != len(keys):
            raise ServerError("two sites have the same key", where=self._site)
        found = {}
        for peer, verifier in self._peers.items():
            found[peer] = check_key(self._facts, peer, keys[peer], verifier)
        ordered = [keys[site].public_key for site in self._facts.sites]
        self._transcript = digest("kernel keys", self._facts.digest, *ordered)
        self._keys = found

    def contribute(self) -> SealedContributions:
        """Seal this site's contribution for every peer."""
        return SealedContributions(
            {peer: self._seal("contribution", peer, self._contribution) for peer in self._met}
        )

    def agree(self, received: SealedContributions) -> Kernel:
        """Open every peer's contribution and derive the kernel.

        Args:
            received: one box from every peer, by the sender's name.

        Raises:
            ServerError: boxes are missing.
            PeerError: a box does not open.
        """
        if received.boxes.keys() != self._met.keys():
            raise ServerError("the boxes are not those of the agreed roster", where=self._site)
        contributions = {self._site: self._contribution}
        for peer, box in received.boxes.items():
            contributions[peer] = self._unseal("contribution", peer, box)
            if len(contributions[peer]) != _SECRET_BYTES:
                raise PeerError("its contribution has another length", site=peer)
        joined = b"".join(contributions[site] for site in self._facts.sites)
        facts = self._facts
        return Kernel(
            facts.version,
            facts.ensemble,
            facts.layout,
            facts.strategy,
            derive(joined, "kernel secret", self._transcript),
        )

    def hand_over(self, kernel: Kernel) -> SealedKernels:
        """Seal an existing kernel for every peer.

        Raises:
            ServerError: it is not the one that the facts name, or this site is not the sponsor.
        """
        if self._facts.sponsor != self._site:
            raise ServerError("this site is not the sponsor", where=self._site)
        self._check(kernel, lambda what: ServerError(what, where=self._site))
        plain = encoded(kernel)
        return SealedKernels({peer: self._seal("kernel", peer, plain) for peer in self._met})

    def take_over(self, received: SealedKernels) -> Kernel:
        """Open the kernel that the sponsor has sealed for this site.

        Raises:
            ServerError: it is not from the sponsor alone.
            PeerError: it does not open, or is for something else.
        """
        sponsor = self._facts.sponsor
        if received.boxes.keys() != {sponsor} or sponsor not in self._met:
            raise ServerError("the box is not the sponsor's", where=self._site)
        kernel = decoded(
            self._unseal("kernel", sponsor, received.boxes[sponsor]),
            lambda what: PeerError(what, site=sponsor),
        )
        self._check(kernel, lambda what: PeerError(what, site=sponsor))
        return kernel

    @property
    def _met(self) -> dict[str, PublicKey]:
        if not self._transcript:
            raise ServerError("a phase of the kernel exchange came early", where=self._site)
        return self._keys

    def _check(self, kernel: Kernel, fault: Fault) -> None:
        facts = self._facts
        kernel.check(facts.ensemble, facts.layout, facts.strategy, fault)
        if kernel.version != facts.version:
            raise fault(f"the kernel has version {kernel.version}, not {facts.version}")

    def seal_for(self, peer: str, what: str, plain: bytes) -> bytes:
        """Seal what the server passes on to one peer.

        Args:
            peer: the receiver.
            what: names it; :meth:`open_from` must name the same.
            plain: the content.

        Raises:
            ServerError: the peer takes no part.
        """
        if peer not in self._met:
            raise ServerError(f"{peer} takes no part in the kernel exchange", where=self._site)
        return self._seal(f"message {what}", peer, plain)

    def open_from(self, peer: str, what: str, box: bytes) -> bytes:
        """Open what a peer has sealed for this site; see :meth:`seal_for`.

        Raises:
            ServerError: the peer takes no part.
            PeerError: it does not open.
        """
        if peer not in self._met:
            raise ServerError(f"{peer} takes no part in the kernel exchange", where=self._site)
        if len(box) < CIPHERTEXT_BYTES + TAG_BYTES:
            raise PeerError(f"its sealed {what} is cut short", site=peer)
        return self._unseal(f"message {what}", peer, box)

    def _seal(self, what: str, peer: str, plain: bytes) -> bytes:
        secret, ciphertext = self._met[peer].encapsulate()
        return ciphertext + seal(self._key(what, self._site, peer, secret), plain, ciphertext)

    def _unseal(self, what: str, peer: str, box: bytes) -> bytes:
        ciphertext, sealed = box[:CIPHERTEXT_BYTES], box[CIPHERTEXT_BYTES:]
        secret = self._private.decapsulate(ciphertext)
        plain = unseal(self._key(what, peer, self._site, secret), sealed, ciphertext)
        if plain is None:
            raise PeerError(f"its sealed {what} does not open", site=peer)
        return plain

    def _key(self, what: str, sender: str, receiver: str, secret: bytes) -> bytes:
        """The key of the one box of this kind from ``sender`` to ``receiver``."""
        peer = receiver if sender == self._site else sender
        exchanged = self._private.exchange(self._met[peer])
        names = (what.encode(), sender.encode(), receiver.encode())
        return derive(exchanged + secret, "kernel box", self._transcript, *names)


def check_key(facts: KernelFacts, site: str, key: KernelKey, verifier: Verifier) -> PublicKey:
    """The public key that a site has signed for these facts.

    Raises:
        PeerError: it sees another session, did not sign, or it is no key.
    """
    if key.session != facts.digest:
        raise PeerError(
            "it sees another session (job, ensemble, strategy, version or roster differ)", site=site
        )
    verifier.verify(_statement(facts, site, key.public_key), key.signature)
    try:
        return PublicKey(key.public_key)
    except ValueError:
        raise PeerError("it signed a key that is none", site=site) from None


def _statement(facts: KernelFacts, site: str, public_key: bytes) -> bytes:
    return digest("kernel key", facts.digest, site.encode(), public_key)


_TEXTS = tuple(f.name for f in dataclasses.fields(Kernel) if f.name != "secret")


def encoded(kernel: Kernel) -> bytes:
    """A kernel as bytes, secret and all: to be sealed, or kept where only the site reads."""
    lines = [str(getattr(kernel, name)) for name in _TEXTS]
    return "\n".join([Kernel.schema, *lines, kernel.secret.hex()]).encode()


def decoded(content: bytes, fault: Fault) -> Kernel:
    """The kernel in ``content``; raises ``fault`` if there is none."""
    try:
        schema, version, *texts, secret = content.decode().split("\n")
        fields = dict(zip(_TEXTS, (int(version), *texts), strict=True))
        fields |= {"schema": schema, "secret": bytes.fromhex(secret)}
    except ValueError:
        raise fault("what it holds is no kernel configuration") from None
    return Kernel.from_fields(fields, fault)
