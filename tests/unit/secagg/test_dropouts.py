"""Sites are lost at every point of a round: the sum of the others is right to the bit, or closed.

Every message is encoded, decoded and checked on its way. Late losses branch off one session per
consortium whose vectors are masked, so that there is time for all subsets.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from parties import (
    EARLY,
    LATE,
    NAMES,
    Losses,
    Lost,
    Opened,
    Parties,
    QuickIdentity,
    begun_again,
    facts_for,
    open_round,
    open_sum,
    plan_for,
    refused,
    vector_of,
)

from fedgestalt.errors import ServerError, SiteError
from fedgestalt.secagg import AES, CHACHA20, Recipient, SitePolicy, ThreatModel

SIZES = (3, 4, 5, 8, 16)
CONSORTIA = [(n, threat) for n in SIZES for threat in ThreatModel]
SURVIVABLE = [
    (n, threat, count) for n, threat in CONSORTIA for count in range(1, n - threat.threshold(n) + 1)
]


@functools.cache
def masked(
    n: int,
    threat: ThreatModel,
    recipient: Recipient = Recipient.SERVER,
    cipher: str = AES,
) -> Parties:
    """A session whose sites have masked their vectors."""
    facts = facts_for(n, threat.threshold(n), recipient=recipient, cipher=cipher)
    return Parties(facts, identity=QuickIdentity).until(Parties.upload)


def subsets(n: int, count: int) -> list[tuple[str, ...]]:
    """All ways to lose ``count`` of up to 8 sites; of 16 the first, last, spread, and others."""
    names = NAMES[:n]
    if n <= 8:
        return list(itertools.combinations(names, count))
    chance = random.Random(count)  # noqa: S311  not for secrets
    some = {tuple(sorted(chance.sample(names, count))) for _ in range(3)}
    return sorted({names[:count], names[-count:], names[:: n // count][:count], *some})


def phases(n: int, lost: tuple[str, ...]) -> Iterator[Losses]:
    """All phases of each lost site, in small consortia; else one for all, and one for each."""
    if n <= 5:
        each = itertools.product(LATE, repeat=len(lost))
    else:
        mixed = random.Random(str(lost)).choices(LATE, k=len(lost))  # noqa: S311
        each = itertools.chain(((phase,) * len(lost) for phase in LATE), [tuple(mixed)])
    for when in each:
        yield dict(zip(lost, when, strict=True))


def arrived(n: int, losses: Losses) -> tuple[str, ...]:
    """Sites whose vector is in the sum."""
    never = {Lost.AFTER_SHARES, Lost.IN_MID_UPLOAD}
    return tuple(site for site in NAMES[:n] if losses.get(site) not in never)


@pytest.mark.parametrize(("n", "threat"), CONSORTIA)
def test_with_all_sites_the_sum_is_that_of_the_plain_words(n: int, threat: ThreatModel) -> None:
    opened = open_sum(masked(n, threat))
    assert opened.survivors == NAMES[:n]
    assert opened.is_exact


@pytest.mark.parametrize(("n", "threat", "count"), SURVIVABLE)
def test_the_sum_is_that_of_the_survivors_whoever_is_lost_late(
    n: int, threat: ThreatModel, count: int
) -> None:
    for lost in subsets(n, count):
        for losses in phases(n, lost):
            opened = open_sum(masked(n, threat), losses)
            assert opened.survivors == arrived(n, losses), losses
            assert opened.is_exact, losses


def test_the_matrix_covers_what_each_threshold_allows() -> None:
    most = {(n, threat): n - threat.threshold(n) for n, threat in CONSORTIA}
    malicious = [most[n, ThreatModel.MALICIOUS] for n in SIZES]
    curious = [most[n, ThreatModel.HONEST_BUT_CURIOUS] for n in SIZES]
    assert (malicious, curious) == ([0, 1, 1, 2, 5], [1, 1, 2, 3, 7])


# --- a round that begins anew --------------------------------------------------------------------


@pytest.mark.parametrize("when", EARLY)
@pytest.mark.parametrize(
    ("n", "count"), [(4, 1), (5, 1), (5, 2), (8, 1), (8, 5), (16, 1), (16, 7), (16, 13)]
)
def test_whoever_is_lost_early_costs_a_new_session_of_those_that_remain(
    n: int, count: int, when: Lost
) -> None:
    some = subsets(n, count)
    for lost in some if n <= 5 else [some[0], some[-1]]:
        opened = open_round(facts_for(n), ThreatModel.MALICIOUS, dict.fromkeys(lost, when))
        assert opened.survivors == tuple(sorted(set(NAMES[:n]) - set(lost)))
        assert opened.parties.facts.attempt == 2
        assert opened.is_exact


@pytest.mark.parametrize("threat", ThreatModel)
def test_losses_at_all_phases_of_one_round_add_up(threat: ThreatModel) -> None:
    chance = random.Random(threat)  # noqa: S311
    for _ in range(2):
        lost = chance.sample(NAMES, 6)
        losses = dict(zip(lost, Lost, strict=True))
        opened = open_round(facts_for(16, threat.threshold(16)), threat, losses)
        assert opened.parties.facts.attempt == 3
        assert opened.survivors == tuple(sorted(set(NAMES) - set(lost[:4])))
        assert opened.is_exact


@pytest.mark.parametrize("when", EARLY)
def test_fewer_than_three_sites_do_not_begin_anew(when: Lost) -> None:
    with refused(SiteError, "site-01: 2 sites take part, this site's policy asks for 3"):
        open_round(facts_for(3), ThreatModel.MALICIOUS, {NAMES[0]: when})


def test_a_new_session_takes_no_message_of_the_one_before() -> None:
    facts = facts_for(4)
    before = Parties(facts).until(Parties.receive)
    now = Parties(begun_again(facts, ThreatModel.MALICIOUS, NAMES[3:]))
    assert now.facts.digest != before.facts.digest
    now.until(Parties.receive)
    with refused(ServerError, "not those of the agreed roster"):
        now.sites[NAMES[0]].receive(before.server.delivery(NAMES[0]))


# --- one more than allowed -----------------------------------------------------------------------

TOO_FEW = {
    Lost.AFTER_SHARES: "sites have sent their vectors",
    Lost.IN_MID_UPLOAD: "sites have sent their vectors",
    Lost.AFTER_UPLOAD: "sites have signed the survivors",
    Lost.BEFORE_UNMASK: "sites have sent their shares",
}


@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize(("n", "threat"), CONSORTIA)
def test_one_loss_more_leaves_the_sum_closed_and_the_next_round_opens_its_own(
    n: int, threat: ThreatModel, when: Lost
) -> None:
    threshold = threat.threshold(n)
    some = subsets(n, n - threshold + 1)
    for lost in some if n <= 4 else [some[0], some[-1]]:
        parties = masked(n, threat).copy()
        says = f"session: {threshold - 1} of {n} {TOO_FEW[when]}, {threshold} are needed"
        with refused(ServerError, says):
            open_sum(parties, dict.fromkeys(lost, when))
    facts = replace(masked(n, threat).facts, round=2)
    if n == 16 and when is not LATE[0]:
        return
    assert open_round(facts, threat).is_exact
    if n - len(lost) >= 3:
        rest = replace(begun_again(facts, threat, lost), round=3, attempt=1)
        assert open_round(rest, threat).is_exact


@pytest.mark.parametrize("when", LATE)
def test_a_sum_that_too_few_sites_carry_is_never_opened(when: Lost) -> None:
    parties = masked(5, ThreatModel.MALICIOUS).copy()
    for phase, step in (
        (Lost.IN_MID_UPLOAD, parties.upload),
        (Lost.AFTER_UPLOAD, parties.endorse),
        (Lost.BEFORE_UNMASK, parties.unmask),
    ):
        with contextlib.suppress(ServerError):
            step(without=NAMES[1:3] if when.value <= phase.value else ())
    for _ in range(2):
        with refused(ServerError, "the sum stays closed"):
            parties.server.total()


def test_a_sum_that_was_ended_too_early_stays_closed_for_later_vectors() -> None:
    parties = masked(3, ThreatModel.MALICIOUS).copy()
    parties.upload(without=NAMES[2:])
    with refused(ServerError, "2 of 3 sites have sent their vectors, 3 are needed"):
        parties.server.close()
    with refused(ServerError, "the sum stays closed"):
        parties.server.accept_vector(NAMES[2], vector_of(parties.masked[NAMES[2]]), 79)
    with refused(ServerError, "the sum stays closed"):
        parties.server.close()


def test_a_site_whose_policy_asks_for_more_survivors_signs_nothing() -> None:
    policy = SitePolicy(4, 4, ThreatModel.MALICIOUS)
    parties = Parties(facts_for(4), policy=policy).until(Parties.upload)
    parties.upload(without=NAMES[:1])
    says = "3 sites are left in the sum, this site's policy asks for 4; nothing was opened"
    with refused(SiteError, says):
        parties.endorse()


# --- the other recipient and the other cipher ----------------------------------------------------


def unveiled(opened: Opened, site: str) -> Opened:
    total = opened.total.copy()
    opened.parties.sites[site].unveil(total, opened.survivors)
    return replace(opened, total=total)


@pytest.mark.parametrize("cipher", [AES, CHACHA20])
@pytest.mark.parametrize("recipient", Recipient)
@pytest.mark.parametrize("n", [3, 4, 5])
def test_sites_that_alone_learn_the_sum_take_their_mask_off_it(
    n: int, recipient: Recipient, cipher: str
) -> None:
    threat = ThreatModel.HONEST_BUT_CURIOUS
    parties = masked(n, threat, recipient, cipher)
    for count in range(n - threat.threshold(n) + 1):
        for lost in subsets(n, count):
            for losses in phases(n, lost):
                opened = open_sum(parties, losses)
                assert opened.survivors == arrived(n, losses)
                assert opened.is_exact is (recipient is Recipient.SERVER)
                if recipient is Recipient.SITES:
                    assert all(unveiled(opened, site).is_exact for site in NAMES[:n])


@pytest.mark.parametrize("when", EARLY)
def test_a_new_session_has_a_dealer_of_its_own_if_the_first_site_is_lost(when: Lost) -> None:
    facts = facts_for(5, recipient=Recipient.SITES, cipher=CHACHA20)
    opened = open_round(facts, ThreatModel.MALICIOUS, {NAMES[0]: when, NAMES[1]: LATE[0]})
    assert opened.survivors == NAMES[2:5]
    assert not opened.is_exact
    for site in opened.survivors:
        assert unveiled(opened, site).is_exact


def test_many_sites_alone_learn_a_sum_without_its_dealer() -> None:
    parties = masked(16, ThreatModel.MALICIOUS, Recipient.SITES)
    losses = dict(zip((*NAMES[:3], NAMES[9], NAMES[15]), (*LATE, LATE[0]), strict=True))
    opened = open_sum(parties, losses)
    assert opened.survivors == arrived(16, losses)
    for site in opened.survivors:
        assert unveiled(opened, site).is_exact


def test_vectors_of_many_segments_are_summed_alike() -> None:
    facts = facts_for(4, plan=plan_for(4, (2 << 20) + 12_345))
    opened = open_sum(Parties(facts).until(Parties.receive), {NAMES[1]: Lost.AFTER_SHARES})
    assert np.array_equal(opened.total, opened.parties.sum_of(opened.survivors))
