"""Messages of the matching jobs, beside those of :mod:`fedgestalt.similarity.kernel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.keys import digest
from fedgestalt.messages import (
    MAXIMUM_SITES,
    Fault,
    Message,
    array,
    arrays_by_name,
    hexadecimal,
    integer,
    message,
    message_by_site,
    octets,
    octets_by_site,
    real,
    several,
    text,
    texts_by_name,
    word,
)
from fedgestalt.similarity.kernel import (
    MAXIMUM_VERSION,
    KernelKeys,
    SealedContributions,
    SealedKernels,
)
from fedgestalt.similarity.labels import HANDLE_BYTES, SEALED_BYTES

MATCH, ONBOARD, GALLERY, DISCOVER = "match", "onboard", "gallery", "discover"
"""What a matching job is for: also the names of the job templates, which a site's policy lists."""

KERNEL_DIGITS: Final = 32
UPLOAD_BYTES: Final = 16
YARDSTICK_ROWS: Final = 32
"""Best rows that a site gets for each of its yardstick's images."""
MAXIMUM_YARDSTICK: Final = 999
MAXIMUM_WITHDRAWALS: Final = 4096
"""Most lists of withdrawn rows that are open at a time."""
_SITES_EVER: Final = 1024
_ROW_LIMIT = 2**31
_SIGNATURE_LIMIT = 1024
_WORDS_LIMIT = 2**32

Handles = NDArray[np.uint8]
"""(n, ``HANDLE_BYTES``)"""


@dataclass(frozen=True)
class MatchStart(Message):
    """Server to sites: the facts of a job.

    Attributes:
        purpose: ``match``, ``onboard``, ``gallery`` or ``discover``.
        roster: all sites.
        ensemble: digest of the model that encodes.
        strategy: name of the matching strategy.
        ranking: name of the ranking strategy.
        released_rows: best rows per query; 0 asks for an evaluation release, every row for every
            query.
        standing: whether kernel and gallery outlive the job (1) or not (0).
        yardstick: most diagnosed subjects of its own with which a site measures what is near.
        hpo_weight: of HPO terms beside faces, in the ranks.
    """

    schema: ClassVar[str] = "fedgestalt.matching.start/3"
    purpose: str = word(20)
    roster: tuple[str, ...] = several(text(), MAXIMUM_SITES)
    ensemble: str = hexadecimal()
    strategy: str = word(64)
    ranking: str = word(64)
    released_rows: int = integer(0, _ROW_LIMIT)
    standing: int = integer(0, 1)
    yardstick: int = integer(0, MAXIMUM_YARDSTICK)
    hpo_weight: float = real(0, 1)


@dataclass(frozen=True)
class Ask(Message):
    """Server to sites: say which kernels you hold for this ensemble and strategy."""

    schema: ClassVar[str] = "fedgestalt.matching.ask/1"


@dataclass(frozen=True)
class Holdings(Message):
    """Site to server: what it has of what the job needs.

    Attributes:
        kernels: version by kernel id.
        has_ensemble: 1 if it holds the model.
        layout: of its encodings; empty without the model.
    """

    schema: ClassVar[str] = "fedgestalt.matching.holdings/1"
    kernels: Mapping[str, str] = texts_by_name()
    has_ensemble: int = integer(0, 1)
    layout: str = word(200)


@dataclass(frozen=True)
class ExchangeStart(Message):
    """Server to sites: the facts of a kernel exchange, beside those of the job.

    Attributes:
        attempt, version, layout: see :class:`fedgestalt.similarity.kernel.KernelFacts`.
        sponsor: who hands its kernel over; nobody if all agree on a new one.
        held: the kernel that all hold already, if they meet to seal for each other.
        certificates: PEM, of all who take part.
    """

    schema: ClassVar[str] = "fedgestalt.matching.exchange-start/2"
    attempt: int = integer(1, 10**6)
    version: int = integer(1, MAXIMUM_VERSION)
    layout: str = word(200)
    sponsor: tuple[str, ...] = several(text(), 1)
    held: tuple[str, ...] = several(text(), 1)
    certificates: Mapping[str, bytes] = octets_by_site(1, 1 << 14)


@dataclass(frozen=True)
class HandOver(Message):
    """Server to sponsor: the newcomers' keys and its own; pass this kernel on."""

    schema: ClassVar[str] = "fedgestalt.matching.hand-over/1"
    keys: KernelKeys = message(KernelKeys)
    kernel: str = hexadecimal(KERNEL_DIGITS)


@dataclass(frozen=True)
class HandedOver(Message):
    """Sponsor to server: the sealed kernels, and the size of the sealed ensemble in words."""

    schema: ClassVar[str] = "fedgestalt.matching.handed-over/1"
    kernels: SealedKernels = message(SealedKernels)
    words: int = integer(1, _WORDS_LIMIT)


@dataclass(frozen=True)
class SendEnsemble(Message):
    """Server to sponsor: upload the sealed ensemble."""

    schema: ClassVar[str] = "fedgestalt.matching.send-ensemble/1"
    name: str = hexadecimal()
    ticket: str = hexadecimal(32)


@dataclass(frozen=True)
class EnsembleSent(Message):
    """Sponsor to server: it is uploaded."""

    schema: ClassVar[str] = "fedgestalt.matching.ensemble-sent/1"
    name: str = hexadecimal()


@dataclass(frozen=True)
class TakeOver(Message):
    """Server to a newcomer: what its sponsor has sealed for it.

    Attributes:
        keys: of the newcomers and the sponsor.
        kernels: one box.
        name: of the download with the sealed ensemble; of zeros if this site has it.
        words: its size.
    """

    schema: ClassVar[str] = "fedgestalt.matching.take-over/1"
    keys: KernelKeys = message(KernelKeys)
    kernels: SealedKernels = message(SealedKernels)
    name: str = hexadecimal()
    words: int = integer(0, _WORDS_LIMIT)


@dataclass(frozen=True)
class Agree(Message):
    """Server to a site: the boxes of its peers."""

    schema: ClassVar[str] = "fedgestalt.matching.agree/1"
    contributions: SealedContributions = message(SealedContributions)


@dataclass(frozen=True)
class KernelReady(Message):
    """Site to server: it holds this kernel now."""

    schema: ClassVar[str] = "fedgestalt.matching.kernel-ready/1"
    kernel: str = hexadecimal(KERNEL_DIGITS)


@dataclass(frozen=True)
class Enrol(Message):
    """Server to a site: bring your part of the gallery up to date.

    Attributes:
        kernel: under which.
        handles: of the rows that the gallery has of this site.
        ask: 1 if the site may ask about its queries.
    """

    schema: ClassVar[str] = "fedgestalt.matching.enrol/1"
    kernel: str = hexadecimal(KERNEL_DIGITS)
    handles: Handles = array("uint8", 2)
    ask: int = integer(0, 1)


@dataclass(frozen=True)
class Signed(Message):
    """Server to an owner: who has signed that it keeps nothing of rows that were withdrawn.

    Attributes:
        handles: of the rows, the owner's among them.
        signatures: by site, over :func:`withdrawal_statement`.
        certificates: PEM, of those sites.
        awaited: who has not signed yet.
    """

    schema: ClassVar[str] = "fedgestalt.matching.signed/1"
    handles: Handles = array("uint8", 2)
    signatures: Mapping[str, bytes] = octets_by_site(1, _SIGNATURE_LIMIT, _SITES_EVER)
    certificates: Mapping[str, bytes] = octets_by_site(1, 1 << 14, _SITES_EVER)
    awaited: tuple[str, ...] = several(text(), _SITES_EVER)


@dataclass(frozen=True)
class Enrolment(Message):
    """Site to server: what is new in its part of the gallery, and what it asks about.

    Attributes:
        kernel: under which the rows are masked.
        removed: handles of rows that must go.
        rows: (n, k) masked encodings of length 1.
        handles, labels: of the rows, ``HANDLE_BYTES`` and ``SEALED_BYTES`` each.
        queries: handles of enrolled rows whose neighbours it asks for.
        yardstick: handles of enrolled rows of diagnosed patients, whose nearest rows tell it how
            far such patients are from each other.
        signature: over :func:`query_statement` of both, for the other sites.
        withdrawn: handles of what it has taken back, in this job or before, and has no whole
            receipt of.
    """

    schema: ClassVar[str] = "fedgestalt.matching.enrolment/3"
    kernel: str = hexadecimal(KERNEL_DIGITS)
    removed: Handles = array("uint8", 2)
    rows: NDArray[np.float32] = array("float32", 2)
    handles: Handles = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)
    queries: Handles = array("uint8", 2)
    yardstick: Handles = array("uint8", 2)
    signature: bytes = octets(1, _SIGNATURE_LIMIT)
    withdrawn: Handles = array("uint8", 2)

    @property
    def asked(self) -> Handles:
        """All rows about which it gets to know something."""
        return np.concatenate([self.queries, self.yardstick])

    def check(self, fault: Fault) -> None:
        """Raise ``fault`` if the parts do not belong together."""
        count = len(self.rows)
        if self.handles.shape != (count, HANDLE_BYTES) or self.labels.shape != (
            count,
            SEALED_BYTES,
        ):
            raise fault(f"{count} rows do not go with its handles and labels")
        lists = (self.removed, self.queries, self.yardstick, self.withdrawn)
        if {some.shape[1] for some in lists} != {HANDLE_BYTES}:
            raise fault("what it removes or asks about is no list of handles")
        for what, handles in (("removes", self.removed), ("asks about", self.asked)):
            if len({handle.tobytes() for handle in handles}) != len(handles):
                raise fault(f"it {what} the same row twice")
        _check_rows(self.rows, fault)


@dataclass(frozen=True)
class Query(Message):
    """What a site asks, as it signed it for the others.

    Attributes:
        count: how many enrolled rows it asks about.
        digest: of their handles.
        signature: over :func:`query_statement`.
    """

    schema: ClassVar[str] = "fedgestalt.matching.query/1"
    count: int = integer(0, _ROW_LIMIT)
    digest: bytes = octets(32)
    signature: bytes = octets(1, _SIGNATURE_LIMIT)


@dataclass(frozen=True)
class Consider(Message):
    """Server to one site: who asks how much, and which rows are withdrawn.

    Attributes:
        kernel: of the gallery.
        queries: by site.
        withdrawn: handles that the site may not keep in what it has stored, and has not signed
            yet, by their :func:`handles_digest` (hexadecimal). It signs each of these lists.
        certificates: PEM, of the sites that ask.
    """

    schema: ClassVar[str] = "fedgestalt.matching.consider/2"
    kernel: str = hexadecimal(KERNEL_DIGITS)
    queries: Mapping[str, Query] = message_by_site(Query)
    withdrawn: Mapping[str, Handles] = arrays_by_name("uint8")
    certificates: Mapping[str, bytes] = octets_by_site(1, 1 << 14)


@dataclass(frozen=True)
class Consent(Message):
    """Site to server: it agrees to the queries and keeps nothing of what is withdrawn.

    Attributes:
        kernel: of the gallery.
        signatures: over :func:`withdrawal_statement`, by digest of the list.
    """

    schema: ClassVar[str] = "fedgestalt.matching.consent/2"
    kernel: str = hexadecimal(KERNEL_DIGITS)
    signatures: Mapping[str, bytes] = octets_by_site(1, _SIGNATURE_LIMIT, MAXIMUM_WITHDRAWALS)


@dataclass(frozen=True)
class ReleasedRows(Message):
    """Server to one site: the best rows for each of its queries.

    Attributes:
        handles, labels: of all rows that are named in the columns.
        columns: (queries, m) numbers of these rows, best first.
        scores: (queries, m) cosine similarities.
        yardstick_columns, yardstick_scores: the same for its yardstick, at most
            :data:`YARDSTICK_ROWS` for each.
        receipts: of lists with rows of this site, by digest.
    """

    schema: ClassVar[str] = "fedgestalt.matching.released-rows/4"
    handles: Handles = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)
    columns: NDArray[np.int32] = array("int32", 2)
    scores: NDArray[np.float32] = array("float32", 2)
    yardstick_columns: NDArray[np.int32] = array("int32", 2)
    yardstick_scores: NDArray[np.float32] = array("float32", 2)
    receipts: Mapping[str, Signed] = message_by_site(Signed, MAXIMUM_WITHDRAWALS)

    def check(self, queries: int, yardstick: int, fault: Fault) -> None:
        """Raise ``fault`` if the parts do not belong together or to what this site asked."""
        count = len(self.handles)
        if self.handles.shape != (count, HANDLE_BYTES) or self.labels.shape != (
            count,
            SEALED_BYTES,
        ):
            raise fault("released handles and labels do not fit the rows")
        for columns, scores, asked in (
            (self.columns, self.scores, queries),
            (self.yardstick_columns, self.yardstick_scores, yardstick),
        ):
            if columns.shape != scores.shape or len(columns) != asked:
                raise fault(f"scores for {len(columns)} queries came, {asked} were asked")
            if columns.size and not 0 <= int(columns.min()) <= int(columns.max()) < count:
                raise fault("a row number is out of range")


@dataclass(frozen=True)
class Ranked(Message):
    """Site to server: its queries are ranked; what came out stays at the site."""

    schema: ClassVar[str] = "fedgestalt.matching.ranked/2"
    kernel: str = hexadecimal(KERNEL_DIGITS)


@dataclass(frozen=True)
class AskShares(Message):
    """Server to a computing site: say whose shares you hold."""

    schema: ClassVar[str] = "fedgestalt.matching.ask-shares/1"
    kernel: str = hexadecimal(KERNEL_DIGITS)


@dataclass(frozen=True)
class ShareHoldings(Message):
    """Computing site to server: what it holds.

    Attributes:
        digests: of handles and uploads, in their order, by owner.
    """

    schema: ClassVar[str] = "fedgestalt.matching.share-holdings/1"
    digests: Mapping[str, bytes] = octets_by_site(32)


@dataclass(frozen=True)
class EnrolShares(Message):
    """Server to a site: bring your part of the gallery of shares up to date.

    Attributes:
        kernel: whose label key seals the labels.
        computing: the computing sites, parties 1 and on; party 0 is the server.
        handles: of the rows that the server has of this site.
        complete: 1 if all parties hold their shares of these rows; 0 asks for all shares anew.
        ask: 1 if the site may ask about its queries.
        keys: of all sites, to seal for the computing sites.
    """

    schema: ClassVar[str] = "fedgestalt.matching.enrol-shares/2"
    kernel: str = hexadecimal(KERNEL_DIGITS)
    computing: tuple[str, ...] = several(text(), 8)
    handles: Handles = array("uint8", 2)
    complete: int = integer(0, 1)
    ask: int = integer(0, 1)
    keys: KernelKeys = message(KernelKeys)


@dataclass(frozen=True)
class SharedEnrolment(Message):
    """Site to server: new rows and queries, of which the server can read its own share alone.

    Attributes:
        kernel: whose label key seals the labels.
        removed: handles of rows that must go.
        upload: names these shares, which belong together; of zeros without new rows.
        handles, labels: of the new rows, ``HANDLE_BYTES`` and ``SEALED_BYTES`` each.
        queries, yardstick: handles of the rows that it asks about, in this order in the question.
        signature: over :func:`query_statement`, for the other sites.
        parts: the server's part of the rows, and of the question; each empty without one.
        boxes: the same for each computing site, sealed for it; a computing site keeps its own.
        withdrawn: see :class:`Enrolment`.
    """

    schema: ClassVar[str] = "fedgestalt.matching.shared-enrolment/4"
    kernel: str = hexadecimal(KERNEL_DIGITS)
    removed: Handles = array("uint8", 2)
    upload: bytes = octets(UPLOAD_BYTES)
    handles: Handles = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)
    queries: Handles = array("uint8", 2)
    yardstick: Handles = array("uint8", 2)
    signature: bytes = octets(1, _SIGNATURE_LIMIT)
    parts: tuple[bytes, ...] = several(octets(0, _WORDS_LIMIT), 2)
    boxes: Mapping[str, bytes] = octets_by_site()
    withdrawn: Handles = array("uint8", 2)

    @property
    def asked(self) -> Handles:
        """All rows about which it gets to know something."""
        return np.concatenate([self.queries, self.yardstick])

    def check(self, fault: Fault) -> None:
        """Raise ``fault`` if the parts do not belong together."""
        count = len(self.handles)
        lists = (self.removed, self.queries, self.yardstick, self.withdrawn)
        if {some.shape[1] for some in lists} != {HANDLE_BYTES} or len(self.parts) != 2:
            raise fault(f"{count} rows do not go with its queries and parts")
        _check_handles(self.handles, self.labels, count, fault)
        if bool(self.parts[0]) != bool(count):
            raise fault(f"{count} rows do not go with its shares")
        for what, handles in (("removes", self.removed), ("asks about", self.asked)):
            if len({handle.tobytes() for handle in handles}) != len(handles):
                raise fault(f"it {what} the same row twice")


@dataclass(frozen=True)
class Compute(Message):
    """Server to a computing site: what the owners and askers have sealed for it.

    Attributes:
        boxes: by site; not the computing site's own.
        order: of the owners in each answer, at random: it does not say whose row is whose.
        digests: of each owner's shares as the server holds them now; see :class:`ShareHoldings`.
    """

    schema: ClassVar[str] = "fedgestalt.matching.compute/2"
    boxes: Mapping[str, bytes] = octets_by_site()
    order: tuple[str, ...] = several(text(), MAXIMUM_SITES)
    digests: tuple[bytes, ...] = several(octets(32), MAXIMUM_SITES)


@dataclass(frozen=True)
class Computed(Message):
    """Computing site to server: its answers, sealed for who asks."""

    schema: ClassVar[str] = "fedgestalt.matching.computed/1"
    answers: Mapping[str, bytes] = octets_by_site()


@dataclass(frozen=True)
class Answers(Message):
    """Server to an asking site: the answers of all parties, and whom they are about.

    Attributes:
        handles, labels: of all rows, owner after owner.
        counts: how many rows each owner has, in that order.
        answer: the server's own.
        boxes: of the computing sites, by name.
        receipts: see :class:`ReleasedRows`.
    """

    schema: ClassVar[str] = "fedgestalt.matching.answers/3"
    handles: Handles = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)
    counts: tuple[int, ...] = several(integer(1, _ROW_LIMIT), MAXIMUM_SITES)
    answer: bytes = octets(0, _WORDS_LIMIT)
    boxes: Mapping[str, bytes] = octets_by_site()
    receipts: Mapping[str, Signed] = message_by_site(Signed, MAXIMUM_WITHDRAWALS)


@dataclass(frozen=True)
class Cases(Message):
    """Site to server: its unsolved cases.

    Attributes:
        kernel: under which the rows are masked.
        rows: (n, k) of length 1, one for each case.
        handles, labels: of the rows, ``HANDLE_BYTES`` and ``SEALED_BYTES`` each.
    """

    schema: ClassVar[str] = "fedgestalt.discovery.cases/1"
    kernel: str = hexadecimal(KERNEL_DIGITS)
    rows: NDArray[np.float32] = array("float32", 2)
    handles: Handles = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)

    def check(self, fault: Fault) -> None:
        """Raise ``fault`` if the parts do not belong together."""
        _check_rows(self.rows, fault)
        _check_handles(self.handles, self.labels, len(self.rows), fault)


@dataclass(frozen=True)
class FoundGroups(Message):
    """Server to one site: the groups that hold a case of its own.

    Attributes:
        handles, labels: of all their cases, group after group.
        groups: (cases,) number of each case's group.
        closeness, p_random, q_random, p_search: (groups,), see
            :class:`fedgestalt.similarity.discovery.Group`.
        compared: how many cases were compared in all.
    """

    schema: ClassVar[str] = "fedgestalt.discovery.found-groups/1"
    handles: Handles = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)
    groups: NDArray[np.int32] = array("int32", 1)
    closeness: NDArray[np.float32] = array("float32", 1)
    p_random: NDArray[np.float32] = array("float32", 1)
    q_random: NDArray[np.float32] = array("float32", 1)
    p_search: NDArray[np.float32] = array("float32", 1)
    compared: int = integer(0, _ROW_LIMIT)

    def check(self, fault: Fault) -> None:
        """Raise ``fault`` if the parts do not belong together."""
        count = len(self.closeness)
        _check_handles(self.handles, self.labels, len(self.groups), fault)
        if {len(self.p_random), len(self.q_random), len(self.p_search)} != {count}:
            raise fault("the groups' numbers are not of the same groups")
        if not np.array_equal(np.unique(self.groups), np.arange(count)):
            raise fault("a group has no case, or a case no group")


@dataclass(frozen=True)
class GroupsKept(Message):
    """Site to server: it has stored the groups; which cases they are stays at the site."""

    schema: ClassVar[str] = "fedgestalt.discovery.groups-kept/1"
    kernel: str = hexadecimal(KERNEL_DIGITS)


def _check_rows(rows: NDArray[np.float32], fault: Fault) -> None:
    lengths = np.einsum("ij,ij->i", rows, rows)
    if len(rows) and np.abs(lengths - 1).max() > 1e-3:
        raise fault("a masked row is not of length 1")


def _check_handles(handles: Handles, labels: NDArray[np.uint8], count: int, fault: Fault) -> None:
    if handles.shape != (count, HANDLE_BYTES) or labels.shape != (count, SEALED_BYTES):
        raise fault(f"{count} rows do not go with its handles and labels")
    if len({handle.tobytes() for handle in handles}) != count:
        raise fault("it sent a row twice")


def query_statement(job: str, kernel: str, site: str, count: int, handles: bytes) -> bytes:
    """What an asking site signs; ``handles`` is :func:`handles_digest` of what it asks about."""
    texts = (job, kernel, site, str(count))
    return digest("matching query", *(part.encode() for part in texts), handles)


def withdrawal_statement(site: str, handles: bytes) -> bytes:
    """What a site signs that keeps nothing of the rows with these handles.

    It is not bound to a job: sites sign the same list in different ones.
    """
    return digest("matching withdrawal", site.encode(), handles)


def handles_digest(handles: Handles) -> bytes:
    """SHA-256 over handles, in whatever order; 32 bytes."""
    return digest("handles", *sorted(handle.tobytes() for handle in handles))
