"""Agreement on a kernel, and sealed labels."""

from __future__ import annotations

import dataclasses

import pytest

from fedgestalt.errors import PeerError, ServerError, SiteError
from fedgestalt.similarity.kernel import (
    Kernel,
    KernelAgreement,
    KernelFacts,
    KernelKeys,
    SealedContributions,
)
from fedgestalt.similarity.labels import SEALED_BYTES, Label, new_handle, open_label, seal_label

SITES = ("berlin", "bonn", "leuven")
FACTS = KernelFacts("job", "e" * 64, "isometry", SITES)


def exchanged() -> tuple[dict[str, KernelAgreement], KernelKeys, dict[str, dict[str, bytes]]]:
    """All sites up to their sealed contributions, sorted by receiver."""
    agreements = {site: KernelAgreement(site, FACTS) for site in SITES}
    keys = KernelKeys({site: a.offer().public_key for site, a in agreements.items()})
    boxes: dict[str, dict[str, bytes]] = {site: {} for site in SITES}
    for sender, agreement in agreements.items():
        for receiver, box in agreement.seal(keys).boxes.items():
            boxes[receiver][sender] = box
    return agreements, keys, boxes


def agreed() -> dict[str, Kernel]:
    agreements, _, boxes = exchanged()
    return {site: a.agree(SealedContributions(boxes[site])) for site, a in agreements.items()}


def test_all_sites_agree_and_two_sessions_differ() -> None:
    first, second = agreed(), agreed()
    assert len(set(first.values())) == 1
    assert len({k.masking_seed for k in (*first.values(), *second.values())}) == 2
    assert len({k.id for k in (*first.values(), *second.values())}) == 2


def test_seed_label_key_and_id_are_three_different_things() -> None:
    kernel = agreed()["bonn"]
    assert kernel.masking_seed != kernel.label_key
    assert not kernel.masking_seed.startswith(bytes.fromhex(kernel.id))


def test_secrets_do_not_show_in_the_representation() -> None:
    kernel = agreed()["bonn"]
    assert kernel.masking_seed.hex() not in repr(kernel)
    assert repr(kernel.masking_seed) not in repr(kernel)
    assert repr(kernel.label_key) not in repr(kernel)


def test_every_contribution_changes_the_kernel() -> None:
    agreements, keys, boxes = exchanged()
    before = {s: a.agree(SealedContributions(boxes[s])) for s, a in agreements.items()}
    fixed = {"bonn": b"\1" * 32, "berlin": b"\2" * 32, "leuven": b"\3" * 32}
    for changed in SITES:
        kernels = []
        for contribution in (b"\7" * 32, b"\x08" * 32):
            draws = {s: iter([fixed[s], b"\5" * 32]) for s in SITES}
            draws[changed] = iter([fixed[changed], contribution])
            sites = {
                s: KernelAgreement(s, FACTS, entropy=lambda _, d=draws[s]: next(d)) for s in SITES
            }
            keys = KernelKeys({s: a.offer().public_key for s, a in sites.items()})
            sealed = {s: a.seal(keys).boxes for s, a in sites.items()}
            received = {o: sealed[o]["bonn"] for o in SITES if o != "bonn"}
            kernels.append(sites["bonn"].agree(SealedContributions(received)))
        assert kernels[0].masking_seed != kernels[1].masking_seed
    assert len(set(before.values())) == 1


def test_an_altered_or_swapped_box_is_caught_in_its_senders_name() -> None:
    for change in ("altered", "swapped"):
        agreements, _, boxes = exchanged()
        mine = dict(boxes["bonn"])
        if change == "altered":
            mine["berlin"] = bytes([mine["berlin"][0] ^ 1]) + mine["berlin"][1:]
        else:
            mine["berlin"] = boxes["leuven"]["berlin"]
        with pytest.raises(PeerError, match="does not open") as caught:
            agreements["bonn"].agree(SealedContributions(mine))
        assert caught.value.site == "berlin"


def test_a_server_cannot_leave_out_repeat_or_replace_a_sites_key_or_box() -> None:
    agreements, keys, boxes = exchanged()
    given = dict(keys.public_keys)
    bonn = agreements["bonn"]
    for changed, match in (
        ({k: v for k, v in given.items() if k != "leuven"}, "agreed roster"),
        ({**given, "bonn": bytes(range(32))}, "came back altered"),
        ({**given, "berlin": given["leuven"]}, "same key"),
    ):
        with pytest.raises(ServerError, match=match):
            bonn.seal(KernelKeys(changed))
    with pytest.raises(ServerError, match="agreed roster"):
        bonn.agree(SealedContributions({"berlin": boxes["bonn"]["berlin"]}))


def test_a_degenerate_key_is_the_peers_fault() -> None:
    agreements, keys, _ = exchanged()
    weak = KernelKeys({**keys.public_keys, "leuven": bytes(32)})
    with pytest.raises(PeerError, match="degenerate"):
        agreements["bonn"].seal(weak)


def test_a_site_keeps_its_own_minimum_number_of_sites() -> None:
    with pytest.raises(SiteError, match="3 sites take part, this site's policy asks for 4"):
        KernelAgreement("bonn", FACTS, minimum_sites=4)


@pytest.mark.parametrize("field", ["job", "ensemble_digest", "strategy"])
def test_facts_that_differ_give_another_session(field: str) -> None:
    other = dataclasses.replace(FACTS, **{field: "f" * 64})
    assert other.digest != FACTS.digest


def test_a_sealed_label_opens_for_its_row_only() -> None:
    kernel, handle = agreed()["bonn"], new_handle()
    label = Label(-7, 2**32 - 1)
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


def test_all_sealed_labels_have_one_length_and_never_repeat() -> None:
    kernel, handle = agreed()["bonn"], new_handle()
    sealed = [seal_label(Label(5, 1), kernel, handle) for _ in range(50)]
    assert {len(s) for s in sealed} == {SEALED_BYTES}
    assert len(set(sealed)) == 50
