"""Sealed labels: fixed-length ciphertexts that sites can open and the server cannot.

All ciphertexts have one length and a random nonce, so that not even the equality of two labels
shows. A label is bound to its handle and its kernel: the server cannot move it to another row
without notice. Which hospital the image belongs to, and which terms of the Human Phenotype Ontology
the patient shows, stand in it only if that hospital wants them to; whether, and how many, does not
show.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedgestalt.errors import ServerError
from fedgestalt.similarity.kernel import Kernel

HANDLE_BYTES = 16
CASE_BYTES = 16
PLANTED = 1 << 31
"""Role bit: no patient's row, but one whose similarities its site knows beforehand."""
_HOSPITAL_BYTES = 64
MAXIMUM_TERMS = 64
"""HPO terms in one label; a patient with more is known by the first of them."""
_PLAIN = struct.Struct(f"<iI{CASE_BYTES}s{_HOSPITAL_BYTES}s{MAXIMUM_TERMS}I")
_TERM_PREFIX = "HP:"
_NONCE_BYTES = 12
SEALED_BYTES = _NONCE_BYTES + _PLAIN.size + 16


@dataclass(frozen=True)
class Label:
    """What a site tells other sites about one of its rows.

    Attributes:
        syndrome: id in the consortium's label map; -1 for an unsolved case.
        roles: bit set, see :mod:`fedgestalt.similarity.evaluation`.
        case: random, the same for all images of one patient under one kernel; only the hospital
            knows whose it is.
        hospital: its name, if it lets others know; empty otherwise.
        hpo: terms such as ``HP:0000154``, if it lets others know; at most ``MAXIMUM_TERMS``.
    """

    syndrome: int
    roles: int
    case: bytes = bytes(CASE_BYTES)
    hospital: str = ""
    hpo: tuple[str, ...] = ()


def new_handle() -> bytes:
    """A random name for one row: the only name of an image that leaves its site."""
    return os.urandom(HANDLE_BYTES)


def seal_label(label: Label, kernel: Kernel, handle: bytes) -> bytes:
    """Encrypt ``label`` for all sites that hold ``kernel``; ``SEALED_BYTES`` long."""
    nonce = os.urandom(_NONCE_BYTES)
    hospital = label.hospital.encode()[:_HOSPITAL_BYTES]
    terms = [int(term.removeprefix(_TERM_PREFIX)) for term in label.hpo[:MAXIMUM_TERMS]]
    terms += [0] * (MAXIMUM_TERMS - len(terms))
    plain = _PLAIN.pack(label.syndrome, label.roles, label.case, hospital, *terms)
    cipher = ChaCha20Poly1305(kernel.label_key)
    return nonce + cipher.encrypt(nonce, plain, _context(kernel, handle))


def open_label(sealed: bytes, kernel: Kernel, handle: bytes) -> Label:
    """Decrypt and check a label.

    Raises:
        ServerError: it was altered, moved to another row, or sealed under another kernel.
    """
    nonce, body = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        plain = ChaCha20Poly1305(kernel.label_key).decrypt(nonce, body, _context(kernel, handle))
    except InvalidTag:
        raise ServerError(
            "a sealed label does not open: it was altered or moved to another row", where="server"
        ) from None
    syndrome, roles, case, hospital, *terms = _PLAIN.unpack(plain)
    name = hospital.rstrip(b"\0").decode(errors="ignore")
    hpo = tuple(f"{_TERM_PREFIX}{term:07d}" for term in terms if term)
    return Label(syndrome, roles, case, name, hpo)


def _context(kernel: Kernel, handle: bytes) -> bytes:
    return b"|".join((b"fedgestalt label/2", kernel.id.encode(), handle))
