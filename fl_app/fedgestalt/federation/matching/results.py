"""What a site keeps of a matching job: ranked syndromes, the queries it allowed, receipts."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.contracts import RankingStrategy
from fedgestalt.federation.matching.holdings import write_privately
from fedgestalt.federation.matching.messages import Handles, ReleasedRows
from fedgestalt.federation.matching.near import near_or_not
from fedgestalt.federation.matching.phenotypes import with_phenotypes
from fedgestalt.similarity.evaluation import (
    FREQUENT_GALLERY,
    FREQUENT_TEST,
    rank_tables,
    rare_gallery,
    rare_test,
)
from fedgestalt.similarity.labels import PLANTED, Label
from fedgestalt.similarity.ranking import score_syndromes

MATCHES_SCHEMA: Final = "fedgestalt.matches/3"
MATCHES_FOLDER, LEDGER = "matches", "queries.jsonl"
_RANKED, _NEIGHBOURS = 10, 10
_GALLERY: Final = FREQUENT_GALLERY | rare_gallery(0)
"""Roles of diagnosed reference images, of rare syndromes those of the first split."""
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType(
    {"ranked": [], "neighbours": [], "near": None, "p_value": None}
)


@dataclass(frozen=True)
class Queries:
    """A site's queries, in the order of the released rows.

    Attributes:
        images: ids.
        subjects: whose they are.
        syndromes, roles: (n,), as far as known.
        hpo: terms of each.
    """

    images: Sequence[str]
    subjects: Sequence[str]
    syndromes: NDArray[np.int64]
    roles: NDArray[np.uint32]
    hpo: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Yardstick:
    """With what a site measures what is near.

    Attributes:
        cases: case handle of each image, hexadecimal.
        trained: whether the ensemble may have trained on them.
    """

    cases: Sequence[str]
    trained: bool


def write_matches(
    store: Path,
    job: str,
    kernel: str,
    site: str,
    queries: Queries,
    yardstick: Yardstick,
    own: Mapping[str, str],
    released: ReleasedRows,
    labels: Mapping[int, Label],
    ranking: RankingStrategy,
    hpo_weight: float,
) -> None:
    """Rank the site's queries and store the result at the site.

    Args:
        store: the site's folder.
        job, kernel, site: names.
        queries: what it asked.
        yardstick: with what it measures what is near.
        own: image id by handle, of the site's own rows.
        released: what came back.
        labels: of the released rows, by number.
        ranking: how syndromes score.
        hpo_weight: of HPO terms beside faces.
    """
    count = len(released.handles)
    faces = dense_scores(released.columns, released.scores, count)
    syndromes, roles = syndromes_and_roles(labels)
    cases = np.array([labels[row].case.hex() for row in range(count)])
    terms = [labels[row].hpo for row in range(count)]
    dense, hpo = with_phenotypes(faces, queries.hpo, terms, hpo_weight)
    near = near_or_not(
        faces,
        dense_scores(released.yardstick_columns, released.yardstick_scores, count),
        (roles & _GALLERY) > 0,
        cases,
        yardstick.cases,
        yardstick.trained,
    )
    tables = rank_tables(
        dense,
        queries.syndromes,
        queries.roles,
        syndromes,
        roles,
        ranking=ranking,
        query_subjects=np.array(queries.subjects),
        gallery_subjects=cases,
    )
    content: dict[str, Any] = {
        "schema": MATCHES_SCHEMA,
        "notice": RESEARCH_USE_ONLY,
        "site": site,
        "job": job,
        "kernel": kernel,
        "ranking": ranking.name,
        "hpo": hpo,
        "nearness": near.about,
        "queries": [
            {
                "image": image,
                **_ranked(dense[row], syndromes, roles, cases, released.handles, labels, ranking),
                **near.of(row),
            }
            if queries.roles[row] & (FREQUENT_TEST | rare_test(0))
            else {"image": image, **_NOTHING}
            for row, image in enumerate(queries.images)
        ],
        "images": [{"image": image, "handle": handle} for handle, image in own.items() if image],
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
    }
    write_privately(store / MATCHES_FOLDER / f"{job}.json", json.dumps(content).encode())


def dense_scores(
    columns: NDArray[np.int32], scores: NDArray[np.float32], rows: int
) -> NDArray[np.float32]:
    """Scores (queries, rows) with -inf where nothing was released."""
    dense = np.full((len(columns), rows), -np.inf, np.float32)
    np.put_along_axis(dense, columns.astype(np.int64), scores, 1)
    return dense


def syndromes_and_roles(
    labels: Mapping[int, Label],
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Syndromes and roles by row; planted rows have none."""
    syndromes, roles = np.full(len(labels), -1, np.int64), np.zeros(len(labels), np.uint32)
    for row, label in labels.items():
        syndromes[row], roles[row] = label.syndrome, label.roles & ~PLANTED
    return syndromes, roles


def _ranked(
    scores: NDArray[np.float32],
    syndromes: NDArray[np.int64],
    roles: NDArray[np.uint32],
    cases: NDArray[np.str_],
    handles: Handles,
    labels: Mapping[int, Label],
    ranking: RankingStrategy,
) -> dict[str, Any]:
    """Ranked syndromes and nearest gallery images of one query, in the first rare split."""
    known = np.isfinite(scores) & ((roles & _GALLERY) > 0)
    gallery = np.flatnonzero(known)
    if not len(gallery):
        return {"ranked": [], "neighbours": []}
    scored = score_syndromes(scores[None, gallery], syndromes[gallery], ranking, cases[gallery])
    ranked = scored.top(0, _RANKED)
    nearest = gallery[np.argsort(-scores[gallery], kind="stable")[:_NEIGHBOURS]]
    return {
        "ranked": [[syndrome, round(score, 6)] for syndrome, score in ranked],
        "neighbours": [
            {
                "handle": handles[row].tobytes().hex(),
                "case": labels[int(row)].case.hex(),
                "hospital": labels[int(row)].hospital,
                "syndrome": int(syndromes[row]),
                "score": round(float(scores[row]), 6),
            }
            for row in nearest
        ],
    }


def forget(store: Path, withdrawn: Handles) -> None:
    """Remove what is withdrawn from all stored results: as a neighbour, and as an own image.

    Queries keep their places, which the tables name.
    """
    gone = {handle.tobytes().hex() for handle in withdrawn}
    for path in sorted((store / MATCHES_FOLDER).glob("*.json")) if gone else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        before = json.dumps(content)
        own = {entry["image"] for entry in content["images"] if entry["handle"] in gone}
        content["images"] = [e for e in content["images"] if e["handle"] not in gone]
        for query in content["queries"]:
            if query["image"] in own:
                query |= {"image": "", **_NOTHING}
            query["neighbours"] = [n for n in query["neighbours"] if n["handle"] not in gone]
        if json.dumps(content) != before:
            write_privately(path, json.dumps(content).encode())


class QueryLedger:
    """Who has asked how much, in a site's own records."""

    def __init__(self, store: Path) -> None:
        self._path = store / LEDGER

    def today(self, site: str, job: str) -> int:
        """Queries of ``site`` in other jobs than ``job``, of this day (UTC)."""
        if not self._path.exists():
            return 0
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        mine = {
            line["job"]: int(line["count"])
            for line in lines
            if line["day"] == _today() and line["site"] == site and line["job"] != job
        }
        return sum(mine.values())

    def note(self, site: str, job: str, count: int) -> None:
        """Write down that ``site`` asks ``count`` queries in a job."""
        line = {"day": _today(), "site": site, "job": job, "count": count}
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _today() -> str:
    return dt.datetime.now(dt.UTC).date().isoformat()
