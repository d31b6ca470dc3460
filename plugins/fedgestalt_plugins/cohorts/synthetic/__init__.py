"""Cohort ``synthetic``: rendered faces with artificial syndromes. No patient, no download.

A head model in the public domain (``data/HEAD_MODEL.md``) is morphed and painted into people of
varying ancestry, age and sex. Their syndromes are lists of facial features of the Human Phenotype
Ontology with penetrances (``data/syndromes.json``), named SYN-A to SYN-Z; 20 are frequent, 6 rare.
Each subject is photographed one to four times in changing pose, light and expression. What is
measured on these faces says nothing about clinical performance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedgestalt.contracts import Progress
from fedgestalt_plugins.cohorts.synthetic.parameters import Parameters


@dataclass(frozen=True)
class SyntheticCohort:
    """Cohort source ``synthetic``.

    Attributes:
        parameters: size and difficulty.
        workers: processes that render; one per CPU by default. Does not change a pixel.
    """

    parameters: Parameters = field(default_factory=Parameters)
    workers: int | None = None
    name: str = "synthetic"
    summary: str = "rendered faces with 26 artificial syndromes built from HPO features"
    licence: str = "Apache-2.0 AND CC0-1.0"
    has_patients: bool = False

    @property
    def version(self) -> str:
        """Generator and parameters."""
        return self.parameters.version

    def build(self, target: Path, progress: Progress) -> None:
        """Render all subjects into ``target``; about 9 ms per image and CPU.

        Raises:
            DataError: the head model or the catalogue is missing, or ``target`` cannot be written.
            SiteError: a rendering process died.
        """
        from fedgestalt_plugins.cohorts.synthetic.build import build_cohort

        build_cohort(self.parameters, self.name, target, progress, workers=self.workers)


__all__ = ["Parameters", "SyntheticCohort"]
