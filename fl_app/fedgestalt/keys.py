"""Keys of all protocols: hybrid key pairs, sealed boxes, and every derivation, in one place.

A hybrid key pair is X25519 and ML-KEM-768 (FIPS 203) from one 32-byte root. A secret between two
sites comes from both, so that it holds as long as either does. Every hash and derivation carries
its own label and frames each part by its length: no two uses can be taken for one another. Pure:
no files, no clock; certificates are behind :class:`Signer` and :class:`Verifier`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PROTOCOL: Final = "fedgestalt/3"

HASH_BYTES: Final = 32
_X25519_BYTES = 32
PUBLIC_BYTES: Final = _X25519_BYTES + 1184
CIPHERTEXT_BYTES: Final = 1088
TAG_BYTES: Final = 16
_ONCE = bytes(12)
"""The nonce of keys that encrypt one message only."""
Entropy = Callable[[int], bytes]
"""Returns that many random bytes."""

_PROBE = X25519PrivateKey.from_private_bytes(bytes(_X25519_BYTES))


class Signer(Protocol):
    """A site's own certificate key."""

    def sign(self, statement: bytes) -> bytes:
        """Sign 32 bytes."""


class Verifier(Protocol):
    """A peer's checked certificate."""

    def verify(self, statement: bytes, signature: bytes) -> None:
        """Raise PeerError if the peer did not sign ``statement``."""


def digest(label: str, *parts: bytes) -> bytes:
    """SHA-256 over protocol, label and parts, each framed by its length; 32 bytes."""
    total = hashlib.sha256()
    for part in (PROTOCOL.encode(), label.encode(), *parts):
        total.update(len(part).to_bytes(8, "big") + part)
    return total.digest()


def derive(secret: bytes, label: str, *parts: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256 of ``secret`` for one use; ``size`` bytes."""
    return HKDF(hashes.SHA256(), size, salt=None, info=digest(label, *parts)).derive(secret)


def seal(key: bytes, plain: bytes, context: bytes) -> bytes:
    """Encrypt under a key that is used for this alone (ChaCha20-Poly1305)."""
    return ChaCha20Poly1305(key).encrypt(_ONCE, plain, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """Decrypt; None if key, context or content is not what was sealed."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, context)
    except InvalidTag:
        return None


class PublicKey:
    """The public half of a hybrid key pair.

    Raises:
        ValueError: the bytes are no such key.
    """

    def __init__(self, encoded: bytes) -> None:
        if len(encoded) != PUBLIC_BYTES:
            raise ValueError("a hybrid public key has another length")
        self.encoded = encoded
        self._x25519 = X25519PublicKey.from_public_bytes(encoded[:_X25519_BYTES])
        self._mlkem = MLKEM768PublicKey.from_public_bytes(encoded[_X25519_BYTES:])
        _PROBE.exchange(self._x25519)  # refuses points of small order, which give no secret

    @property
    def x25519(self) -> X25519PublicKey:
        """The classical half."""
        return self._x25519

    def encapsulate(self) -> tuple[bytes, bytes]:
        """A fresh 32-byte KEM secret, and the ciphertext that gives it to the key's owner."""
        secret, ciphertext = self._mlkem.encapsulate()
        return secret, ciphertext


class PrivateKey:
    """A hybrid key pair; a function of its 32-byte root alone."""

    def __init__(self, root: bytes) -> None:
        self._x25519 = X25519PrivateKey.from_private_bytes(derive(root, "x25519 key"))
        seed = derive(root, "ml-kem-768 key", size=64)
        self._mlkem = MLKEM768PrivateKey.from_seed_bytes(seed)
        self.public = PublicKey(
            self._x25519.public_key().public_bytes_raw()
            + self._mlkem.public_key().public_bytes_raw()
        )

    def exchange(self, peer: PublicKey) -> bytes:
        """The X25519 secret with ``peer``, 32 bytes."""
        return self._x25519.exchange(peer.x25519)

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The KEM secret behind a ciphertext; a wrong ciphertext gives another secret.

        Raises:
            ValueError: it does not have the length of a ciphertext.
        """
        return self._mlkem.decapsulate(ciphertext)
