"""The messages of a session, in the order in which they travel.

All of them are small; the masked vector itself travels apart, in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from fedgestalt.keys import CIPHERTEXT_BYTES, HASH_BYTES, PUBLIC_BYTES, TAG_BYTES
from fedgestalt.messages import (
    MAXIMUM_SITES,
    Message,
    message,
    message_by_site,
    octets,
    octets_by_site,
    several,
    text,
)
from fedgestalt.secagg.shamir import SECRET_BYTES, SHARE_BYTES

SIGNATURE_BYTES: Final = (64, 1024)
_ESCROW_BYTES = MAXIMUM_SITES * SECRET_BYTES + TAG_BYTES
_LEAST_BOX = CIPHERTEXT_BYTES + 2 * SHARE_BYTES + TAG_BYTES
_MOST_BOX = _LEAST_BOX + SECRET_BYTES + CIPHERTEXT_BYTES


@dataclass(frozen=True)
class KeyOffer(Message):
    """Site to server: fresh public keys for one session, signed by the site's certificate."""

    schema: ClassVar[str] = "fedgestalt.secagg.key-offer/2"
    session: bytes = octets(HASH_BYTES)
    mask_key: bytes = octets(PUBLIC_BYTES)
    channel_key: bytes = octets(PUBLIC_BYTES)
    signature: bytes = octets(*SIGNATURE_BYTES)


@dataclass(frozen=True)
class KeyList(Message):
    """Server to sites: everybody's keys."""

    schema: ClassVar[str] = "fedgestalt.secagg.key-list/2"
    offers: Mapping[str, KeyOffer] = message_by_site(KeyOffer)


@dataclass(frozen=True)
class ShareHeader(Message):
    """What a site says to everybody about the shares that it dealt.

    Attributes:
        seed_commitment: hash of the self seed.
        seed_shares: hash of each site's share of the self seed.
        root_shares: hash of each site's share of the mask key's root.
        pair_secrets: hash of the KEM secret with each later site.
        escrow: these KEM secrets, sealed under a key from the root.
        boxes: hash of each peer's box.
        common_secret: of the first site, where the sites alone learn the sum: hash of the secret
            that is common to the sites. Empty otherwise.
        signature: over all of it and the key list.
    """

    schema: ClassVar[str] = "fedgestalt.secagg.share-header/1"
    seed_commitment: bytes = octets(HASH_BYTES)
    seed_shares: Mapping[str, bytes] = octets_by_site(HASH_BYTES)
    root_shares: Mapping[str, bytes] = octets_by_site(HASH_BYTES)
    pair_secrets: Mapping[str, bytes] = octets_by_site(HASH_BYTES)
    escrow: bytes = octets(TAG_BYTES, _ESCROW_BYTES)
    boxes: Mapping[str, bytes] = octets_by_site(HASH_BYTES)
    common_secret: bytes = octets(0, HASH_BYTES)
    signature: bytes = octets(*SIGNATURE_BYTES)


@dataclass(frozen=True)
class ShareOffer(Message):
    """Site to server: the header for everybody, and a sealed box for each peer.

    A box is a KEM ciphertext to the peer's channel key, the sealed shares and, if the peer comes
    later in the roster, a KEM ciphertext to its mask key.
    """

    schema: ClassVar[str] = "fedgestalt.secagg.share-offer/1"
    session: bytes = octets(HASH_BYTES)
    header: ShareHeader = message(ShareHeader)
    boxes: Mapping[str, bytes] = octets_by_site(_LEAST_BOX, _MOST_BOX)


@dataclass(frozen=True)
class ShareDelivery(Message):
    """Server to one site: everybody's headers, and the boxes for this site by their senders."""

    schema: ClassVar[str] = "fedgestalt.secagg.share-delivery/1"
    headers: Mapping[str, ShareHeader] = message_by_site(ShareHeader)
    boxes: Mapping[str, bytes] = octets_by_site(_LEAST_BOX, _MOST_BOX)


@dataclass(frozen=True)
class Survivors(Message):
    """Server to sites: whose vectors have arrived."""

    schema: ClassVar[str] = "fedgestalt.secagg.survivors/1"
    session: bytes = octets(HASH_BYTES)
    sites: tuple[str, ...] = several(text())


@dataclass(frozen=True)
class Endorsement(Message):
    """Site to server: this site's signature on the survivors, one per session."""

    schema: ClassVar[str] = "fedgestalt.secagg.endorsement/1"
    session: bytes = octets(HASH_BYTES)
    signature: bytes = octets(*SIGNATURE_BYTES)


@dataclass(frozen=True)
class Endorsements(Message):
    """Server to sites: enough signatures on the same survivors."""

    schema: ClassVar[str] = "fedgestalt.secagg.endorsements/1"
    session: bytes = octets(HASH_BYTES)
    sites: tuple[str, ...] = several(text())
    signatures: Mapping[str, bytes] = octets_by_site(*SIGNATURE_BYTES)


@dataclass(frozen=True)
class UnmaskShares(Message):
    """Site to server: of each survivor a share of its self seed, of each other one of its root."""

    schema: ClassVar[str] = "fedgestalt.secagg.unmask-shares/1"
    session: bytes = octets(HASH_BYTES)
    shares: Mapping[str, bytes] = octets_by_site(SHARE_BYTES)
