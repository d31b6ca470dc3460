"""Server side of the matching job.

Sites agree on a kernel through sealed boxes; every site sends its images as masked rows with sealed
labels; the server compares rows and hands each site the best ones for its own queries. It learns
similarities and opaque handles, no label, no embedding, and not how any query was ranked.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

from fedgestalt.errors import PeerError
from fedgestalt.federation.job.handshake import versions
from fedgestalt.federation.job.workflow import PhasedWorkflow
from fedgestalt.federation.matching.messages import (
    MaskedRows,
    MatchStart,
    OfferKeys,
    Ranked,
    ReleasedRows,
)
from fedgestalt.federation.site.settings import ALL_ROWS
from fedgestalt.federation.tasks import ENCODE, KERNEL_KEYS, RANK, SEAL, START
from fedgestalt.hooks import get_registry
from fedgestalt.messages import from_site
from fedgestalt.similarity.gram import dense_gram, similarities_of
from fedgestalt.similarity.kernel import KernelFacts, KernelKey, KernelKeys, SealedContributions

GRAM_FILE = "gram.npz"


class FlakeSimilarityWorkflow(PhasedWorkflow):
    """Compares patients of different hospitals.

    Args:
        ensemble: digest of the published ensemble that every site encodes with.
        strategy: name of a matching strategy.
        released_rows: best rows per query that the asking site gets; 0 releases all, which sites
            allow for evaluations only.
        keep_gram: leave the whole matrix in the run folder, to show what the server sees.
        sites: see :class:`PhasedWorkflow`.
        phase_limit_seconds: see :class:`PhasedWorkflow`.
        start_limit_seconds: see :class:`PhasedWorkflow`.
        silence_limit_seconds: see :class:`PhasedWorkflow`.
    """

    template: ClassVar[str] = "match"

    def __init__(
        self,
        ensemble: str,
        strategy: str = "isometry",
        released_rows: int = 200,
        keep_gram: bool = False,
        sites: list[str] | None = None,
        phase_limit_seconds: float = 3600.0,
        start_limit_seconds: float = 120.0,
        silence_limit_seconds: float = 30.0,
    ) -> None:
        super().__init__(sites, phase_limit_seconds, start_limit_seconds, silence_limit_seconds)
        self._ensemble, self._strategy = ensemble, strategy
        self._released_rows, self._keep_gram = released_rows, keep_gram

    def run(self, abort_signal: Signal, fl_ctx: FLContext) -> dict[str, Any]:
        """Match; see the module docstring."""
        strategy = get_registry().matching.get(self._strategy)
        similarities = similarities_of(strategy)
        galleries = self._collect(abort_signal, fl_ctx)
        rows = np.concatenate([galleries[site].rows for site in self.roster])
        handles = np.concatenate([galleries[site].handles for site in self.roster])
        labels = np.concatenate([galleries[site].labels for site in self.roster])
        released = {}
        for site in self.roster:
            queries = galleries[site].rows[: galleries[site].queries]
            scores = dense_gram(queries, rows, similarities)
            released[site] = release(scores, handles, labels, self._released_rows)
        if self._keep_gram:
            gram = dense_gram(rows, rows, similarities)
            np.savez(self.folder / GRAM_FILE, gram=gram, handles=handles)
        kernel = galleries[self.roster[0]].kernel

        def on_reply(site: str, fields: object) -> None:
            Ranked.from_fields(fields, from_site(site))

        self.gather(RANK, released, on_reply, abort_signal, fl_ctx)
        said = strategy.disclosure
        return {
            "kernel": kernel,
            "ensemble": self._ensemble,
            "rows": len(rows),
            "dimensions": rows.shape[1],
            "privacy": {
                "strategy": strategy.name,
                "server_learns": said.server_learns,
                "sites_learn": said.sites_learn,
                "asking_site_learns": said.asking_site_learns,
            },
        }

    def _collect(self, abort_signal: Signal, fl_ctx: FLContext) -> dict[str, MaskedRows]:
        facts = KernelFacts(fl_ctx.get_job_id(), self._ensemble, self._strategy, self.roster)
        keys: dict[str, bytes] = {}
        boxes: dict[str, dict[str, bytes]] = {site: {} for site in self.roster}
        galleries: dict[str, MaskedRows] = {}

        def on_key(site: str, fields: object) -> None:
            key = KernelKey.from_fields(fields, from_site(site))
            if key.session != facts.digest:
                raise PeerError(
                    "it sees another session (job, ensemble or roster differ)", site=site
                )
            keys[site] = key.public_key

        def on_boxes(site: str, fields: object) -> None:
            sealed = SealedContributions.from_fields(fields, from_site(site)).boxes
            if sealed.keys() != set(self.roster) - {site}:
                raise PeerError("its boxes are not for the agreed roster", site=site)
            for receiver, box in sealed.items():
                boxes[receiver][site] = box

        def on_rows(site: str, fields: object) -> None:
            message = MaskedRows.from_fields(fields, from_site(site))
            message.check_sizes(from_site(site))
            galleries[site] = message

        start = MatchStart(self.roster, self._ensemble, self._strategy, self._released_rows)
        strategy = get_registry().matching.entry(self._strategy)
        self.join(START, start, lambda _: versions([strategy]), abort_signal, fl_ctx)
        self.gather(KERNEL_KEYS, OfferKeys(), on_key, abort_signal, fl_ctx)
        self.gather(SEAL, KernelKeys(keys), on_boxes, abort_signal, fl_ctx)
        sealed = {site: SealedContributions(boxes[site]) for site in self.roster}
        self.gather(ENCODE, sealed, on_rows, abort_signal, fl_ctx)
        first = galleries[self.roster[0]]
        for site, message in galleries.items():
            if message.kernel != first.kernel or message.rows.shape[1] != first.rows.shape[1]:
                raise PeerError(f"its kernel differs from that of {self.roster[0]}", site=site)
        return galleries


def release(
    scores: np.ndarray[Any, np.dtype[np.floating]],
    handles: np.ndarray[Any, np.dtype[np.uint8]],
    labels: np.ndarray[Any, np.dtype[np.uint8]],
    count: int,
) -> ReleasedRows:
    """The ``count`` best rows of each query, and the handles and labels of those rows only."""
    count = scores.shape[1] if count == ALL_ROWS else min(count, scores.shape[1])
    columns = np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int32)
    named = np.zeros((len(handles), 1), np.uint8)
    named[np.unique(columns)] = 1
    best = np.take_along_axis(scores, columns.astype(np.int64), 1).astype(np.float32)
    return ReleasedRows(handles * named, labels * named, columns, best)
