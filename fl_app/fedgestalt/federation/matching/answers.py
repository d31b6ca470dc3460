"""What the others ask and take back, and what comes back for a site's own queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from fedgestalt.errors import ServerError
from fedgestalt.federation.matching.enrolling import OwnRows
from fedgestalt.federation.matching.messages import (
    Answers,
    Consent,
    Consider,
    Handles,
    Query,
    Ranked,
    ReleasedRows,
    Signed,
    handles_digest,
    query_statement,
    withdrawal_statement,
)
from fedgestalt.federation.matching.results import (
    Queries,
    QueryLedger,
    Yardstick,
    forget,
    write_matches,
)
from fedgestalt.federation.matching.shares import SharingSite
from fedgestalt.federation.matching.site import MatchingSite
from fedgestalt.messages import from_server
from fedgestalt.similarity.kernel import Kernel
from fedgestalt.similarity.labels import HANDLE_BYTES, Label, open_label

_TOLERANCE: Final = 1e-4
"""Of a score whose value a site knows; float32 rows give 1e-6."""


def consider(
    own: MatchingSite, kernel: Kernel, rows: OwnRows, message: Consider
) -> tuple[Consent, dict[str, int]]:
    """Agree to what all sites ask, by this site's policy, and forget what is withdrawn.

    Returns:
        This site's consent, and how many queries each site asks.

    Raises:
        ServerError: the queries are not those that the sites have signed, or what is withdrawn
            stands.
        PeerError: a signature is wrong.
        SiteError: a site asks more than this site's policy answers.
    """
    if message.kernel != kernel.id:
        raise ServerError("the queries are about another kernel", where=own.site)
    peers = own.peers(message.certificates)
    ledger = QueryLedger(own.store)
    for site, query in sorted(message.queries.items()):
        if site not in peers:
            raise ServerError(f"no certificate came for {site}", where=own.site)
        statement = query_statement(own.job, kernel.id, site, query.count, query.digest)
        peers[site].verify(statement, query.signature)
        own.settings.check_queries(site, query.count, ledger.today(site, own.job))
    mine = rows.all_asked
    asked = message.queries.get(own.site, Query(0, handles_digest(mine[:0]), b"-"))
    if (asked.count, asked.digest) != (len(mine), handles_digest(mine)):
        raise ServerError("this site's queries came back altered", where=own.site)
    _check_withdrawn(own, rows, message.withdrawn)
    for site, query in sorted(message.queries.items()):
        if query.count:
            ledger.note(site, own.job, query.count)
    for handles in message.withdrawn.values():
        forget(own.store, handles)
        own.galleries.forget(handles)
    signatures = {
        name: own.identity.sign(withdrawal_statement(own.site, handles_digest(handles)))
        for name, handles in message.withdrawn.items()
    }
    announced = {site: query.count for site, query in message.queries.items()}
    return Consent(kernel.id, signatures), announced


def _check_withdrawn(own: MatchingSite, rows: OwnRows, withdrawn: Mapping[str, Handles]) -> None:
    """No row goes that this site has enrolled and has not taken back."""
    for name, handles in withdrawn.items():
        if handles.ndim != 2 or handles.shape[1] != HANDLE_BYTES:
            raise ServerError("what is withdrawn is no list of handles", where=own.site)
        if name != handles_digest(handles).hex():
            raise ServerError("what is withdrawn goes by a wrong digest", where=own.site)
        if {handle.tobytes().hex() for handle in handles} & rows.enrolled.images.keys():
            raise ServerError(
                "it lists rows as withdrawn that this site has enrolled",
                where=own.site,
                remedy="tell the consortium's lead; nothing was forgotten here",
            )


def opened_shares(sharing: SharingSite, rows: OwnRows, message: Answers) -> ReleasedRows:
    """All rows and their scores, where several parties have computed them."""
    scores = sharing.open(message)
    columns = np.argsort(-scores, axis=1, kind="stable").astype(np.int32)
    scores, queries = np.take_along_axis(scores, columns, 1), len(rows.queries)
    return ReleasedRows(
        message.handles,
        message.labels,
        columns[:queries],
        scores[:queries],
        columns[queries:],
        scores[queries:],
        message.receipts,
    )


def keep_ranks(own: MatchingSite, kernel: Kernel, rows: OwnRows, released: ReleasedRows) -> Ranked:
    """Check what was released, and store the ranked queries at the site.

    Raises:
        ServerError: it is not what this site asked, or not right where this site knows better.
        PeerError: a signature on what is withdrawn is wrong.
    """
    released.check(len(rows.queries), len(rows.yardstick), from_server)
    _check_planted(rows, released)
    if own.start.standing:
        _extend_receipts(own, released.receipts)
    if len(rows.queries):
        typical = [rows.enrolled.images[h.tobytes().hex()][0] for h in rows.yardstick]
        write_matches(
            own.store,
            own.job,
            kernel.id,
            own.site,
            Queries(
                images := [own.order.image_ids[number] for number in rows.asked],
                [record.subject for record in own.cohort.records(images)],
                own.order.syndromes[rows.asked],
                own.order.roles[rows.asked],
                [record.hpo for record in own.cohort.records(images)],
            ),
            Yardstick(
                [rows.enrolled.case(own.cohort.images[image].subject).hex() for image in typical],
                not set(typical) <= set(own.cohort.validation),
            ),
            {handle: image for handle, (image, _) in rows.enrolled.images.items()},
            released,
            open_labels(released, kernel),
            own.ranking,
            own.start.hpo_weight,
        )
    if own.start.standing:
        own.kernels.retire_older_than(kernel)
        own.galleries.keep_only(kernel.id, own.purpose)
    return Ranked(kernel.id)


def open_labels(released: ReleasedRows, kernel: Kernel) -> dict[int, Label]:
    """Open the labels of all released rows, by row number.

    Raises:
        ServerError: one was altered or moved.
    """
    return {
        row: open_label(released.labels[row].tobytes(), kernel, released.handles[row].tobytes())
        for row in range(len(released.handles))
    }


def _check_planted(rows: OwnRows, released: ReleasedRows) -> None:
    """Every released score between two of a site's own rows must be the one it knows.

    Raises:
        ServerError: one is not, or a row that must be among the nearest is missing.
    """
    own = [rows.places.get(handle.tobytes().hex(), -1) for handle in released.handles]
    places = np.array(own, np.int64)
    came = [
        *zip(released.columns, released.scores, strict=True),
        *zip(released.yardstick_columns, released.yardstick_scores, strict=True),
    ]
    for handle, (columns, scores) in zip(rows.all_asked, came, strict=True):
        mine = rows.places[handle.tobytes().hex()]
        found = places[columns]
        known = np.flatnonzero(found >= 0)
        right = rows.encodings[found[known]] @ rows.encodings[mine]
        missing = mine not in found and (not len(scores) or scores.min() < 1 - _TOLERANCE)
        if missing or np.abs(scores[known] - right).max(initial=0) > _TOLERANCE:
            raise ServerError(
                "scores came that are not those of this site's own rows: rows were swapped or"
                " scores made up",
                where="server",
                remedy="trust no result of this job; tell the consortium's lead",
            )


def _extend_receipts(own: MatchingSite, came: Mapping[str, Signed]) -> None:
    """Put the signatures on what this site has withdrawn into its receipts."""
    lists = [({h.tobytes().hex() for h in said.handles}, said) for said in came.values()]
    for receipt in own.receipts.open():
        found = next(((listed, said) for listed, said in lists if listed >= {*receipt.rows}), None)
        if found is None:
            raise ServerError(
                "the others were not told of all rows that this site has withdrawn",
                where=own.site,
                remedy="tell the consortium's lead; the rows may still be in others' results",
            )
        listed, said = found
        digest, signed = handles_digest(said.handles), {}
        for site, signature in said.signatures.items():
            if site not in said.certificates:
                raise ServerError(f"no certificate came for {site}", where=own.site)
            certificate = said.certificates[site]
            peer = own.trust.check(site, certificate, None)  # it may have signed in an earlier job
            peer.verify(withdrawal_statement(site, digest), signature)
            signed[site] = signature, certificate
        own.receipts.keep(receipt.extended(listed, signed, said.awaited))
