"""From what each hospital ranked to the evaluation tables of the whole consortium."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedgestalt.cohort import Cohort
from fedgestalt.demo.baselines import Hospital
from fedgestalt.learning.encoding import Encodings
from fedgestalt.reporting.result import Table
from fedgestalt.similarity.evaluation import (
    MAXIMUM_SPLITS,
    TOP_K,
    Outcome,
    Ranked,
    evaluate_tables,
    rank_tables,
)
from fedgestalt.similarity.order import image_order

CHANCE = "chance"


@dataclass
class Ledger:
    """Collects ranks of all modes, sites and seeds.

    A seed counts as one more draw of the splits, so that tables are means over seeds.
    """

    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    galleries: dict[str, dict[tuple[str, int], list[int]]] = field(default_factory=dict)
    syndromes: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        mode: str,
        seed_index: int,
        cohort: Cohort,
        image_ids: Sequence[str],
        ranked: Sequence[Ranked],
    ) -> None:
        """Add the ranks of one site's queries."""
        for part in ranked:
            draw = seed_index * MAXIMUM_SPLITS + part.split
            sizes = self.galleries.setdefault(mode, {}).setdefault((part.table, draw), [])
            sizes.append(part.gallery)
            known = self.syndromes.get(part.table, 0)
            self.syndromes[part.table] = max(known, part.syndromes)
            for row, rank in zip(part.rows, part.ranks, strict=True):
                record = cohort.images[image_ids[row]]
                outcome = Outcome(part.table, draw, record.subject, record.syndrome, int(rank))
                self.outcomes.setdefault(mode, []).append(outcome)

    def tables(self) -> dict[str, dict[str, Table]]:
        """All tables of all modes, and chance."""
        result: dict[str, dict[str, Table]] = {}
        for mode, outcomes in self.outcomes.items():
            sizes = {key: round(float(np.mean(v))) for key, v in self.galleries[mode].items()}
            tables = evaluate_tables(outcomes, sizes, np.random.default_rng(0))
            result[mode] = {name: Table.model_validate(row) for name, row in tables.items()}
        reference = next(iter(result.values()))
        result[CHANCE] = {
            name: table.model_copy(
                update={f"top{k}": min(1.0, k / self.syndromes[name]) for k in TOP_K}
                | {"interval": {}}
            )
            for name, table in reference.items()
        }
        return result


@dataclass(frozen=True)
class SiteMatches:
    """What one site stored after a matching job."""

    cohort: Cohort
    image_ids: tuple[str, ...]
    handles: tuple[str, ...]
    ranked: tuple[Ranked, ...]
    queries: tuple[dict[str, Any], ...]


def read_matches(hospital: Hospital, job: str) -> SiteMatches:
    """Read what a site stored about a matching job."""
    path = hospital.store / "matches" / f"{job}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    ranked = tuple(
        Ranked(
            part["table"],
            part["split"],
            np.array(part["rows"], np.int64),
            np.array(part["ranks"], np.int64),
            part["gallery"],
            part["syndromes"],
        )
        for part in content["tables"]
    )
    return SiteMatches(
        hospital.cohort(),
        tuple(entry["image"] for entry in content["images"]),
        tuple(entry["handle"] for entry in content["images"]),
        ranked,
        tuple(content["queries"]),
    )


def add_shared_gallery(
    ledger: Ledger,
    mode: str,
    seed_index: int,
    hospitals: Sequence[Hospital],
    encodings: Mapping[str, Encodings],
    splits: int,
) -> None:
    """Rank all queries of ``hospitals`` against the images of all of them, in the clear.

    ``splits`` is the number of rare splits of the whole cohort: a hospital alone may lack some.
    """
    cohorts = {hospital.name: hospital.cohort() for hospital in hospitals}
    orders = {name: image_order(cohort) for name, cohort in cohorts.items()}
    everything = np.concatenate([encodings[name] for name in cohorts])
    syndromes = np.concatenate([orders[name].syndromes for name in cohorts])
    roles = np.concatenate([orders[name].roles for name in cohorts])
    for name, cohort in cohorts.items():
        order, queries = orders[name], slice(0, orders[name].queries)
        scores = encodings[name][queries] @ everything.T
        ranked = rank_tables(
            scores,
            order.syndromes[queries],
            order.roles[queries],
            syndromes,
            roles,
            range(splits),
        )
        ledger.add(mode, seed_index, cohort, order.image_ids, ranked)
