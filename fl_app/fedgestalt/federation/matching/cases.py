"""A site's side of a discovery job: one masked row for each unsolved case, and what comes back.

The row of a case is the mean of its photographs' encodings, scaled to length 1: the server does not
learn how many there are. All that names a case outside its hospital is a random handle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cohort import UNSOLVED
from fedgestalt.errors import ServerError
from fedgestalt.federation.matching.enrolling import joined_labels, masked_rows, stacked
from fedgestalt.federation.matching.holdings import write_json_privately
from fedgestalt.federation.matching.messages import Cases, FoundGroups, GroupsKept
from fedgestalt.federation.matching.site import MatchingSite
from fedgestalt.learning.encoding import Encodings
from fedgestalt.messages import from_server
from fedgestalt.similarity.kernel import Kernel
from fedgestalt.similarity.labels import Label, new_handle, open_label, seal_label

DISCOVERIES_FOLDER = "discoveries"
DISCOVERY_SCHEMA = "fedgestalt.discovery/1"
CAUTION = (
    "these cases are more alike than others in the eyes of a network. Ancestry, age, a family, a"
    " camera, or the same patient at two hospitals make a group as well as a syndrome does. Only"
    " p_search asks whether a search finds such a group where there is none; q_random alone is no"
    " evidence"
)


@dataclass(frozen=True)
class OwnCase:
    """An unsolved case of this site.

    Attributes:
        subject: as the site calls them.
        images: ids.
    """

    subject: str
    images: tuple[str, ...]


def enrol_cases(own: MatchingSite, kernel: Kernel) -> tuple[dict[str, OwnCase], Cases]:
    """One masked row for each unsolved case, under a fresh handle.

    Returns:
        The cases by handle (hexadecimal), and what goes to the server. A site may have none.
    """
    images: dict[str, list[str]] = defaultdict(list)
    for image, record in own.cohort.unsolved.items():
        images[record.subject].append(image)
    cases = {new_handle().hex(): OwnCase(s, tuple(some)) for s, some in images.items()}
    cases = dict(sorted(cases.items()))  # in no order that the hospital's files have
    rows = _mean_encodings(own, list(cases.values()))
    hospital = own.site if own.settings.reveal_hospital else ""
    labels = [
        seal_label(Label(UNSOLVED, 0, bytes.fromhex(h), hospital), kernel, bytes.fromhex(h))
        for h in cases
    ]
    masked = masked_rows(own, rows, kernel)
    return cases, Cases(kernel.id, masked, stacked(list(cases)), joined_labels(labels))


def keep_groups(
    own: MatchingSite, kernel: Kernel, cases: Mapping[str, OwnCase], found: FoundGroups
) -> GroupsKept:
    """Check the groups that came, and store them with this site's own cases by name.

    Raises:
        ServerError: a group holds no case of this site, is none, or a label does not open.
    """
    found.check(from_server)
    handles = [handle.tobytes().hex() for handle in found.handles]
    groups: list[dict[str, Any]] = [
        {
            "closeness": round(float(found.closeness[number]), 6),
            "p_random": round(float(found.p_random[number]), 6),
            "q_random": round(float(found.q_random[number]), 6),
            "p_search": round(float(found.p_search[number]), 6),
            "cases": [],
        }
        for number in range(len(found.closeness))
    ]
    for row, handle in enumerate(handles):
        label = open_label(found.labels[row].tobytes(), kernel, bytes.fromhex(handle))
        mine = cases.get(handle)
        groups[found.groups[row]]["cases"].append(
            {
                "case": handle,
                "hospital": own.site if mine else label.hospital,
                "subject": mine.subject if mine else None,
                "images": list(mine.images) if mine else [],
            }
        )
    for group in groups:
        if not any(case["subject"] is not None for case in group["cases"]):
            raise ServerError("a group came that holds no case of this site", where=own.site)
    content = {
        "schema": DISCOVERY_SCHEMA,
        "notice": RESEARCH_USE_ONLY,
        "says": CAUTION,
        "site": own.site,
        "job": own.job,
        "kernel": kernel.id,
        "own_cases": len(cases),
        "compared_cases": found.compared,
        "groups": groups,
    }
    write_json_privately(own.store / DISCOVERIES_FOLDER / f"{own.job}.json", content)
    return GroupsKept(kernel.id)


def _mean_encodings(own: MatchingSite, cases: list[OwnCase]) -> Encodings:
    """(cases, d) of length 1."""
    if not cases:
        return np.empty((0, 0), np.float32)
    unsolved = own.cohort.unsolved
    encodings = own.encode(unsolved[image] for case in cases for image in case.images)
    starts = np.cumsum([0, *(len(case.images) for case in cases[:-1])])
    sums = np.add.reduceat(encodings, starts, axis=0)
    rows: Encodings = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return rows
