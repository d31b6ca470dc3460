"""The server's side of a discovery job: groups of alike unsolved cases across hospitals.

Sites agree on a kernel for this job alone and send one masked row for each unsolved case. The
server compares all of them, looks for groups, and tells each hospital of those groups that hold a
case of its own. It learns similarities and opaque handles, and which groups there are; no label, no
subject, no embedding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.errors import PeerError
from fedgestalt.federation.matching.messages import (
    DISCOVER,
    Ask,
    Cases,
    FoundGroups,
    GroupsKept,
)
from fedgestalt.federation.matching.workflow import FlakeSimilarityWorkflow
from fedgestalt.federation.tasks import CASES, GROUPS
from fedgestalt.messages import from_site
from fedgestalt.similarity.discovery import Group, find_groups
from fedgestalt.similarity.gram import check_one_party, dense_gram, similarities_of

HOSPITALS_LEARN = (
    "Of each group that holds a case of its own: opaque handles of its cases, how close it is and"
    " how surprising that is, and the hospitals that let others know; how many cases were compared"
    " in all."
)


class DiscoveryWorkflow(FlakeSimilarityWorkflow):
    """Looks for groups of alike unsolved cases.

    Args:
        ensemble: digest of the published ensemble that every site encodes with.
        strategy: name of a matching strategy that the server computes alone.
        level: groups with ``q_random`` above it are not reported.
        search_level: groups with ``p_search`` above it are not reported.
        minimum_sites: with fewer the job does not go on.
        sites: see :class:`PhasedWorkflow`.
        phase_limit_seconds: see :class:`PhasedWorkflow`.
        start_limit_seconds: see :class:`PhasedWorkflow`.
        silence_limit_seconds: see :class:`PhasedWorkflow`.
    """

    template: ClassVar[str] = DISCOVER

    def __init__(
        self,
        ensemble: str,
        strategy: str = "isometry",
        level: float = 0.05,
        search_level: float = 1.0,
        minimum_sites: int = 3,
        sites: list[str] | None = None,
        phase_limit_seconds: float = 3600.0,
        start_limit_seconds: float = 120.0,
        silence_limit_seconds: float = 30.0,
    ) -> None:
        super().__init__(
            ensemble,
            strategy,
            purpose=DISCOVER,
            yardstick_subjects=0,
            minimum_sites=minimum_sites,
            sites=sites,
            phase_limit_seconds=phase_limit_seconds,
            start_limit_seconds=start_limit_seconds,
            silence_limit_seconds=silence_limit_seconds,
        )
        self._level, self._search_level = level, search_level

    def check_strategy(self, strategy: MatchingStrategy) -> None:
        """See :class:`FlakeSimilarityWorkflow`; the server must see all similarities."""
        check_one_party(strategy)

    def compare(self, kernel: str, strategy: MatchingStrategy) -> dict[str, Any]:
        """See :class:`FlakeSimilarityWorkflow`."""
        cases = self._collect(kernel)
        some = [cases[site] for site in sorted(cases) if len(cases[site].rows)]
        owners = np.repeat(sorted(cases), [len(cases[site].rows) for site in sorted(cases)])
        groups: list[Group] = []
        if some:
            rows = np.concatenate([part.rows for part in some])
            gram = dense_gram(rows, rows, similarities_of(strategy)).astype(np.float64)
            gram = (gram + gram.T) / 2
            found = find_groups(
                gram, np.arange(len(rows)), owners, np.random.default_rng(), level=self._level
            )
            groups = [group for group in found if group.p_search <= self._search_level]
        self._tell(kernel, cases, owners, groups)
        return {"cases": len(owners), "groups": len(groups)}

    def privacy(self, strategy: MatchingStrategy) -> dict[str, str]:
        """See :class:`FlakeSimilarityWorkflow`."""
        return {**super().privacy(strategy), "asking_site_learns": HOSPITALS_LEARN}

    def _collect(self, kernel: str) -> dict[str, Cases]:
        cases: dict[str, Cases] = {}
        known: set[bytes] = set()

        def on_reply(site: str, fields: object) -> None:
            fault = from_site(site)
            new = Cases.from_fields(fields, fault)
            new.check(fault)
            if new.kernel != kernel:
                raise PeerError(f"it sent cases under kernel {new.kernel}, not {kernel}", site=site)
            sizes = {part.rows.shape[1] for part in (new, *cases.values()) if len(part.rows)}
            if len(sizes) > 1:
                raise PeerError("its rows have other dimensions than the others'", site=site)
            handles = {handle.tobytes() for handle in new.handles}
            if handles & known:
                raise PeerError("it sent a case that another site has sent", site=site)
            known.update(handles)
            cases[site] = new

        self.ask(CASES, Ask(), on_reply, self.here)
        return cases

    def _tell(
        self,
        kernel: str,
        cases: dict[str, Cases],
        owners: np.ndarray[Any, np.dtype[np.str_]],
        groups: list[Group],
    ) -> None:
        """Each site hears of the groups that hold a case of its own."""
        parts = [cases[site] for site in sorted(cases)]
        handles = np.concatenate([part.handles for part in parts])
        labels = np.concatenate([part.labels for part in parts])

        def told(site: str) -> FoundGroups:
            mine = [group for group in groups if site in group.sites]
            rows = np.array([row for group in mine for row in group.subjects], np.int64)
            numbers = [len(group.subjects) for group in mine]
            return FoundGroups(
                handles[rows],
                labels[rows],
                np.repeat(np.arange(len(mine), dtype=np.int32), numbers),
                np.array([group.closeness for group in mine], np.float32),
                np.array([group.p_random for group in mine], np.float32),
                np.array([group.q_random for group in mine], np.float32),
                np.array([group.p_search for group in mine], np.float32),
                len(owners),
            )

        def on_reply(site: str, fields: object) -> None:
            if GroupsKept.from_fields(fields, from_site(site)).kernel != kernel:
                raise PeerError("it kept groups under another kernel", site=site)

        self.ask(GROUPS, {site: told(site) for site in self.here}, on_reply, self.here)
