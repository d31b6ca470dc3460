"""A site in one matching job: who it is, what it was told, and what it has for it."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedgestalt.cohort import Cohort, ImageRecord
from fedgestalt.cohort.phenotype import known_terms
from fedgestalt.contracts import MatchingStrategy, RankingStrategy
from fedgestalt.errors import ConfigError, ServerError, SiteError
from fedgestalt.federation.job.identity import Identity, PublicIdentity, Trust
from fedgestalt.federation.matching.galleries import SITE_GALLERIES_FOLDER, Galleries, Gallery
from fedgestalt.federation.matching.holdings import KernelStore
from fedgestalt.federation.matching.messages import (
    DISCOVER,
    Handles,
    MatchStart,
    handles_digest,
    query_statement,
)
from fedgestalt.federation.matching.receipts import Receipts
from fedgestalt.federation.site.features import compute_ahead
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import Registry
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.encoding import Encodings, encode
from fedgestalt.learning.ensemble import Ensemble
from fedgestalt.learning.images import FaceFiles
from fedgestalt.learning.store import load_ensemble
from fedgestalt.similarity.kernel import Kernel
from fedgestalt.similarity.order import ImageOrder, image_order


class Line(Protocol):
    """What moves long arrays between a site and the server."""

    def send(self, name: str, ticket: str, words: NDArray[np.uint32]) -> None:
        """Upload ``words``, which the server expects under this name and ticket."""

    def fetch(self, name: str, into: NDArray[np.uint32]) -> None:
        """Download what the server offers under this name."""


@dataclass
class MatchingSite:
    """What all parts of a site's side of one matching job work with.

    Attributes:
        site: its name.
        job: the job's id.
        start: what the server has said about the job.
        settings: the site's own.
        store: the site's folder.
        read_cohort: reads the site's patients; not before they are wanted.
        identity: who it is to its peers.
        trust: whose certificates it believes.
        strategy: how rows are compared.
        ranking: how syndromes score.
        counter: makes a progress callback from what it counts.
    """

    site: str
    job: str
    start: MatchStart
    settings: SiteSettings
    store: Path
    read_cohort: Callable[[], Cohort]
    identity: Identity
    trust: Trust
    strategy: MatchingStrategy
    ranking: RankingStrategy
    counter: Callable[[str], Callable[[int, int], None]]
    _ensemble: Ensemble | None = field(default=None, init=False)

    @functools.cached_property
    def cohort(self) -> Cohort:
        """The site's patients."""
        return self.read_cohort()

    @functools.cached_property
    def order(self) -> ImageOrder:
        """The order in which its images are sent."""
        return image_order(self.cohort)

    def check_patients(self) -> None:
        """Raise SiteError if it has no image to match; a discovery goes on without cases."""
        if self.start.purpose != DISCOVER:
            _ = self.order

    def check_terms(self) -> None:
        """Raise SiteError if HPO terms are to join its ranks and cannot be compared here."""
        if not self.start.hpo_weight:
            return
        asked = self.order.image_ids[: self.order.queries]
        if any(record.hpo for record in self.cohort.records(asked)):
            try:
                known_terms(())
            except ConfigError as error:
                raise SiteError(
                    "the job compares HPO terms, and the package hpo3 is not installed here",
                    remedy="install fedgestalt[phenotype] there, or submit the job with"
                    " hpo_weight=0",
                ) from error

    @property
    def kernels(self) -> KernelStore:
        """Its standing kernels."""
        return KernelStore(self.store)

    @property
    def receipts(self) -> Receipts:
        """Of what it has taken back."""
        return Receipts(self.store)

    @property
    def registry(self) -> Registry:
        """The installed plugins, with its folder of weights files."""
        return get_registry().with_weights(self.settings.weights_folder(self.site))

    @property
    def purpose(self) -> dict[str, str]:
        """What its galleries of shares are for."""
        return {"ensemble": self.start.ensemble, "strategy": self.start.strategy}

    @property
    def galleries(self) -> Galleries:
        """The shares that it holds as a computing site, in standing galleries."""
        return Galleries(self.store / SITE_GALLERIES_FOLDER, self.site)

    def open_gallery(self, kernel: Kernel) -> Gallery:
        """The shares that it holds under a kernel; kept beyond the job if the kernel is."""
        if not self.start.standing:
            return Gallery()
        self.galleries.begin(kernel.id, self.purpose, kernel.version)
        return self.galleries.gallery(kernel.id)

    @property
    def ensemble_folder(self) -> Path:
        """Where the job's ensemble is, or will be."""
        return self.store / "ensembles" / self.start.ensemble

    @property
    def has_ensemble(self) -> bool:
        """Whether it is there."""
        return self.ensemble_folder.is_dir()

    def ensemble(self) -> Ensemble:
        """The job's ensemble; read once.

        Raises:
            ConfigError: it is another one, or cannot be read.
            SiteError: this site may not use its weights.
        """
        if self._ensemble is None:
            ensemble, digest = load_ensemble(self.ensemble_folder, self.registry)
            if digest != self.start.ensemble:
                raise ConfigError(
                    "the stored ensemble has another digest", where=str(self.ensemble_folder)
                )
            self.settings.check_licences(ensemble.licences)
            self._ensemble = ensemble
        return self._ensemble

    def encode(self, records: Iterable[ImageRecord]) -> Encodings:
        """Encodings (n, d) of these images, in their order."""
        ensemble, faces = self.ensemble(), FaceFiles(tuple(records))

        def progress(member: str, done: int, total: int) -> None:
            self.counter(member)(done, total)

        return encode(
            ensemble,
            faces,
            choose_device(self.settings.device),
            compute_ahead(self.settings, self.site, ensemble.spec, faces.records, None, progress),
            self.counter("encoding"),
        )

    def peers(self, certificates: Mapping[str, bytes]) -> dict[str, PublicIdentity]:
        """Identities behind certificates, checked; this site's own must be its own."""
        if certificates.get(self.site, self.identity.certificate) != self.identity.certificate:
            raise ServerError("this site's own certificate came back altered", where=self.site)
        now = dt.datetime.now(dt.UTC)
        return {site: self.trust.check(site, pem, now) for site, pem in certificates.items()}

    def sign_queries(self, kernel: str, queries: Handles) -> bytes:
        """This site's signature on what it asks, for the other sites."""
        digest = handles_digest(queries)
        return self.identity.sign(
            query_statement(self.job, kernel, self.site, len(queries), digest)
        )
