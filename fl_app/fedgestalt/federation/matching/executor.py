"""A site's side of the matching job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.contracts import MatchingStrategy
from fedgestalt.errors import ConfigError, ServerError
from fedgestalt.federation import tasks
from fedgestalt.federation.job.executor import Handler, SiteExecutor
from fedgestalt.federation.job.handshake import Present, present, versions
from fedgestalt.federation.matching.messages import (
    MaskedRows,
    MatchStart,
    OfferKeys,
    Ranked,
    ReleasedRows,
)
from fedgestalt.hooks import get_registry
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.store import load_ensemble
from fedgestalt.messages import from_server
from fedgestalt.similarity.evaluation import (
    FREQUENT_GALLERY,
    FREQUENT_TEST,
    rank_tables,
    rare_gallery,
    rare_test,
)
from fedgestalt.similarity.gram import check_one_party
from fedgestalt.similarity.kernel import (
    Kernel,
    KernelAgreement,
    KernelFacts,
    KernelKey,
    KernelKeys,
    SealedContributions,
)
from fedgestalt.similarity.labels import Label, new_handle, open_label, seal_label
from fedgestalt.similarity.order import ImageOrder, image_order
from fedgestalt.similarity.ranking import score_syndromes

MATCHES_SCHEMA = "fedgestalt.matches/1"
_RANKED, _NEIGHBOURS = 10, 10


class FlakeMatcher(SiteExecutor):
    """Encodes the site's patients, masks them, and ranks the site's own queries."""

    template: ClassVar[str] = "match"

    def __init__(self) -> None:
        super().__init__()
        self._start: MatchStart | None = None
        self._agreement: KernelAgreement | None = None
        self._kernel: Kernel | None = None
        self._handles: list[bytes] = []

    def handlers(self) -> Mapping[str, Handler]:
        """Tasks of the matching job."""
        return {
            tasks.START: self._join,
            tasks.KERNEL_KEYS: self._offer_key,
            tasks.SEAL: self._seal,
            tasks.ENCODE: self._encode,
            tasks.RANK: self._rank,
        }

    def _join(self, fields: object) -> Present:
        start = MatchStart.from_fields(fields, from_server)
        self.settings.check_roster(self.site, start.roster)
        self.settings.check_strategy(start.strategy)
        self.settings.check_release(start.released_rows)
        registry = get_registry()
        strategy = registry.matching.entry(start.strategy)
        self._strategy: MatchingStrategy = strategy.plugin
        check_one_party(self._strategy)
        folder = self.store / "ensembles" / start.ensemble
        self._ensemble, digest = load_ensemble(folder, registry)
        if digest != start.ensemble:
            raise ConfigError("the stored ensemble has another digest", where=str(folder))
        self.settings.check_licences(self._ensemble.licences)
        self._rows = image_order(self.cohort)
        self._start = start
        backbones = map(registry.backbones.entry, self._ensemble.backbones)
        facts = {**versions([strategy, *backbones]), "label map": self.cohort.label_map_digest}
        return present(facts)

    def _offer_key(self, fields: object) -> KernelKey:
        OfferKeys.from_fields(fields, from_server)
        start = self._start
        if start is None:
            raise ServerError("a matching phase came before its start", where=self.site)
        facts = KernelFacts(self.job, start.ensemble, start.strategy, start.roster)
        self._agreement = KernelAgreement(
            self.site, facts, minimum_sites=self.settings.minimum_sites
        )
        return self._agreement.offer()

    def _seal(self, fields: object) -> SealedContributions:
        return self._agreed.seal(KernelKeys.from_fields(fields, from_server))

    def _encode(self, fields: object) -> MaskedRows:
        received = SealedContributions.from_fields(fields, from_server)
        kernel = self._kernel = self._agreed.agree(received)
        faces = load_faces(self.cohort.records(self._rows.image_ids))
        encodings = encode(
            self._ensemble,
            faces,
            choose_device(self.settings.device),
            self.store / "cache",
            self.counter("encoding"),
        )
        (part,) = self._strategy.enrol(encodings, kernel.masking_seed)
        masked = np.asarray(part.words, np.float64)
        self._handles = [new_handle() for _ in self._rows.image_ids]
        sealed = [
            seal_label(Label(int(syndrome), int(roles)), kernel, handle)
            for syndrome, roles, handle in zip(
                self._rows.syndromes, self._rows.roles, self._handles, strict=True
            )
        ]
        return MaskedRows(
            kernel.id, self._rows.queries, masked, _stack(self._handles), _stack(sealed)
        )

    def _rank(self, fields: object) -> Ranked:
        released = ReleasedRows.from_fields(fields, from_server)
        kernel, start = self._kernel, self._start
        if kernel is None or start is None:
            raise ServerError("scores came before a kernel was agreed", where=self.site)
        released.check_sizes(self._rows.queries, from_server)
        write_matches(
            self.store / "matches" / f"{kernel.id}.json",
            self.site,
            self._rows,
            self._handles,
            released,
            open_labels(released, kernel),
        )
        return Ranked(kernel.id)

    @property
    def _agreed(self) -> KernelAgreement:
        if self._agreement is None:
            raise ServerError("a matching phase came before its start", where=self.site)
        return self._agreement


def open_labels(released: ReleasedRows, kernel: Kernel) -> dict[int, Label]:
    """Open the labels of all released rows, by row number.

    Raises:
        ServerError: one was altered or moved.
    """
    return {
        int(row): open_label(
            released.labels[row].tobytes(),
            kernel,
            released.handles[row].tobytes(),
        )
        for row in np.unique(released.columns)
    }


def write_matches(
    target: Path,
    site: str,
    rows: ImageOrder,
    own_handles: Sequence[bytes],
    released: ReleasedRows,
    labels: Mapping[int, Label],
) -> None:
    """Rank the site's queries and store the result at the site."""
    dense, syndromes, roles = dense_scores(released, labels)
    queries = slice(0, rows.queries)
    tables = rank_tables(
        dense,
        rows.syndromes[queries],
        rows.roles[queries],
        syndromes,
        roles,
    )
    content: dict[str, Any] = {
        "schema": MATCHES_SCHEMA,
        "notice": RESEARCH_USE_ONLY,
        "site": site,
        "images": [
            {"image": image_id, "handle": handle.hex()}
            for image_id, handle in zip(rows.image_ids, own_handles, strict=True)
        ],
        "tables": [
            {
                "table": t.table,
                "split": t.split,
                "rows": t.rows.tolist(),
                "ranks": t.ranks.tolist(),
                "gallery": t.gallery,
                "syndromes": t.syndromes,
            }
            for t in tables
        ],
        "queries": [
            _ranked_query(dense[row], syndromes, roles, released.handles)
            if rows.roles[row] & (FREQUENT_TEST | rare_test(0))
            else {"ranked": [], "neighbours": []}
            for row in range(rows.queries)
        ],
    }
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = target.with_suffix(".partial")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.chmod(0o600)
    temporary.replace(target)


def dense_scores(
    released: ReleasedRows, labels: Mapping[int, Label]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.uint32]]:
    """Scores (queries, rows) with -inf where nothing was released, syndromes and roles by row."""
    count = len(released.handles)
    dense = np.full((len(released.columns), count), -np.inf, np.float32)
    np.put_along_axis(dense, released.columns.astype(np.int64), released.scores, 1)
    syndromes, roles = np.full(count, -1, np.int64), np.zeros(count, np.uint32)
    for row, label in labels.items():
        syndromes[row], roles[row] = label.syndrome, label.roles
    return dense, syndromes, roles


def _ranked_query(
    scores: NDArray[np.float32],
    syndromes: NDArray[np.int64],
    roles: NDArray[np.uint32],
    handles: NDArray[np.uint8],
) -> dict[str, Any]:
    """Ranked syndromes and nearest gallery images of one query, in the first rare split."""
    known = np.isfinite(scores) & ((roles & (FREQUENT_GALLERY | rare_gallery(0))) > 0)
    gallery = np.flatnonzero(known)
    if not len(gallery):
        return {"ranked": [], "neighbours": []}
    ranked = score_syndromes(scores[None, gallery], syndromes[gallery]).top(0, _RANKED)
    nearest = gallery[np.argsort(-scores[gallery], kind="stable")[:_NEIGHBOURS]]
    return {
        "ranked": [[syndrome, round(score, 6)] for syndrome, score in ranked],
        "neighbours": [
            {
                "handle": handles[row].tobytes().hex(),
                "syndrome": int(syndromes[row]),
                "score": round(float(scores[row]), 6),
            }
            for row in nearest
        ],
    }


def _stack(items: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(items), np.uint8).reshape(len(items), -1)
