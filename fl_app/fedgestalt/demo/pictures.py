"""What the report shows beside numbers, joined from all hospitals' own records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedgestalt.cohort import Cohort, load_image
from fedgestalt.contracts import Pixels
from fedgestalt.demo.outcomes import SiteMatches
from fedgestalt.reporting.pictures import Example, GramView, Neighbour

_EXAMPLES = 6
_RANKED = 5
_NEIGHBOURS = 6


def examples(
    cohort: Cohort, matches: Mapping[str, SiteMatches], *, show_faces: bool
) -> list[Example]:
    """Queries of different syndromes and hospitals, taken in a fixed order: not the best ones."""
    owner = {
        handle: (image_id, site)
        for site, found in matches.items()
        for image_id, handle in zip(found.image_ids, found.handles, strict=True)
    }

    def face(image_id: str) -> Pixels | None:
        return load_image(cohort.images[image_id]) if show_faces else None

    def name(syndrome: int) -> str:
        return cohort.syndromes[syndrome].name

    candidates = [
        (site, found, row)
        for site, found in matches.items()
        for row, query in enumerate(found.queries)
        if query["ranked"] and found.image_ids[row] in set(cohort.frequent_test)
    ]
    order = np.random.default_rng(0).permutation(len(candidates))
    chosen: list[Example] = []
    seen: set[int] = set()
    sites: list[str] = []
    for index in order:
        site, found, row = candidates[index]
        record, query = cohort.images[found.image_ids[row]], found.queries[row]
        crowded = sites.count(site) > len(sites) // len(matches)
        if record.syndrome in seen or crowded:
            continue
        seen.add(record.syndrome)
        sites.append(site)
        chosen.append(
            Example(
                face(record.image_id),
                site,
                name(record.syndrome),
                tuple((name(s), score) for s, score in query["ranked"][:_RANKED]),
                tuple(
                    Neighbour(
                        face(owner[item["handle"]][0]),
                        name(item["syndrome"]),
                        owner[item["handle"]][1],
                        item["score"],
                    )
                    for item in query["neighbours"][:_NEIGHBOURS]
                ),
            )
        )
        if len(chosen) == _EXAMPLES:
            break
    return chosen


def gram_view(file: Path, cohort: Cohort, matches: Mapping[str, SiteMatches]) -> GramView:
    """The server's Gram matrix, with the syndromes and sites that only hospitals know."""
    known = {
        handle: (cohort.syndromes[cohort.images[image_id].syndrome].name, site)
        for site, found in matches.items()
        for image_id, handle in zip(found.image_ids, found.handles, strict=True)
    }
    with np.load(file, allow_pickle=False) as data:
        gram, handles = data["gram"], data["handles"]
    named = [row for row, handle in enumerate(handles) if handle.tobytes().hex() in known]
    facts = [known[handles[row].tobytes().hex()] for row in named]  # the others are planted rows
    return GramView(
        gram[np.ix_(named, named)], tuple(f[0] for f in facts), tuple(f[1] for f in facts)
    )
