"""What a site enrols in a matching job: masked rows or shares of its images, with sealed labels.

Beside its patients' rows a site plants a few whose similarities it knows beforehand, so that a
server which swaps rows or makes scores up is found out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import ServerError, SiteError
from fedgestalt.federation.matching.holdings import Enrolled
from fedgestalt.federation.matching.messages import (
    Enrol,
    Enrolment,
    EnrolShares,
    Handles,
    SharedEnrolment,
)
from fedgestalt.federation.matching.shares import SharingSite
from fedgestalt.federation.matching.site import MatchingSite
from fedgestalt.learning.encoding import Encodings
from fedgestalt.similarity.kernel import Kernel
from fedgestalt.similarity.labels import (
    HANDLE_BYTES,
    MAXIMUM_TERMS,
    PLANTED,
    SEALED_BYTES,
    Label,
    new_handle,
    seal_label,
)
from fedgestalt.similarity.nearness import ENOUGH_SUBJECTS

_PLANTED_ROWS: Final = 2
_PLANTED_WEIGHT: Final = 0.25


@dataclass(frozen=True)
class OwnRows:
    """A site's own rows in one job.

    Attributes:
        enrolled: which image stands behind which handle.
        encodings: (n, d) of images and planted rows.
        places: row of ``encodings``, by handle (hexadecimal).
        asked: (q,) what it asks about, as numbers in the site's image order.
        queries: handles of the same.
        yardstick: handles of images of its diagnosed patients, one for each; with their nearest
            rows it measures how far such patients are from each other.
    """

    enrolled: Enrolled
    encodings: Encodings
    places: dict[str, int]
    asked: NDArray[np.int64]
    queries: Handles
    yardstick: Handles

    @property
    def all_asked(self) -> Handles:
        """Handles of queries and yardstick."""
        return np.concatenate([self.queries, self.yardstick])

    def encodings_of(self, handles: Handles) -> Encodings:
        """Encodings of these rows."""
        return self.encodings[[self.places[handle.tobytes().hex()] for handle in handles]]


@dataclass(frozen=True)
class _Update:
    """What a site's part of a gallery becomes.

    Attributes:
        enrolled: the record, up to date but for planted rows.
        images: to be enrolled, in their order.
        planted: the planted rows that the gallery still has.
        handle_of: handle by image.
        added: images that are new.
        removed: handles that the gallery has and that must go.
        withdrawn: handles of what this site has taken back and has no whole receipt of.
    """

    enrolled: Enrolled
    images: list[str]
    planted: dict[str, tuple[str, str]]
    handle_of: dict[str, str]
    added: list[str]
    removed: list[str]
    withdrawn: list[str]

    @classmethod
    def of(cls, own: MatchingSite, kernel: Kernel, handles: Handles) -> _Update:
        """With the handles that the gallery has of this site.

        What is taken back is written down before the record of enrolled images forgets it. A row
        that was taken back stays so: its image, if it is there again, gets another handle.

        Raises:
            SiteError: it has no image that it may enrol.
            ConfigError: a record is damaged.
        """
        standing = own.start.standing
        enrolled = own.kernels.enrolled(kernel) if standing else Enrolled()
        receipts = own.receipts.all() if standing else []
        wanted = wanted_images(own)
        images = _in_order(own, wanted)
        known = {handle.tobytes().hex() for handle in handles}
        kept = enrolled.keep(known - {row for receipt in receipts for row in receipt.rows}, wanted)
        removed = sorted(known - kept.images.keys() - kept.planted.keys())
        former = _former(own, kernel, enrolled, kept) if standing else {}
        gone = {h: former.get(h, "") for h in removed}
        gone |= {h: image for h, image in former.items() if image not in wanted}
        enrolled.former = {h: image for h, image in former.items() if h not in gone}
        waiting = {row for receipt in receipts if receipt.not_signed for row in receipt.rows}
        if new := {h: image for h, image in gone.items() if h not in waiting}:
            own.receipts.begin(own.job, new, own.start.roster)
        withdrawn = sorted({*waiting, *new})
        handle_of = {image: handle for handle, (image, _) in kept.images.items()}
        added = [image for image in images if image not in handle_of]
        handle_of |= {image: new_handle().hex() for image in added}
        enrolled.images = {handle_of[image]: (image, wanted[image]) for image in images}
        return cls(enrolled, images, kept.planted, handle_of, added, removed, withdrawn)

    def rows(
        self, own: MatchingSite, encodings: Encodings, places: dict[str, int], ask: int
    ) -> OwnRows:
        """The site's own rows, and what it asks if it may."""
        asked = _asked(own, self.images) if ask else []
        ids, handle_of = own.order.image_ids, self.handle_of
        return OwnRows(
            self.enrolled,
            encodings,
            places,
            np.array(asked, np.int64),
            stacked([handle_of[ids[number]] for number in asked]),
            stacked(_yardstick(own, handle_of) if ask else []),
        )


def enrol_rows(own: MatchingSite, kernel: Kernel, message: Enrol) -> tuple[OwnRows, Enrolment]:
    """Bring a site's part of a gallery of masked rows up to date.

    Raises:
        SiteError: it has no image that it may enrol.
    """
    update = _Update.of(own, kernel, message.handles)
    enrolled, images, handle_of = update.enrolled, update.images, update.handle_of
    place_of = {image: place for place, image in enumerate(images)}
    planted = {
        new_handle().hex(): _pair(own, images) for _ in range(_PLANTED_ROWS - len(update.planted))
    }
    enrolled.planted = {**update.planted, **planted}
    encodings = own.encode(own.cohort.records(images))
    near, other = ([place_of[pair[side]] for pair in enrolled.planted.values()] for side in (0, 1))
    between = encodings[near] + _PLANTED_WEIGHT * encodings[other]
    between /= np.linalg.norm(between, axis=1, keepdims=True)
    places = {handle_of[image]: place for image, place in place_of.items()}
    places |= {h: len(images) + n for n, h in enumerate(enrolled.planted)}
    new = [handle_of[image] for image in update.added] + list(planted)
    labels = [
        *(_label(own, enrolled, image, handle_of[image], kernel) for image in update.added),
        *(seal_label(Label(-1, PLANTED), kernel, bytes.fromhex(h)) for h in planted),
    ]
    if own.start.standing:
        own.kernels.keep_enrolled(kernel, enrolled)
    rows = update.rows(own, np.concatenate([encodings, between]), places, message.ask)
    return rows, Enrolment(
        kernel.id,
        stacked(update.removed),
        masked_rows(own, rows.encodings[[places[handle] for handle in new]], kernel),
        stacked(new),
        joined_labels(labels),
        rows.queries,
        rows.yardstick,
        own.sign_queries(kernel.id, rows.all_asked),
        stacked(update.withdrawn),
    )


def enrol_shares(
    own: MatchingSite, kernel: Kernel, sharing: SharingSite, message: EnrolShares
) -> tuple[OwnRows, SharedEnrolment]:
    """Bring a site's part of a gallery of shares up to date, and send its question in shares.

    Raises:
        ServerError: it is asked for another kernel or roster.
        SiteError: it has no image that it may enrol.
    """
    if message.kernel != kernel.id or not set(message.computing) <= set(own.start.roster):
        raise ServerError("shares were asked for another kernel or roster", where=own.site)
    update = _Update.of(own, kernel, message.handles)
    enrolled, handle_of = update.enrolled, update.handle_of
    had = [handle.tobytes().hex() for handle in message.handles]
    staying = [handle for handle in had if handle in enrolled.images]
    new = [handle_of[image] for image in update.added]
    if not message.complete:  # the same handles: what others have stored of them stays valid
        staying, new = [], staying + new
    labels = [_label(own, enrolled, enrolled.images[h][0], h, kernel) for h in new]
    if own.start.standing:
        own.kernels.keep_enrolled(kernel, enrolled)
    places = {handle_of[image]: place for place, image in enumerate(update.images)}
    encodings = own.encode(own.cohort.records(update.images))
    rows = update.rows(own, encodings, places, message.ask)
    delivery, boxes = sharing.enrol(
        encodings[[places[handle] for handle in new]],
        rows.encodings_of(rows.all_asked),
        stacked(staying + new),
        kernel.masking_seed,
    )
    return rows, SharedEnrolment(
        kernel.id,
        stacked(update.removed),
        delivery.upload,
        stacked(new),
        joined_labels(labels),
        rows.queries,
        rows.yardstick,
        own.sign_queries(kernel.id, rows.all_asked),
        (delivery.rows, delivery.question),
        boxes,
        stacked(update.withdrawn),
    )


def wanted_images(own: MatchingSite) -> dict[str, str]:
    """What the site's policy lets it enrol: by image, a digest of its file and of what is told.

    Where one of them changes (a better crop, another diagnosis, another policy), the row is sent
    anew.
    """
    least = own.settings.minimum_images_per_syndrome
    common = {s for s, n in own.cohort.images_per_syndrome().items() if n >= least}
    return {
        image: hashlib.sha256(
            own.cohort.images[image].path.read_bytes() + repr(_told(own, image, number)).encode()
        ).hexdigest()
        for number, image in enumerate(own.order.image_ids)
        if own.cohort.images[image].syndrome in common
    }


def stacked(handles: Sequence[str]) -> Handles:
    """Handles (n, ``HANDLE_BYTES``) from their hexadecimal digits."""
    return np.frombuffer(bytes.fromhex("".join(handles)), np.uint8).reshape(-1, HANDLE_BYTES)


def _former(
    own: MatchingSite, kernel: Kernel, enrolled: Enrolled, kept: Enrolled
) -> dict[str, str]:
    """Image by handle, of all handles under which one stood and stands no longer.

    Under all other kernels, too: results outlive these, and a patient who goes, goes everywhere.
    """
    former = {**own.kernels.handles_under_others(kernel), **enrolled.former}
    return former | {h: i for h, (i, _) in enrolled.images.items() if h not in kept.images}


def _in_order(own: MatchingSite, wanted: dict[str, str]) -> list[str]:
    images = [image for image in own.order.image_ids if image in wanted]
    if not images:
        raise SiteError("this site has no image that its policy lets it enrol")
    return images


def _asked(own: MatchingSite, images: Sequence[str]) -> list[int]:
    """Numbers, in the site's image order, of its queries among ``images``."""
    chosen = set(images)
    ids = own.order.image_ids[: own.order.queries]
    return [number for number, image in enumerate(ids) if image in chosen]


def _yardstick(own: MatchingSite, handle_of: Mapping[str, str]) -> list[str]:
    """Handles of one image each of the site's diagnosed patients, as many as the job allows.

    Images that the ensemble trained on lie closer together than any new one; where there are enough
    others they are taken alone. Handles are random, and the same in all jobs under one kernel: to
    take the first of them is a draw that asks for nothing new in later jobs.
    """
    cohort, asked = own.cohort, {*own.order.image_ids[: own.order.queries]}
    gallery = {*cohort.frequent_gallery}
    gallery |= {image for split in cohort.rare_splits[:1] for image in split.gallery}
    for images in (set(cohort.validation), gallery):
        handles: dict[str, str] = {}
        for image in (images & handle_of.keys()) - asked:
            subject = cohort.images[image].subject
            handles[subject] = min(handle_of[image], handles.get(subject, handle_of[image]))
        if len(handles) >= ENOUGH_SUBJECTS:
            break
    return sorted(handles.values())[: own.start.yardstick]


def masked_rows(own: MatchingSite, rows: Encodings, kernel: Kernel) -> NDArray[np.float32]:
    """Rows (n, k) as the server alone compares them."""
    if not len(rows):
        return np.empty((0, 0), np.float32)
    (part,) = own.strategy.enrol(rows, kernel.masking_seed)
    return part.words.astype(np.float32)


def _label(own: MatchingSite, enrolled: Enrolled, image: str, handle: str, kernel: Kernel) -> bytes:
    told = _told(own, image, own.order.image_ids.index(image))
    case = enrolled.case(own.cohort.images[image].subject)
    return seal_label(dataclasses.replace(told, case=case), kernel, bytes.fromhex(handle))


def _told(own: MatchingSite, image: str, number: int) -> Label:
    """What other sites are told of an image, beside whose it is."""
    record, may, start = own.cohort.images[image], own.settings, own.start
    wanted = start.standing or start.hpo_weight > 0  # by this job, or by later ones
    return Label(
        record.syndrome,
        int(own.order.roles[number]),
        hospital=own.site if may.reveal_hospital else "",
        hpo=record.hpo[:MAXIMUM_TERMS] if may.release_hpo_terms and wanted else (),
    )


def joined_labels(labels: Sequence[bytes]) -> NDArray[np.uint8]:
    """Sealed labels (n, ``SEALED_BYTES``)."""
    return np.frombuffer(b"".join(labels), np.uint8).reshape(-1, SEALED_BYTES)


def _pair(own: MatchingSite, images: Sequence[str]) -> tuple[str, str]:
    """Two images for a row between them, whose similarities this site knows beforehand.

    It lies near the first, a query if there is one: the server cannot tell it from a patient's, and
    it comes back among that query's neighbours.
    """
    chosen = set(images)
    queries = [i for i in own.order.image_ids[: own.order.queries] if i in chosen]
    return secrets.choice(queries or images), secrets.choice(images)
