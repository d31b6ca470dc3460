"""Features that a site computes in several processes before a job looks for them in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fedgestalt.cohort import ImageRecord
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.learning.processes import FeatureWork, compute_features
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.training import MemberProgress

CACHE_FOLDER = "cache"
"""In a site's store."""


def compute_ahead(
    settings: SiteSettings,
    site: str,
    ensemble: EnsembleSpec,
    records: Iterable[ImageRecord],
    seed: int | None,
    progress: MemberProgress,
) -> Path:
    """Fill the cache if the site has given several processes to it; nothing is done otherwise.

    Args:
        settings: the site's own.
        site: its name.
        ensemble: whose trunks to run.
        records: aligned faces.
        seed: of the variants to train on; None: the variants of an encoding.
        progress: see there.

    Returns:
        The cache's folder.

    Raises:
        DataError: a photograph cannot be read, or changed in the meantime.
        SiteError: the cache cannot be written, or a process ended without a word.
    """
    cache = settings.store_folder(site) / CACHE_FOLDER
    photographs = tuple(record.path.absolute() for record in records)
    if settings.processes > 1:
        work = FeatureWork(
            ensemble=ensemble,
            photographs=photographs,
            seed=seed,
            cache=cache,
            weights=settings.weights_folder(site),
            device=settings.device,
            threads=max(1, torch.get_num_threads() // settings.processes),
        )
        compute_features(work, settings.processes, progress)
    return cache
