"""The kernel configuration, and how sites agree on its secrets through a server that learns none.

The rules:

- Every site draws a fresh X25519 key and a fresh 32-byte contribution from the operating system.
- Each contribution is sealed for each peer alone; the server relays boxes that it cannot open.
- The group secret is a hash over all contributions and the transcript of public keys: one honest
  site's contribution is enough to make it unpredictable.
- Masking seed, label key and kernel id are derived from it separately. The id is public; sites
  whose ids differ hold different secrets, and their rows are never compared.

Keys are not yet signed: a server that replaces public keys, rather than relaying them, is not
detected. Any one site that hands the seed to the server gives away every site's encodings.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedgestalt.errors import PeerError, ServerError, SiteError
from fedgestalt.messages import Message, octets, octets_by_site

MINIMUM_SITES = 2
_SECRET_BYTES = 32
_BOX_BYTES = _SECRET_BYTES + 16  # with the authentication tag


@dataclass(frozen=True)
class KernelFacts:
    """What all sites of a matching session must agree on.

    Attributes:
        job: the job's id.
        ensemble_digest: of the model that encodes, hexadecimal: encodings of different models are
            never compared.
        strategy: name of the matching strategy.
        roster: all sites, sorted.
    """

    job: str
    ensemble_digest: str
    strategy: str
    roster: tuple[str, ...]

    @property
    def digest(self) -> bytes:
        """SHA-256 over the facts, 32 bytes."""
        parts = ("kernel/1", self.job, self.ensemble_digest, self.strategy, *self.roster)
        encoded = [part.encode() for part in parts]
        return hashlib.sha256(b"".join(len(p).to_bytes(8, "big") + p for p in encoded)).digest()


@dataclass(frozen=True)
class Kernel:
    """The agreed kernel: a public id and secrets that only sites hold.

    Attributes:
        id: 16 bytes, hexadecimal; public.
        masking_seed: 32 bytes, for the matching strategy.
        label_key: 32 bytes, for :mod:`fedgestalt.similarity.labels`.
    """

    id: str
    masking_seed: bytes = field(repr=False)
    label_key: bytes = field(repr=False)


@dataclass(frozen=True)
class KernelKey(Message):
    """Site to server: a public key for this session."""

    schema: ClassVar[str] = "fedgestalt.similarity.kernel-key/1"
    session: bytes = octets(32)
    public_key: bytes = octets(32)


@dataclass(frozen=True)
class KernelKeys(Message):
    """Server to sites: everybody's public key."""

    schema: ClassVar[str] = "fedgestalt.similarity.kernel-keys/1"
    public_keys: Mapping[str, bytes] = octets_by_site(32)


@dataclass(frozen=True)
class SealedContributions(Message):
    """A site's contribution sealed for each peer; on its way down, each peer's for one site."""

    schema: ClassVar[str] = "fedgestalt.similarity.sealed-contributions/1"
    boxes: Mapping[str, bytes] = octets_by_site(_BOX_BYTES)


class KernelAgreement:
    """One site's side of the agreement: :meth:`offer`, :meth:`seal`, :meth:`agree`, in that order.

    Args:
        site: this site's name.
        facts: what this site was told about the session.
        minimum_sites: this site's own policy.
        entropy: returns that many random bytes; only tests replace it.
    """

    def __init__(
        self,
        site: str,
        facts: KernelFacts,
        *,
        minimum_sites: int = MINIMUM_SITES,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        if list(facts.roster) != sorted(set(facts.roster)) or site not in facts.roster:
            raise ServerError(
                "the roster is unsorted, repeats a site or lacks this one", where=site
            )
        if len(facts.roster) < minimum_sites:
            raise SiteError(
                f"{len(facts.roster)} sites take part, this site's policy asks for {minimum_sites}",
                where=site,
            )
        self._site, self._facts = site, facts
        self._private = X25519PrivateKey.from_private_bytes(entropy(32))
        self._public = self._private.public_key().public_bytes_raw()
        self._contribution = entropy(_SECRET_BYTES)
        self._channels: dict[str, bytes] = {}
        self._transcript = b""

    def offer(self) -> KernelKey:
        """The public key for this session."""
        return KernelKey(self._facts.digest, self._public)

    def seal(self, keys: KernelKeys) -> SealedContributions:
        """Seal this site's contribution for every peer.

        Raises:
            ServerError: the keys are not those of the roster.
            PeerError: a peer's key is degenerate.
        """
        if tuple(sorted(keys.public_keys)) != self._facts.roster:
            raise ServerError("the keys are not those of the agreed roster", where=self._site)
        if keys.public_keys[self._site] != self._public:
            raise ServerError("this site's own key came back altered", where=self._site)
        if len(set(keys.public_keys.values())) != len(self._facts.roster):
            raise ServerError("two sites have the same key", where=self._site)
        ordered = [keys.public_keys[site] for site in self._facts.roster]
        self._transcript = hashlib.sha256(self._facts.digest + b"".join(ordered)).digest()
        peers = [site for site in self._facts.roster if site != self._site]
        for peer in peers:
            try:
                public = X25519PublicKey.from_public_bytes(keys.public_keys[peer])
                self._channels[peer] = self._private.exchange(public)
            except ValueError:
                raise PeerError("its key is degenerate", site=peer) from None
        return SealedContributions(
            {
                peer: self._cipher(self._site, peer).encrypt(bytes(12), self._contribution, None)
                for peer in peers
            }
        )

    def agree(self, received: SealedContributions) -> Kernel:
        """Open every peer's contribution and derive the kernel.

        Args:
            received: one box from every peer, by the sender's name.

        Raises:
            ServerError: boxes are missing, or :meth:`seal` was not called.
            PeerError: a box does not open.
        """
        if not self._channels or received.boxes.keys() != self._channels.keys():
            raise ServerError("the boxes are not those of the agreed roster", where=self._site)
        contributions = {self._site: self._contribution}
        for peer, box in received.boxes.items():
            try:
                contributions[peer] = self._cipher(peer, self._site).decrypt(bytes(12), box, None)
            except InvalidTag:
                raise PeerError("its sealed contribution does not open", site=peer) from None
        secret = b"".join(contributions[site] for site in self._facts.roster)

        def derive(purpose: bytes, length: int = 32) -> bytes:
            kdf = HKDF(
                hashes.SHA256(), length, salt=self._transcript, info=b"fedgestalt " + purpose
            )
            return kdf.derive(secret)

        return Kernel(derive(b"kernel id/1", 16).hex(), derive(b"masking/1"), derive(b"labels/1"))

    def _cipher(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        """Cipher for the one box from ``sender`` to ``receiver``: its key is used once."""
        peer = receiver if sender == self._site else sender
        info = b"fedgestalt contribution/1|" + f"{sender}|{receiver}".encode()
        kdf = HKDF(hashes.SHA256(), 32, salt=self._transcript, info=info)
        return ChaCha20Poly1305(kdf.derive(self._channels[peer]))
