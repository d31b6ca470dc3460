"""What every signature, commitment and derived key of a session is bound to.

Sites and server compute these alike. ``keys`` is the digest of the key list, ``shares`` that of
all share headers, which includes the former: whoever was shown another list derives other keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedgestalt.keys import derive, digest, seal, unseal
from fedgestalt.messages import Message
from fedgestalt.secagg.facts import SessionFacts
from fedgestalt.secagg.messages import KeyOffer, ShareHeader
from fedgestalt.secagg.shamir import SECRET_BYTES


def key_statement(facts: SessionFacts, site: str, mask_key: bytes, channel_key: bytes) -> bytes:
    """What a site signs about its keys."""
    return digest("keys of", facts.digest, site.encode(), mask_key, channel_key)


def keys_digest(facts: SessionFacts, offers: Mapping[str, KeyOffer]) -> bytes:
    """Of the whole key list."""
    return digest("key list", facts.digest, *(_flat(offers[site]) for site in facts.sites))


def header_statement(keys: bytes, site: str, header: ShareHeader) -> bytes:
    """What a site signs about the shares that it dealt."""
    return digest("shares of", keys, site.encode(), _flat(header, without="signature"))


def shares_digest(facts: SessionFacts, keys: bytes, headers: Mapping[str, ShareHeader]) -> bytes:
    """Of all share headers."""
    return digest("share headers", keys, *(_flat(headers[site]) for site in facts.sites))


def survivors_statement(shares: bytes, survivors: Iterable[str]) -> bytes:
    """What a site signs about the survivors."""
    return digest("survivors", shares, *(site.encode() for site in survivors))


def commitment(what: str, keys: bytes, dealer: str, holder: str, secret: bytes) -> bytes:
    """Hash of a secret that ``dealer`` dealt to ``holder`` (or to all: empty)."""
    return digest(f"commitment to {what}", keys, dealer.encode(), holder.encode(), secret)


def box_digest(keys: bytes, sender: str, receiver: str, box: bytes) -> bytes:
    """Hash of a box."""
    return digest("box", keys, sender.encode(), receiver.encode(), box)


def channel(
    keys: bytes, sender: str, receiver: str, exchanged: bytes, secret: bytes, ciphertext: bytes
) -> tuple[bytes, bytes]:
    """Key and context of the sealed part of a box."""
    names = (sender.encode(), receiver.encode())
    key = derive(exchanged + secret, "channel", keys, *names, ciphertext)
    return key, digest("box context", keys, *names)


def seal_escrow(root: bytes, keys: bytes, secrets: Mapping[str, bytes]) -> bytes:
    """The KEM secrets with later sites, in their order, for whoever rebuilds the root."""
    return seal(derive(root, "escrow", keys), b"".join(secrets.values()), keys)


def open_escrow(root: bytes, keys: bytes, escrow: bytes, later: Iterable[str]) -> dict[str, bytes]:
    """The KEM secrets by site; empty if the escrow is not what its dealer should have sealed."""
    plain, names = unseal(derive(root, "escrow", keys), escrow, keys), list(later)
    if plain is None or len(plain) != SECRET_BYTES * len(names):
        return {}
    parts = (plain[i : i + SECRET_BYTES] for i in range(0, len(plain), SECRET_BYTES))
    return dict(zip(names, parts, strict=True))


def self_stream(seed: bytes, shares: bytes, site: str) -> bytes:
    """Key of a site's own stream, which comes off when its self seed is rebuilt."""
    return derive(seed, "self stream", shares, site.encode())


def pair_stream(exchanged: bytes, secret: bytes, shares: bytes, one: str, other: str) -> bytes:
    """Key of the stream that the first of two sites adds and the second subtracts."""
    names = (name.encode() for name in sorted((one, other)))
    return derive(exchanged + secret, "pair stream", shares, *names)


def common_stream(secret: bytes, shares: bytes, site: str) -> bytes:
    """Key of the stream that ``site`` adds and only sites can take off the sum."""
    return derive(secret, "common stream", shares, site.encode())


def _flat(message: Message, without: str = "") -> bytes:
    """A message of bytes and mappings of bytes, framed; mappings in the order of their keys."""
    parts = []
    for name, value in message.to_fields().items():
        if name == without:
            continue
        if isinstance(value, Mapping):
            inner = [part for key in sorted(value) for part in (key.encode(), value[key])]
        else:
            inner = [value.encode() if isinstance(value, str) else value]
        parts.append(digest(name, *inner))
    return b"".join(parts)
