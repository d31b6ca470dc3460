"""A site's side of the training job."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import ServerError
from fedgestalt.federation import tasks
from fedgestalt.federation.job.executor import Handler, SiteExecutor
from fedgestalt.federation.job.handshake import Present, present
from fedgestalt.federation.training.messages import (
    Join,
    Publish,
    Published,
    RoundStart,
)
from fedgestalt.federation.training.rounds import (
    OWN_UPDATE,
    can_judge_labels,
    check_update_norm,
    round_facts,
    training_facts,
    with_metrics,
)
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.data import held_out_set, local_seed, training_set
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.ensemble import SharedState, build_ensemble, weight_licences
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.store import save_ensemble
from fedgestalt.learning.training import LocalTrainer
from fedgestalt.messages import from_server
from fedgestalt.secagg import KeyOffer, KeyRoster, MaskedVector, SiteSession

log = logging.getLogger(__name__)
_RARELY = 0.01


class EnsembleTrainer(SiteExecutor):
    """Trains every member on the site's images and returns the update under masks.

    Args:
        ensemble: the same specification as the workflow's.
    """

    template: ClassVar[str] = "train_ensemble"

    def __init__(self, ensemble: dict[str, Any]) -> None:
        super().__init__()
        self._spec_fields = ensemble
        self._trainer: LocalTrainer | None = None
        self._roster: tuple[str, ...] = ()
        self._round: tuple[RoundStart, SiteSession] | None = None
        self._model: SharedState | None = None
        self._agreement: dict[str, float] = {}

    def handlers(self) -> Mapping[str, Handler]:
        """Tasks of the training job."""
        return {
            tasks.JOIN: self._join,
            tasks.ROUND: self._start_round,
            tasks.UPDATE: self._train,
            tasks.PUBLISH: self._store,
        }

    def _join(self, fields: object) -> Present:
        join = Join.from_fields(fields, from_server)
        self.settings.check_roster(self.site, join.roster)
        spec = read_options(EnsembleSpec, self._spec_fields, where="ensemble of the training job")
        registry = get_registry()
        self.settings.check_licences(weight_licences(spec, registry))
        self._roster = join.roster
        data = training_set(self.cohort)
        ensemble = build_ensemble(spec, data.classes, registry)
        device = choose_device(self.settings.device)
        seed, cache = local_seed(spec.seed, self.site), self.store / "cache"
        held_out = held_out_set(self.cohort)
        self._trainer = LocalTrainer(ensemble, data, device, seed, cache, held_out=held_out)
        facts = training_facts(ensemble, join.roster, join.max_weight, registry)
        return present({**facts, "label map": self.cohort.label_map_digest})

    def _start_round(self, fields: object) -> KeyOffer:
        start = RoundStart.from_fields(fields, from_server)
        spec = self._joined.ensemble.spec
        state = dict(start.state)
        if self._model is not None:
            self._check_step(state, "the consortium's last update")
        facts = round_facts(
            job=self.job,
            attempt=start.attempt,
            round_number=start.round,
            state=state,
            exponents=start.exponents,
            max_weight=start.max_weight,
            roster=self._roster,
            spec=spec,
        )
        session = SiteSession(self.site, facts, minimum_sites=self.settings.minimum_sites)
        self._round, self._model = (start, session), state
        self._plan = facts.plan
        return session.offer_key()

    def _train(self, fields: object) -> MaskedVector:
        keys = KeyRoster.from_fields(fields, from_server)
        if self._round is None:
            raise ServerError("keys came without a round", where=self.site)
        (start, session), self._round = self._round, None
        trainer = self._joined

        def progress(member: str, done: int, total: int) -> None:
            self.counter(member)(done, total)

        new, metrics = trainer.run_round(start.state, start.round, progress)
        update = self._check_step(new, OWN_UPDATE)
        self._agreement = {
            name: m.agreement for name, m in metrics.items() if m.agreement is not None
        }
        words = self._plan.encode(with_metrics(update, metrics), len(trainer.data.targets))
        return session.mask(keys, words)

    def _check_step(self, new: SharedState, whose: str) -> SharedState:
        """The change from the model that this site was sent last, if it is a sound one."""
        old = self._model
        if old is None or {n: v.shape for n, v in new.items()} != {
            name: values.shape for name, values in old.items()
        }:
            raise ServerError("the model's tensors changed between rounds", where=self.site)
        update = {name: values - old[name] for name, values in new.items()}
        check_update_norm(update, old, self.settings.max_update_norm, whose)
        return update

    def _store(self, fields: object) -> Published:
        publish = Publish.from_fields(fields, from_server)
        folder = self.store / "ensembles" / publish.digest
        self._check_step(dict(publish.state), "the consortium's last update")
        digest = save_ensemble(folder, self._joined.ensemble, dict(publish.state))
        if digest != publish.digest:
            raise ServerError(
                "the published model does not have the digest it names", where=self.site
            )
        own = np.array([self._agreement[name] for name in sorted(self._agreement)])
        held_out, chance = self._joined.held_out, 1 / self._joined.data.classes
        count = len(held_out.targets) if held_out else 0
        doubtful = labels_are_doubtful(own, publish.agreement, count, chance)
        if doubtful:
            log.warning(
                "the consortium's model agrees with %.0f %% of this site's held-out labels and"
                " %.0f %% of all sites': check the lookup table and the diagnoses",
                *(100 * own.mean(), 100 * publish.agreement.mean()),
            )
        return Published(digest, int(doubtful))

    @property
    def _joined(self) -> LocalTrainer:
        if self._trainer is None:
            raise ServerError("a round came before the site had joined", where=self.site)
        return self._trainer


def labels_are_doubtful(
    own: NDArray[np.floating], everybody: NDArray[np.floating], images: int, chance: float
) -> bool:
    """Whether the consortium's model agrees with far fewer of one site's labels than with all.

    That is: with less than half as many, and so few that it would come about once in a hundred
    times at a site like the others (binomial test).

    Args:
        own: (members,) share of the site's held-out images that each member of the model that came
            into the last round classified as labelled.
        everybody: the same over all sites; negative where nobody could measure it.
        images: how many held-out images the site has.
        chance: agreement of a model that knows nothing; nothing is doubtful before the consortium's
            is twice as good.
    """
    if own.shape != everybody.shape or not own.size or not images:
        return False
    usual, here = float(everybody.mean()), float(own.mean())
    if not can_judge_labels(everybody, chance) or here >= usual / 2:
        return False
    usual = min(usual, 1.0)
    right = math.floor(here * images + 1e-6)  # 3 / 47 * 47 is less than 3
    so_few = sum(
        math.comb(images, k) * usual**k * (1 - usual) ** (images - k) for k in range(right + 1)
    )
    return so_few < _RARELY
