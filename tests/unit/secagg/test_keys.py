"""Hashes, derivations, hybrid keys and boxes, and what each of them is bound to."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import NAMES, Parties, QuickIdentity, facts_for, fingerprint, flipped

from fedgestalt.keys import (
    CIPHERTEXT_BYTES,
    PUBLIC_BYTES,
    TAG_BYTES,
    PrivateKey,
    PublicKey,
    derive,
    digest,
    seal,
    unseal,
)
from fedgestalt.secagg import binding

ROOT, OTHER = fingerprint("root"), fingerprint("other root")
A, B, C, D = NAMES[:4]
relaxed = settings(deadline=None)

# Computed apart, with hashlib and hmac alone; PUBLIC and SESSION are hashes of this version.
DIGEST = "badce019c9756c259574a98af1fa4a6815e82d9b1b47a9a33e7365f739ca0cff"
DERIVED = "6732c05959d27899c67356ed9ceacc3c795bca362d6090baaed06447cc6054cb"
PUBLIC = "97ea4971f8a006a04c090899623b697773312d04dcf75008ba5e247a8e91f4e5"
SESSION = "4f3234a0991d7b019ead35ab28b451b80158119425ecafc113f58a0772a76f43"

# --- hashes and derivations ----------------------------------------------------------------------


def framed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def hkdf(secret: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869 with SHA-256 and no salt."""
    key, blocks = hmac.digest(bytes(32), secret, "sha256"), [b""]
    while len(b"".join(blocks)) < size:
        blocks.append(hmac.digest(key, blocks[-1] + info + bytes([len(blocks)]), "sha256"))
    return b"".join(blocks)[:size]


some_parts = st.lists(st.binary(max_size=40), max_size=4)


@relaxed
@given(st.text(max_size=20), some_parts)
def test_a_digest_is_sha256_over_framed_parts(label: str, parts: list[bytes]) -> None:
    specified = framed(b"fedgestalt/3", label.encode(), *parts)
    assert digest(label, *parts) == hashlib.sha256(specified).digest()


@relaxed
@given(st.binary(max_size=80), st.text(max_size=20), some_parts, st.integers(1, 100))
def test_a_derived_key_is_hkdf_over_such_a_digest(
    secret: bytes, label: str, parts: list[bytes], size: int
) -> None:
    specified = hkdf(secret, digest(label, *parts), size)
    assert derive(secret, label, *parts, size=size) == specified


def test_digests_and_derived_keys_stay_what_they_are() -> None:
    assert digest("label", b"one", b"two").hex() == DIGEST
    assert derive(bytes(32), "label", b"one", b"two").hex() == DERIVED
    public = PrivateKey(bytes(32)).public.encoded
    assert hashlib.sha256(public).hexdigest() == PUBLIC
    assert facts_for(3).digest.hex() == SESSION


@relaxed
@given(st.tuples(st.text(max_size=4), some_parts), st.tuples(st.text(max_size=4), some_parts))
def test_no_two_framings_have_one_digest(
    one: tuple[str, list[bytes]], other: tuple[str, list[bytes]]
) -> None:
    assert (digest(one[0], *one[1]) == digest(other[0], *other[1])) is (one == other)


def test_parts_cannot_be_moved_over_their_borders() -> None:
    length = (1).to_bytes(8, "big")
    framings: list[tuple[str, tuple[bytes, ...]]] = [
        ("ab", ()),
        ("ab", (b"",)),
        ("ab", (b"", b"")),
        ("a", (b"b",)),
        ("", (b"ab",)),
        ("", (b"a", b"b")),
        ("", (b"", b"ab")),
        ("", (b"ab", b"")),
        ("", (b"a" + length + b"b",)),
        ("", (b"a" + length, b"b")),
        ("fedgestalt.secagg/2", (b"ab",)),
    ]
    assert len({digest(label, *parts) for label, parts in framings}) == len(framings)
    assert len({derive(ROOT, label, *parts) for label, parts in framings}) == len(framings)


# --- hybrid keys ---------------------------------------------------------------------------------


def test_a_hybrid_key_is_a_function_of_its_root() -> None:
    key = PrivateKey(ROOT)
    x25519 = X25519PrivateKey.from_private_bytes(derive(ROOT, "x25519 key"))
    mlkem = MLKEM768PrivateKey.from_seed_bytes(derive(ROOT, "ml-kem-768 key", size=64))
    halves = x25519.public_key().public_bytes_raw(), mlkem.public_key().public_bytes_raw()
    assert key.public.encoded == b"".join(halves)
    assert len(key.public.encoded) == PUBLIC_BYTES
    assert PrivateKey(ROOT).public.encoded == key.public.encoded
    secret, ciphertext = key.public.encapsulate()
    assert PrivateKey(ROOT).decapsulate(ciphertext) == secret


def test_both_halves_differ_for_every_bit_of_the_root() -> None:
    public = [PrivateKey(flipped(ROOT, at)).public.encoded for at in range(32)]
    public.append(PrivateKey(ROOT).public.encoded)
    assert len({key[:32] for key in public}) == len({key[32:] for key in public}) == 33


def test_two_sites_have_one_x25519_secret() -> None:
    one, other = PrivateKey(ROOT), PrivateKey(OTHER)
    assert one.exchange(other.public) == other.exchange(one.public)
    assert one.exchange(other.public) != one.exchange(one.public)


def test_a_kem_secret_is_fresh_and_for_its_owner_alone() -> None:
    one, other = PrivateKey(ROOT), PrivateKey(OTHER)
    (secret, ciphertext), again = one.public.encapsulate(), one.public.encapsulate()
    assert (len(secret), len(ciphertext)) == (32, CIPHERTEXT_BYTES)
    assert again != (secret, ciphertext)
    assert one.decapsulate(ciphertext) == secret
    assert other.decapsulate(ciphertext) != secret
    assert one.decapsulate(flipped(ciphertext, 7)) != secret
    for wrong in (b"", ciphertext[:-1], ciphertext + b"\0"):
        with pytest.raises(ValueError, match="ciphertext"):
            one.decapsulate(wrong)


@pytest.mark.parametrize("length", [0, 32, PUBLIC_BYTES - 1, PUBLIC_BYTES + 1])
def test_a_public_key_has_one_length(length: int) -> None:
    with pytest.raises(ValueError, match="another length"):
        PublicKey(bytes(length))


# --- boxes ---------------------------------------------------------------------------------------


@relaxed
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_what_was_sealed_is_opened_by_its_key_and_context(plain: bytes, context: bytes) -> None:
    sealed = seal(ROOT, plain, context)
    assert len(sealed) == len(plain) + TAG_BYTES
    assert unseal(ROOT, sealed, context) == plain
    assert unseal(OTHER, sealed, context) is None
    assert unseal(ROOT, sealed, context + b"\0") is None


@relaxed
@given(st.binary(max_size=60), st.data())
def test_nothing_else_is_opened(plain: bytes, data: st.DataObject) -> None:
    sealed = seal(ROOT, plain, b"")
    at = data.draw(st.integers(0, len(sealed) - 1))
    assert unseal(ROOT, flipped(sealed, at), b"") is None
    assert unseal(ROOT, sealed[:at], b"") is None
    assert unseal(ROOT, sealed + b"\0", b"") is None


# --- what is bound to what -----------------------------------------------------------------------


def uses() -> dict[str, Callable[..., Any]]:
    """Every derivation of two parties, from the same inputs."""
    return {
        "a commitment to a self seed": lambda k, a, b: binding.commitment(
            "self seed", k, a, b, ROOT
        ),
        "a commitment to a share": lambda k, a, b: binding.commitment("seed share", k, a, b, ROOT),
        "a commitment to a root share": lambda k, a, b: binding.commitment(
            "root share", k, a, b, ROOT
        ),
        "a box's digest": lambda k, a, b: binding.box_digest(k, a, b, ROOT),
        "a box's key": lambda k, a, b: binding.channel(k, a, b, ROOT, OTHER, b"")[0],
        "a box's context": lambda k, a, b: binding.channel(k, a, b, ROOT, OTHER, b"")[1],
    }


def _committed(what: str, keys: bytes, dealer: str, holder: str) -> bytes:
    return binding.commitment(what, keys, dealer, holder, ROOT)


@pytest.mark.parametrize("use", uses())
def test_what_is_between_two_sites_is_bound_to_the_session_and_the_direction(use: str) -> None:
    made = uses()[use]
    ways = [(ROOT, A, B), (ROOT, B, A), (ROOT, A, C), (ROOT, C, B), (OTHER, A, B)]
    assert len({made(*way) for way in ways}) == len(ways)
    assert made(ROOT, A, B) == made(ROOT, A, B)


def test_no_use_gives_what_another_gives() -> None:
    made = {use(ROOT, A, B) for use in uses().values()}
    made |= {
        binding.self_stream(ROOT, OTHER, A),
        binding.common_stream(ROOT, OTHER, A),
        binding.pair_stream(ROOT, b"", OTHER, A, B),
        binding.pair_stream(ROOT, OTHER, OTHER, A, B),
        binding.survivors_statement(ROOT, (A, B)),
    }
    assert len(made) == len(uses()) + 5


def test_a_boxs_key_comes_from_both_secrets_and_the_ciphertext() -> None:
    given_to = [(ROOT, OTHER, b"c"), (OTHER, OTHER, b"c"), (ROOT, ROOT, b"c"), (ROOT, OTHER, b"d")]
    keys = {binding.channel(bytes(32), A, B, *each)[0] for each in given_to}
    assert len(keys) == 4


def test_a_pairs_stream_comes_from_both_secrets_and_is_the_same_at_both_ends() -> None:
    given_to = [(ROOT, OTHER, b"T"), (OTHER, OTHER, b"T"), (ROOT, ROOT, b"T"), (ROOT, OTHER, b"U")]
    assert len({binding.pair_stream(*each, A, B) for each in given_to}) == 4
    assert binding.pair_stream(ROOT, OTHER, b"T", A, B) == binding.pair_stream(
        ROOT, OTHER, b"T", B, A
    )
    pairs = {binding.pair_stream(ROOT, OTHER, b"T", *pair) for pair in combinations(NAMES, 2)}
    assert len(pairs) == 16 * 15 / 2


@pytest.mark.parametrize("stream", [binding.self_stream, binding.common_stream])
def test_a_sites_own_stream_is_bound_to_its_name_and_the_session(
    stream: Callable[[bytes, bytes, str], bytes],
) -> None:
    given_to = [(ROOT, b"T", A), (OTHER, b"T", A), (ROOT, b"U", A), (ROOT, b"T", B)]
    assert len({stream(*each) for each in given_to}) == 4


def test_an_escrow_is_opened_by_its_root_for_the_right_sites() -> None:
    later = {B: fingerprint("b"), C: fingerprint("c")}
    escrow = binding.seal_escrow(ROOT, OTHER, later)
    assert binding.open_escrow(ROOT, OTHER, escrow, (B, C)) == later
    assert binding.open_escrow(OTHER, OTHER, escrow, (B, C)) == {}
    assert binding.open_escrow(ROOT, ROOT, escrow, (B, C)) == {}
    assert binding.open_escrow(ROOT, OTHER, escrow[:-1], (B, C)) == {}
    for others in ((), (B,), (B, C, D)):
        assert binding.open_escrow(ROOT, OTHER, escrow, others) == {}
    empty = binding.seal_escrow(ROOT, OTHER, {})
    assert len(empty) == TAG_BYTES
    assert binding.open_escrow(ROOT, OTHER, empty, ()) == {}


def test_survivors_are_told_apart_by_every_name_and_the_session() -> None:
    sets = [(), (A,), (B,), (A, B), (B, A), (A + B,), (A, B, "")]
    said = {binding.survivors_statement(key, sites) for sites in sets for key in (ROOT, OTHER)}
    assert len(said) == 14


def test_the_digests_of_keys_and_headers_cover_every_byte() -> None:
    parties = Parties(facts_for(3), identity=QuickIdentity).until(Parties.receive)
    facts, offers = parties.facts, dict(parties.server.key_list().offers)
    headers = dict(parties.server.delivery(A).headers)
    of_keys, of_headers = {binding.keys_digest(facts, offers)}, set[bytes]()
    of_headers.add(binding.shares_digest(facts, ROOT, headers))
    of_headers.add(binding.shares_digest(facts, OTHER, headers))
    statements = {binding.header_statement(ROOT, B, headers[B])}
    statements.add(binding.header_statement(ROOT, A, headers[B]))
    statements.add(binding.header_statement(OTHER, B, headers[B]))
    for field in vars(offers[B]):
        changed = replace(offers[B], **{field: flipped(getattr(offers[B], field))})
        of_keys.add(binding.keys_digest(facts, offers | {B: changed}))
    assert len(of_keys) == 1 + len(vars(offers[B]))
    for field, value in vars(headers[B]).items():
        for other in others_than(value):
            changed = replace(headers[B], **{field: other})
            of_headers.add(binding.shares_digest(facts, ROOT, headers | {B: changed}))
            statements.add(binding.header_statement(ROOT, B, changed))
    changes = {field: len(others_than(value)) for field, value in vars(headers[B]).items()}
    assert len(of_headers) == 2 + sum(changes.values())
    assert len(statements) == 3 + sum(changes.values()) - changes["signature"]


def others_than(value: Any) -> list[Any]:
    """Values that differ from this one in a byte, a key or an entry."""
    if isinstance(value, bytes):
        return [flipped(value), value + b"\0"] if value else [b"\0"]
    key = next(iter(value))
    renamed = {("x" if site == key else site): content for site, content in value.items()}
    fewer = {site: content for site, content in value.items() if site != key}
    return [value | {key: flipped(value[key])}, renamed, fewer, value | {"x": bytes(32)}]


def test_the_order_of_a_mapping_says_nothing() -> None:
    parties = Parties(facts_for(3), identity=QuickIdentity).until(Parties.receive)
    header = parties.server.delivery(A).headers[B]
    backwards = replace(header, seed_shares=dict(reversed(header.seed_shares.items())))
    assert binding.header_statement(ROOT, B, backwards) == binding.header_statement(ROOT, B, header)
