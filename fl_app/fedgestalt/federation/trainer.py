"""A site's side of the training job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fedgestalt
from fedgestalt.errors import ServerError
from fedgestalt.federation import training_workflow as tasks
from fedgestalt.federation.rounds import round_facts, with_metrics
from fedgestalt.federation.site import Handler, SiteExecutor
from fedgestalt.federation.training_messages import (
    Join,
    Joined,
    Publish,
    Published,
    RoundStart,
)
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.data import local_seed, training_set
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.ensemble import SharedState, build_ensemble
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.store import save_ensemble
from fedgestalt.learning.training import LocalTrainer
from fedgestalt.messages import from_server
from fedgestalt.secagg import KeyOffer, KeyRoster, MaskedVector, SiteSession


class EnsembleTrainer(SiteExecutor):
    """Trains every member on the site's images and returns the update under masks.

    Args:
        ensemble: the same specification as the workflow's.
    """

    def __init__(self, ensemble: dict[str, Any]) -> None:
        super().__init__()
        self._spec_fields = ensemble
        self._trainer: LocalTrainer | None = None
        self._roster: tuple[str, ...] = ()
        self._round: tuple[RoundStart, SiteSession] | None = None

    def handlers(self) -> Mapping[str, Handler]:
        """Tasks of the training job."""
        return {
            tasks.JOIN: self._join,
            tasks.ROUND: self._start_round,
            tasks.UPDATE: self._train,
            tasks.PUBLISH: self._store,
        }

    def _join(self, fields: object) -> Joined:
        self._roster = Join.from_fields(fields, from_server).roster
        spec = read_options(EnsembleSpec, self._spec_fields, where="ensemble of the training job")
        data = training_set(self.cohort)
        ensemble = build_ensemble(spec, data.classes, get_registry())
        device = choose_device(self.settings.device)
        seed, cache = local_seed(spec.seed, self.site), self.store / "cache"
        self._trainer = LocalTrainer(ensemble, data, device, seed, cache)
        labels = self.cohort.label_map_digest
        return Joined(fedgestalt.__version__, labels, data.classes, ensemble.start_digest)

    def _start_round(self, fields: object) -> KeyOffer:
        start = RoundStart.from_fields(fields, from_server)
        ensemble = self._joined.ensemble
        facts = round_facts(
            job=self.job,
            attempt=start.attempt,
            round_number=start.round,
            state=dict(start.state),
            exponents=start.exponents,
            max_weight=start.max_weight,
            roster=self._roster,
            spec=ensemble.spec,
        )
        session = SiteSession(self.site, facts, minimum_sites=self.settings.minimum_sites)
        self._round = (start, session)
        self._plan = facts.plan
        return session.offer_key()

    def _train(self, fields: object) -> MaskedVector:
        keys = KeyRoster.from_fields(fields, from_server)
        if self._round is None:
            raise ServerError("keys came without a round", where=self.site)
        (start, session), self._round = self._round, None
        trainer = self._joined

        def progress(member: str, done: int, total: int) -> None:
            self.progress.counter(member)(done, total)

        new, metrics = trainer.run_round(start.state, start.round, progress)
        update: SharedState = {name: values - start.state[name] for name, values in new.items()}
        words = self._plan.encode(with_metrics(update, metrics), len(trainer.data.targets))
        return session.mask(keys, words)

    def _store(self, fields: object) -> Published:
        publish = Publish.from_fields(fields, from_server)
        folder = self.store / "ensembles" / publish.digest
        digest = save_ensemble(folder, self._joined.ensemble, dict(publish.state))
        if digest != publish.digest:
            raise ServerError(
                "the published model does not have the digest it names", where=self.site
            )
        return Published(digest)

    @property
    def _joined(self) -> LocalTrainer:
        if self._trainer is None:
            raise ServerError("a round came before the site had joined", where=self.site)
        return self._trainer
