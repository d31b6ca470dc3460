"""A kernel's life: agreed on, passed on, kept; and sealed labels."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from fedgestalt.errors import ConfigError, PeerError, ServerError, SiteError
from fedgestalt.similarity.kernel import (
    Kernel,
    KernelExchange,
    KernelFacts,
    KernelKeys,
    SealedContributions,
    SealedKernels,
    check_key,
    decoded,
    encoded,
)
from fedgestalt.similarity.labels import (
    MAXIMUM_TERMS,
    PLANTED,
    SEALED_BYTES,
    Label,
    new_handle,
    open_label,
    seal_label,
)

SITES = ("berlin", "bonn", "leuven")
PRINTS = {site: hashlib.sha256(site.encode()).digest() for site in SITES}
FACTS = KernelFacts("job", 1, 1, "e" * 64, "4x8-4x8", "isometry", PRINTS)
HANDING = dataclasses.replace(FACTS, version=3, sponsor="bonn")
KERNEL = Kernel(3, "e" * 64, "4x8-4x8", "isometry", bytes(range(32)))


@dataclasses.dataclass(frozen=True)
class Seal:
    """Signs by a hash that everybody could make: what is signed is tested here, not by whom."""

    site: str

    def sign(self, statement: bytes) -> bytes:
        return hashlib.sha256(self.site.encode() + statement).digest()

    def verify(self, statement: bytes, signature: bytes) -> None:
        if self.sign(statement) != signature:
            raise PeerError("its signature does not fit", site=self.site)


def exchange(site: str, facts: KernelFacts = FACTS, **more: Any) -> KernelExchange:
    peers = {peer: Seal(peer) for peer in facts.roster if peer != site}
    return KernelExchange(site, facts, Seal(site), peers, **more)


def met(facts: KernelFacts = FACTS, **more: Any) -> dict[str, KernelExchange]:
    """All sites, with each other's keys."""
    sites = {site: exchange(site, facts, **more) for site in facts.sites}
    keys = KernelKeys({site: one.offer() for site, one in sites.items()})
    for one in sites.values():
        one.meet(keys)
    return sites


def boxes_of(sites: dict[str, KernelExchange]) -> dict[str, dict[str, bytes]]:
    """Sealed contributions, by receiver and sender."""
    sealed = {site: one.contribute().boxes for site, one in sites.items()}
    return {to: {by: sealed[by][to] for by in sites if by != to} for to in sites}


def agreed(facts: KernelFacts = FACTS) -> dict[str, Kernel]:
    sites = met(facts)
    boxes = boxes_of(sites)
    return {site: one.agree(SealedContributions(boxes[site])) for site, one in sites.items()}


# --- an agreement --------------------------------------------------------------------------------


def test_all_sites_agree_and_two_sessions_differ() -> None:
    first, second = agreed(), agreed()
    assert len(set(first.values())) == 1
    for what in ("id", "masking_seed", "label_key", "secret"):
        assert len({getattr(k, what) for k in (*first.values(), *second.values())}) == 2
    kernel = first["bonn"]
    assert (kernel.version, kernel.ensemble, kernel.strategy) == (1, "e" * 64, "isometry")


def test_every_contribution_changes_the_kernel() -> None:
    for changed in SITES:
        secrets_ = set()
        for contribution in (b"\7" * 32, b"\x08" * 32):
            draws = {s: [hashlib.sha256(s.encode()).digest(), b"\5" * 32] for s in SITES}
            draws[changed][1] = contribution
            sites = {s: exchange(s, entropy=lambda _, d=draws[s]: d.pop(0)) for s in SITES}
            keys = KernelKeys({s: one.offer() for s, one in sites.items()})
            for one in sites.values():
                one.meet(keys)
            boxes = boxes_of(sites)
            secrets_ |= {sites[s].agree(SealedContributions(boxes[s])).secret for s in SITES}
        assert len(secrets_) == 2


def test_seed_label_key_transfer_key_and_id_are_different_things() -> None:
    kernel = agreed()["bonn"]
    keys = {kernel.masking_seed, kernel.label_key, kernel.secret, kernel.transfer_key("job")}
    assert len(keys) == 4
    assert kernel.transfer_key("job") != kernel.transfer_key("another")
    assert not any(key.startswith(bytes.fromhex(kernel.id)) for key in keys)


def test_secrets_do_not_show_in_the_representation() -> None:
    kernel = agreed()["bonn"]
    for secret in (kernel.secret, kernel.masking_seed, kernel.label_key):
        assert secret.hex() not in repr(kernel)
        assert repr(secret) not in repr(kernel)
        assert repr(secret) not in f"{[kernel]}"


@pytest.mark.parametrize("what", ["version", "ensemble", "layout", "strategy", "secret"])
def test_the_id_names_everything_that_a_kernel_is(what: str) -> None:
    other: dict[str, Any] = {
        "version": 4,
        "ensemble": "f" * 64,
        "layout": "4x8",
        "strategy": "flake",
        "secret": bytes(32),
    }
    assert dataclasses.replace(KERNEL, **{what: other[what]}).id != KERNEL.id


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("f" * 64, "4x8-4x8", "isometry"), f"encodings of ensemble {'e' * 64}, not of {'f' * 64}"),
        (("e" * 64, "12x512", "isometry"), "encodings of layout 4x8-4x8, not of 12x512"),
        (("e" * 64, "4x8-4x8", "flake"), "encodings of strategy isometry, not of flake"),
    ],
)
def test_encodings_of_another_kind_are_refused_naming_both(
    asked: tuple[str, str, str], says: str
) -> None:
    with pytest.raises(SiteError, match=says) as caught:
        KERNEL.check(*asked, SiteError)
    assert KERNEL.id in str(caught.value)


# --- what a server or a site may try -------------------------------------------------------------


def test_an_altered_or_swapped_box_is_caught_in_its_senders_name() -> None:
    for change in ("altered", "swapped", "its ciphertext"):
        sites = met()
        boxes = boxes_of(sites)
        mine = dict(boxes["bonn"])
        if change == "swapped":
            mine["berlin"] = boxes["leuven"]["berlin"]
        else:
            at = -1 if change == "altered" else 5
            box = bytearray(mine["berlin"])
            box[at] ^= 1
            mine["berlin"] = bytes(box)
        with pytest.raises(PeerError, match="does not open") as caught:
            sites["bonn"].agree(SealedContributions(mine))
        assert caught.value.site == "berlin"


def test_a_server_cannot_leave_out_repeat_or_replace_a_key_or_box() -> None:
    sites = {site: exchange(site) for site in SITES}
    given = {site: one.offer() for site, one in sites.items()}
    stranger = exchange("berlin").offer()
    for changed, match in (
        ({k: v for k, v in given.items() if k != "leuven"}, "agreed roster"),
        ({**given, "bonn": exchange("bonn").offer()}, "came back altered"),
        ({**given, "berlin": given["leuven"]}, "same key"),
    ):
        with pytest.raises(ServerError, match=match):
            sites["bonn"].meet(KernelKeys(changed))
    forged = dataclasses.replace(stranger, signature=given["berlin"].signature)
    with pytest.raises(PeerError, match="signature does not fit") as caught:
        sites["bonn"].meet(KernelKeys({**given, "berlin": forged}))
    assert caught.value.site == "berlin"
    with pytest.raises(ServerError, match="came early"):
        sites["bonn"].contribute()
    box = boxes_of(met())["bonn"]["berlin"]
    with pytest.raises(ServerError, match="agreed roster"):
        met()["bonn"].agree(SealedContributions({"berlin": box}))


OTHERS: dict[str, Callable[[KernelFacts], KernelFacts]] = {
    "job": lambda f: dataclasses.replace(f, job="another"),
    "attempt": lambda f: dataclasses.replace(f, attempt=2),
    "version": lambda f: dataclasses.replace(f, version=2),
    "ensemble": lambda f: dataclasses.replace(f, ensemble="f" * 64),
    "layout": lambda f: dataclasses.replace(f, layout="4x8"),
    "strategy": lambda f: dataclasses.replace(f, strategy="flake"),
    "sponsor": lambda f: dataclasses.replace(f, sponsor="berlin"),
    "held": lambda f: dataclasses.replace(f, held="a" * 32),
    "a certificate": lambda f: dataclasses.replace(f, roster={**f.roster, "bonn": bytes(32)}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_site_that_was_told_something_else_is_noticed(what: str) -> None:
    facts = OTHERS[what](FACTS)
    assert facts.digest != FACTS.digest
    key = exchange("berlin", facts).offer()
    with pytest.raises(PeerError, match="it sees another session"):
        check_key(FACTS, "berlin", key, Seal("berlin"))
    with pytest.raises(PeerError, match="signature does not fit"):
        pretended = dataclasses.replace(key, session=FACTS.digest)
        check_key(FACTS, "berlin", pretended, Seal("berlin"))


def test_a_degenerate_key_is_the_peers_fault() -> None:
    key = exchange("leuven").offer()
    weak = bytes(len(key.public_key))
    one = exchange("leuven")
    one._private = type("Weak", (), {"public": type("Public", (), {"encoded": weak})})()  # type: ignore[assignment]
    with pytest.raises(PeerError, match="signed a key that is none"):
        check_key(FACTS, "leuven", one.offer(), Seal("leuven"))


def test_a_site_keeps_its_own_minimum_number_of_sites() -> None:
    with pytest.raises(SiteError, match="3 sites agree on a kernel, this site's policy asks for 4"):
        exchange("bonn", minimum_sites=4)
    exchange("bonn", HANDING, minimum_sites=4)  # nothing is agreed on: one has the kernel


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (dataclasses.replace(FACTS, sponsor="paris"), "the sponsor takes no part"),
        (dataclasses.replace(FACTS, roster={"bonn": bytes(32)}), "lacks this site"),
    ],
)
def test_facts_that_cannot_be_right_are_the_servers_fault(facts: KernelFacts, says: str) -> None:
    with pytest.raises(ServerError, match=says):
        KernelExchange("leuven", facts, Seal("leuven"), {}) if "lacks" in says else exchange(
            "leuven", facts
        )


# --- passing it on -------------------------------------------------------------------------------


def test_a_later_site_gets_the_kernel_from_one_that_has_it() -> None:
    sites = met(HANDING)
    boxes = sites["bonn"].hand_over(KERNEL).boxes
    assert boxes.keys() == {"berlin", "leuven"}
    for site in boxes:
        taken = sites[site].take_over(SealedKernels({"bonn": boxes[site]}))
        assert taken == KERNEL
        assert taken.id == KERNEL.id
    assert KERNEL.secret not in b"".join(boxes.values())


def test_a_kernel_that_is_not_the_sponsors_or_for_another_site_is_refused() -> None:
    sites = met(HANDING)
    boxes = sites["bonn"].hand_over(KERNEL).boxes
    with pytest.raises(PeerError, match="its sealed kernel does not open") as caught:
        sites["leuven"].take_over(SealedKernels({"bonn": boxes["berlin"]}))
    assert caught.value.site == "bonn"
    with pytest.raises(ServerError, match="not the sponsor's"):
        sites["leuven"].take_over(SealedKernels({"berlin": boxes["leuven"]}))
    with pytest.raises(ServerError, match="not the sponsor"):
        sites["leuven"].hand_over(KERNEL)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "the kernel has version 2, not 3"),
        ({"ensemble": "f" * 64}, "encodings of ensemble"),
        ({"strategy": "flake"}, "encodings of strategy flake, not of isometry"),
    ],
)
def test_a_sponsor_hands_over_what_the_job_is_about(change: dict[str, Any], says: str) -> None:
    sites, other = met(HANDING), dataclasses.replace(KERNEL, **change)
    with pytest.raises(ServerError, match=says):
        sites["bonn"].hand_over(other)
    sites["bonn"]._check = lambda *_: None  # type: ignore[method-assign]
    boxes = sites["bonn"].hand_over(other).boxes
    with pytest.raises(PeerError, match=says):
        sites["leuven"].take_over(SealedKernels({"bonn": boxes["leuven"]}))


def test_a_kernel_is_kept_as_bytes_and_nothing_else_passes_for_one() -> None:
    def fault(what: str) -> ConfigError:
        return ConfigError(what)

    content = encoded(KERNEL)
    assert decoded(content, fault) == KERNEL
    for wrong in (b"", b"\xff", content[:-1], content[:-2], content + b"\n", content[9:]):
        with pytest.raises(ConfigError):
            decoded(wrong, fault)


# --- labels --------------------------------------------------------------------------------------


def test_a_sealed_label_opens_for_its_row_only() -> None:
    kernel, handle = agreed()["bonn"], new_handle()
    terms = ("HP:0000154", "HP:9999999")
    label = Label(-7, 2**32 - 1, b"\1" * 16, "Universitätsklinikum Bonn", terms)
    sealed = seal_label(label, kernel, handle)
    assert open_label(sealed, kernel, handle) == label
    other = agreed()["bonn"]
    for attempt in (
        (sealed, kernel, new_handle()),
        (sealed, other, handle),
        (sealed[:-1] + bytes([sealed[-1] ^ 1]), kernel, handle),
    ):
        with pytest.raises(ServerError, match="altered or moved"):
            open_label(*attempt)


def test_a_patient_with_more_terms_than_fit_is_known_by_the_first_of_them() -> None:
    kernel, handle = agreed()["bonn"], new_handle()
    terms = tuple(f"HP:{number:07d}" for number in range(1, MAXIMUM_TERMS + 20))
    sealed = seal_label(Label(5, 1, hpo=terms), kernel, handle)
    assert open_label(sealed, kernel, handle).hpo == terms[:MAXIMUM_TERMS]


def test_all_sealed_labels_have_one_length_and_never_repeat() -> None:
    kernel, handle = agreed()["bonn"], new_handle()
    some = (
        Label(5, 1),
        Label(-1, PLANTED),
        Label(5, 1, bytes(16), "a" * 64),
        Label(5, 1, hospital="é" * 90),
        Label(5, 1, hpo=tuple(f"HP:{n:07d}" for n in range(1, 1 + MAXIMUM_TERMS))),
    )
    sealed = [seal_label(label, kernel, handle) for label in some * 20]
    assert {len(s) for s in sealed} == {SEALED_BYTES}
    assert len(set(sealed)) == 100
    assert open_label(sealed[3], kernel, handle).hospital == "é" * 32
