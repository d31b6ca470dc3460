"""A site's side of the discovery job: which task goes to which part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.federation import tasks
from fedgestalt.federation.job.executor import Handler
from fedgestalt.federation.matching.cases import OwnCase, enrol_cases, keep_groups
from fedgestalt.federation.matching.executor import FlakeMatcher
from fedgestalt.federation.matching.messages import (
    DISCOVER,
    Ask,
    Cases,
    FoundGroups,
    GroupsKept,
    MatchStart,
)
from fedgestalt.messages import from_server
from fedgestalt.similarity.gram import check_one_party

_SHARED_TASKS: Final = (
    tasks.START,
    tasks.HOLDINGS,
    tasks.KERNEL_KEYS,
    tasks.SEAL,
    tasks.AGREE,
)


class CaseFinder(FlakeMatcher):
    """Encodes the site's unsolved cases, masks them, and keeps the groups that hold one of them.

    It knows no task that would send an image of a diagnosed patient.

    Args:
        phase_limit_seconds: for a transfer.
    """

    template: ClassVar[str] = DISCOVER
    purposes: ClassVar[tuple[str, ...]] = (DISCOVER,)

    def __init__(self, phase_limit_seconds: float = 3600.0) -> None:
        super().__init__(phase_limit_seconds)
        self._cases: dict[str, OwnCase] = {}

    def handlers(self) -> Mapping[str, Handler]:
        """Tasks of the discovery job."""
        shared = super().handlers()
        return {task: shared[task] for task in _SHARED_TASKS} | {
            tasks.CASES: self._enrol_cases,
            tasks.GROUPS: self._keep_groups,
        }

    def check_start(self, start: MatchStart, strategy: MatchingStrategy) -> None:  # noqa: ARG002
        """See :class:`FlakeMatcher`; no row is released, and the server compares alone."""
        check_one_party(strategy)

    def _enrol_cases(self, fields: object) -> Cases:
        Ask.from_fields(fields, from_server)
        self._cases, message = enrol_cases(self._own, self._kernel.current)
        return message

    def _keep_groups(self, fields: object) -> GroupsKept:
        found = FoundGroups.from_fields(fields, from_server)
        return keep_groups(self._own, self._kernel.current, self._cases, found)
