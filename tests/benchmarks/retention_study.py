"""One run of the retention study: train on cached features, then rank the test photographs.

The federated side is what the masked job computes: the project's own trainer at every site, updates
as words of the number plan, the words of all sites added, the sum decoded. Masks cancel in that
sum, so they, the messages and FLARE are left out (``tests/inproc/test_retention_study.py`` compares
the model with that of a job, bit for bit).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgestalt.cohort import Cohort, default_cache, materialise, read_cohort, split_cohort
from fedgestalt.federation.training.model import GlobalModel, Optimiser, ServerStep
from fedgestalt.federation.training.rounds import (
    Aggregation,
    Rule,
    Scope,
    exponents_of,
    first_ranges,
    next_ranges,
    number_plan,
    row_weights,
    shapes_of,
    with_metrics,
)
from fedgestalt.hooks import get_registry
from fedgestalt.learning.augment import draw_variants, test_variants
from fedgestalt.learning.data import local_seed
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.ensemble import (
    Ensemble,
    Member,
    SharedState,
    build_ensemble,
    read_shared_state,
    write_shared_state,
)
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.images import Faces, load_faces
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer, TrainingSet
from fedgestalt.similarity.ranking import score_syndromes
from fedgestalt_plugins.cohorts.synthetic import Parameters, SyntheticCohort

SYNTHETIC: Final = Parameters(frequent_subjects=36)
"""Half as many subjects again as the cohort ``synthetic`` has, from the same renderer."""

FULL, QUARTERS = "full", "quarters"
"""Necks of the trained member, see :class:`Quarters`."""

TRAINED, UNTOUCHED = "fine-tuned", "original"
ENSEMBLE = "ensemble"
ADAPTIVE = "adaptive"
"""Gradient steps at the sites, pooled BatchNorm, and Adam at the server (FedAdam)."""
RULES: Final = {
    "mean": Aggregation(),
    "class-weighted": Aggregation(rule=Rule.CLASS_WEIGHTED),
    "encoder-only": Aggregation(scope=Scope.ENCODER),
    ADAPTIVE: Aggregation(),
}
"""How a federation averages; :data:`ADAPTIVE` makes its steps in another way as well."""
SPLITS: Final[Mapping[str, tuple[str, float]]] = {
    "near-uniform": ("near-uniform", 0.5),
    "dirichlet-1": ("dirichlet", 1.0),
    "dirichlet-0.1": ("dirichlet", 0.1),
    "non-overlapping": ("non-overlapping", 0.5),
}
"""Strategy and alpha by name."""

Vectors = NDArray[np.float32]
_VARIANTS = 2
_AT_A_TIME = 256


@dataclass(frozen=True)
class Schedule:
    """How long, and with which settings, the member trains; the same for all three sides.

    Attributes:
        rounds: of the federation; the optimiser begins anew in each.
        epochs: local ones per round.
        training: other settings of :class:`TrainingSpec`.
        momentum: of the server (FedAvgM); of the federation alone.
        optimiser: of the server, with its ``learning_rate``.
        neck: ``full`` trains all 6.4 million weights of the network's own neck, ``quarters`` half a
            million behind :class:`Quarters`, at a fifth of the cost.
    """

    rounds: int = 5
    epochs: int = 4
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    momentum: float = 0.0
    neck: str = QUARTERS
    optimiser: str = "sgd"
    learning_rate: float = 1.0

    @property
    def step(self) -> ServerStep:
        """Of the federation's model."""
        return ServerStep(Optimiser(self.optimiser), self.learning_rate, self.momentum)

    def ensemble(self, seed: int) -> EnsembleSpec:
        """A network whose neck and head train, and the untouched original."""
        settings = {"batch_size": 64, **self.training}
        training = TrainingSpec(epochs=self.epochs, variants=_VARIANTS, **settings)
        return EnsembleSpec(
            members=(
                MemberSpec(name=TRAINED, backbone="sface", trainable="neck", training=training),
                MemberSpec(name=UNTOUCHED, backbone="sface", trainable="none"),
            ),
            seed=seed,
        )


SIDES: Final[Mapping[str, Schedule]] = {
    "centralised": Schedule(5, 4, {"learning_rate": 2e-3}),
    "federated": Schedule(20, 1, {"batch_size": 16, "learning_rate": 2e-3}, momentum=0.5),
    "local-only": Schedule(20, 1, {"batch_size": 16, "learning_rate": 2e-3}),
}
"""What each side trains with unless told otherwise, chosen on validation photographs; all train for
20 epochs."""
ADAPTIVE_SCHEDULE: Final = Schedule(
    60,
    1,
    {
        "batch_size": 128,
        "optimiser": "sgd",
        "batch_norm": "pooled",
        "learning_rate": 0.1,
        "head_learning_rate": 0.1,
        "weight_decay": 0.0,
        "head_weight_decay": 0.0,
    },
    momentum=0.9,
    optimiser="adam",
    learning_rate=1e-2,
)
"""Of :data:`ADAPTIVE`: most hospitals make one step a round, with all of their photographs."""


def usual_schedule(side: str, rule: str = "") -> Schedule:
    """What a side trains with unless told otherwise."""
    return ADAPTIVE_SCHEDULE if rule == ADAPTIVE else SIDES[side]


@dataclass(frozen=True)
class Photographs:
    """The frequent photographs of a cohort with the features of the frozen trunk.

    Attributes:
        cohort: as the plugin built it.
        neck: which features these are.
        place: row by image id.
        faces: (n, 112, 112, 3).
        train: (n, 2, *feature shape): the face, and one augmented variant, drawn once.
        test: (n, 4, *feature shape): the variants of an encoding.
        untouched: vectors of the original network, see :func:`member_vectors`.
    """

    cohort: Cohort
    neck: str
    place: Mapping[str, int]
    faces: Faces
    train: torch.Tensor
    test: torch.Tensor
    untouched: Vectors

    def rows(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """Their places."""
        return np.array([self.place[image_id] for image_id in image_ids], np.int64)

    def syndromes(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """Their labels."""
        return np.array([r.syndrome for r in self.cohort.records(image_ids)], np.int64)


class Quarters(nn.Module):
    """The end of a trunk that makes the neck small: what is linear in the network's map.

    That is its own encoding before the last normalisation (128), and the means of the four quarters
    of each channel (4 x 1024), doubled so that both have about the same scale. A neck that takes
    the former as it is *is* the original network; the latter gives training something to work on.
    """

    def __init__(self, fully_connected: nn.Linear) -> None:
        super().__init__()
        self.fully_connected = fully_connected

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) to (n, encoding + 4 * channels)."""
        quarters = nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1)
        return torch.cat([self.fully_connected(maps.flatten(1)), 2 * quarters], 1)


def with_small_neck(ensemble: Ensemble) -> Ensemble:
    """The same start, with a trained member whose trunk ends in :class:`Quarters`."""
    member, *others = ensemble.members
    own = member.neck
    size, width = member.embedding_size, member.embedding_size + 4 * member.feature_shape[0]
    linear = nn.Linear(width, size)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:, :size] = torch.eye(size)
        linear.bias.zero_()
    small = Member(
        member.spec,
        nn.Sequential(member.trunk, Quarters(own.fc)),
        nn.Sequential(linear, own.features).eval(),
        member.head,
        member.input,
        (width,),
        size,
        member.weights_licence,
    )
    return Ensemble(ensemble.spec, (small, *others), ensemble.classes)


def open_photographs(name: str, neck: str) -> Photographs:
    """Build the cohort and run the trunk once; both stay in the cache of the project."""
    cache = default_cache()
    source = SyntheticCohort(SYNTHETIC) if name == "synthetic" else get_registry().cohorts.get(name)
    cohort = read_cohort(materialise(source, cache, lambda done, total: None), name=name)
    ids = sorted(cohort.frequent_gallery + cohort.frequent_test)
    faces = load_faces(cohort.records(ids))
    ensemble = build_ensemble(Schedule().ensemble(1), len(cohort.classes), get_registry())
    member, device = ensemble.members[1], choose_device("cpu")
    folder = cache / "retention"
    plain = np.stack([np.stack(test_variants(face)) for face in faces])
    test = trunk_features(member, plain, device, folder)
    drawn = draw_variants(faces, _VARIANTS, (0,))[:, 1:]
    augmented = trunk_features(member, drawn, device, folder)
    untouched = member_vectors(member, test)
    if neck == QUARTERS:
        ending = Quarters(member.neck.fc)
        test, augmented = (_through(ending, features) for features in (test, augmented))
    train = torch.cat([test[:, :1], augmented], 1)
    place = {image_id: row for row, image_id in enumerate(ids)}
    return Photographs(cohort, neck, place, faces, train, test, untouched)


def _through(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """(n, variants, ...) in the number format of ``features``."""
    parts = []
    with torch.no_grad():
        for part in features.split(_AT_A_TIME):
            found = module(part.flatten(0, 1).float())
            parts.append(found.view(*part.shape[:2], -1).to(features.dtype))
    return torch.cat(parts)


def member_vectors(member: Member, features: torch.Tensor) -> Vectors:
    """Unit vectors of all variants in a row, as :func:`fedgestalt.learning.encoding.encode` has.

    Args:
        member: whose neck to run.
        features: (n, variants, *feature shape).

    Returns:
        (n, variants * embedding size); the inner product of two rows is the number of variants
        times their mean cosine.
    """
    neck = member.neck.eval()
    result = torch.empty((*features.shape[:2], member.embedding_size))
    with torch.inference_mode():
        for start in range(0, len(features), _AT_A_TIME):
            part = features[start : start + _AT_A_TIME].float()
            vectors = neck(part.flatten(0, 1)).view(*part.shape[:2], -1)
            result[start : start + len(part)] = torch.nn.functional.normalize(vectors, dim=2)
    return result.flatten(1).numpy()


def deal_roles(cohort: Cohort, seed: int) -> Cohort:
    """Deal the subjects of each frequent syndrome anew to train and test, as many as there were.

    Validation subjects stay what they are: they never test, and settings are chosen on them.
    """
    rng = np.random.default_rng([seed, 77])
    by_subject: dict[tuple[int, str], list[str]] = defaultdict(list)
    for record in cohort.records(sorted(cohort.train + cohort.frequent_test)):
        by_subject[record.syndrome, record.subject].append(record.image_id)
    tested = {(r.syndrome, r.subject) for r in cohort.records(cohort.frequent_test)}
    train: list[str] = []
    test: list[str] = []
    for syndrome in cohort.classes:
        subjects = sorted(key for key in by_subject if key[0] == syndrome)
        tests = sum(key in tested for key in subjects)
        for turn, index in enumerate(rng.permutation(len(subjects))):
            (test if turn < tests else train).extend(by_subject[subjects[index]])
    return dataclasses.replace(cohort, train=tuple(train), frequent_test=tuple(test))


def federate(
    ensemble: Ensemble,
    trainers: Mapping[str, LocalTrainer],
    aggregation: Aggregation,
    rounds: int,
) -> SharedState:
    """Train as the masked job does, and return the model it publishes.

    Args:
        ensemble: at its start state; the trainers may share it.
        trainers: by site.
        aggregation: what is averaged, and how.
        rounds: how many.
    """
    start = read_shared_state(ensemble)
    model = GlobalModel(aggregation.shared(start, ensemble.spec), aggregation.step)
    rest = {name: values for name, values in start.items() if name not in model.state}
    own = dict.fromkeys(trainers, rest)
    ranges = first_ranges(model.state, ensemble.spec)
    for number in range(1, rounds + 1):
        plan = number_plan(
            shapes_of(model.state),
            exponents_of(ranges),
            len(trainers),
            aggregation,
            ensemble.spec,
            ensemble.classes,
        )
        total = np.zeros(plan.words, np.uint32)
        for site, trainer in trainers.items():
            new, metrics = trainer.run_round({**own[site], **model.state}, number)
            own[site] = {name: new[name] for name in rest}
            update = {name: new[name] - values for name, values in model.state.items()}
            targets = trainer.data.targets
            counts = row_weights(plan, targets)
            total += plan.encode(with_metrics(update, metrics), len(targets), counts)
        aggregate = plan.decode(total)
        ranges = next_ranges(ranges, aggregate, number)
        model.step(aggregate.mean)
    return {**rest, **model.state}


def train_alone(trainer: LocalTrainer, start: SharedState, rounds: int) -> SharedState:
    """Train on one set, round by round."""
    state = start
    for number in range(1, rounds + 1):
        state, _ = trainer.run_round(state, number)
    return state


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        cohort: ``synthetic`` or a cohort plugin.
        seed: of roles, silos, start weights of the head, and batch order.
        side: ``centralised``, ``federated`` or ``local-only``.
        sites, split, rule: of the federation; 1 and empty where they mean nothing.
        schedule: how long it trains.
        on_validation: whether the validation photographs are ranked instead of the test ones.
    """

    cohort: str
    seed: int
    side: str
    sites: int = 1
    split: str = ""
    rule: str = ""
    schedule: Schedule = Schedule()
    on_validation: bool = False

    def facts(self) -> dict[str, Any]:
        """As a line of the result says them."""
        facts = dataclasses.asdict(self)
        schedule, usual = facts["schedule"], Schedule()
        for name in ("optimiser", "learning_rate"):  # lines of runs without them stay what they are
            if schedule[name] == getattr(usual, name):
                del schedule[name]
        return facts


def run(setting: Setting, photographs: Photographs) -> dict[str, Any]:
    """Train and rank.

    Returns:
        ``subjects``, ``syndromes``: of the queries. ``ranks``: by encoding (``ensemble``, the
        trained member alone, and the ``original`` for the centralised side), the rank of each
        query's syndrome from 1, 0 where the gallery lacks it; for ``local-only`` a list for each
        site, with ``homes``, the site of each query.

    Raises:
        DataError: the cohort is too small for so many sites.
    """
    dealt = deal_roles(photographs.cohort, setting.seed)
    if setting.on_validation:
        dealt = dataclasses.replace(dealt, validation=(), frequent_test=dealt.validation)
    spec = setting.schedule.ensemble(setting.seed)
    ensemble, start = _start(spec.model_dump_json(), len(dealt.classes), photographs.neck)
    write_shared_state(ensemble, start)
    rounds = setting.schedule.rounds
    queries = list(dealt.frequent_test)
    result: dict[str, Any] = {
        "subjects": [record.subject for record in dealt.records(queries)],
        "syndromes": photographs.syndromes(queries).tolist(),
        "training_images": len(dealt.train),
        "gallery_images": len(dealt.frequent_gallery),
    }
    if setting.side == "centralised":
        trainer = _trainer(ensemble, photographs, dealt, "everybody")
        write_shared_state(ensemble, train_alone(trainer, start, rounds))
        result["ranks"] = _ranks(ensemble, photographs, queries, dealt.frequent_gallery, True)
        return result
    sites = [f"hospital-{number:02d}" for number in range(1, setting.sites + 1)]
    strategy, alpha = SPLITS[setting.split]
    silos = split_cohort(dealt, sites, strategy, setting.seed, alpha)
    trainers = {site: _trainer(ensemble, photographs, silos[site], site) for site in sites}
    result["site_images"] = [len(silo.train) for silo in silos.values()]
    if setting.side == "federated":
        aggregation = dataclasses.replace(RULES[setting.rule], step=setting.schedule.step)
        write_shared_state(ensemble, federate(ensemble, trainers, aggregation, rounds))
        result["ranks"] = _ranks(ensemble, photographs, queries, dealt.frequent_gallery)
        return result
    home = {image_id: i for i, silo in enumerate(silos.values()) for image_id in silo.images}
    result["homes"] = [home[image_id] for image_id in queries]
    ranks: dict[str, list[list[int]]] = defaultdict(list)
    for site, trainer in trainers.items():
        write_shared_state(ensemble, train_alone(trainer, start, rounds))
        found = _ranks(ensemble, photographs, queries, silos[site].frequent_gallery)
        for encoding, values in found.items():
            ranks[encoding].append(values)
    result["ranks"] = dict(ranks)
    return result


@functools.lru_cache(maxsize=1)
def _start(spec: str, classes: int, neck: str) -> tuple[Ensemble, SharedState]:
    """A network to train with, and the state in which every run begins."""
    ensemble = build_ensemble(EnsembleSpec.model_validate_json(spec), classes, get_registry())
    if neck == QUARTERS:
        ensemble = with_small_neck(ensemble)
    return ensemble, read_shared_state(ensemble)


def _trainer(ensemble: Ensemble, photographs: Photographs, silo: Cohort, site: str) -> LocalTrainer:
    rows = photographs.rows(silo.train)
    index = {syndrome: i for i, syndrome in enumerate(silo.classes)}
    labels = photographs.syndromes(silo.train).tolist()
    targets = np.array([index[syndrome] for syndrome in labels], np.int64)
    data = TrainingSet(photographs.faces[rows], targets, len(silo.classes))
    seed, features = local_seed(ensemble.spec.seed, site), {TRAINED: photographs.train[rows]}
    return LocalTrainer(ensemble, data, choose_device("cpu"), seed, None, features)


def _ranks(
    ensemble: Ensemble,
    photographs: Photographs,
    queries: Sequence[str],
    gallery: Sequence[str],
    also_untouched: bool = False,
) -> dict[str, list[int]]:
    """Ranks of the queries' syndromes by encoding; a syndrome scores as its nearest photograph."""
    asked, known = photographs.rows(queries), photographs.rows(gallery)
    vectors = member_vectors(ensemble.members[0], photographs.test[np.r_[asked, known]])
    trained = vectors[: len(asked)] @ vectors[len(asked) :].T
    untouched = photographs.untouched[asked] @ photographs.untouched[known].T
    found = {ENSEMBLE: trained + untouched, TRAINED: trained}
    if also_untouched:
        found[UNTOUCHED] = untouched
    truth, labels = photographs.syndromes(queries), photographs.syndromes(gallery)
    return {
        name: score_syndromes(similarities, labels).ranks(truth).tolist()
        for name, similarities in found.items()
    }
