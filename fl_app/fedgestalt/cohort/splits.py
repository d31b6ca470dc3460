"""Deal a cohort over several sites, as if each of them had brought its part.

The unit is the subject: all images of a subject are at one site, and keep their roles. Every silo
carries the whole label map, as the sites of a consortium do.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from fedgestalt.cohort.gmdb import write_cohort
from fedgestalt.cohort.records import Cohort, RareSplit
from fedgestalt.cohort.tables import is_plain_name
from fedgestalt.errors import ConfigError, DataError, nearest

_DRAWS = 100
_ROLES: Final = ("train", "validation", "test", "rare")


@dataclass(frozen=True)
class _Subject:
    """What dealing looks at."""

    name: str
    syndrome: int
    role: str
    images: int


_Dealt = dict[str, int]  # subject -> index of the site


def split_cohort(
    cohort: Cohort, sites: Sequence[str], strategy: str, seed: int, alpha: float = 0.5
) -> dict[str, Cohort]:
    """Deal the subjects of ``cohort`` over ``sites``.

    Args:
        cohort: what to deal.
        sites: distinct names, at least two.
        strategy: ``near-uniform`` gives each site its share of every syndrome and role;
            ``non-overlapping`` gives each syndrome to one site, balanced by images; ``dirichlet``
            draws the shares of each syndrome from a symmetric Dirichlet distribution (Hsu et al.
            2019, "Measuring the effects of non-identical data distribution").
        seed: the same seed deals in the same way.
        alpha: concentration for ``dirichlet``: the smaller, the more unequal.

    Unsolved cases go round the sites, whatever the strategy.

    Returns:
        A cohort for each site, in the order of ``sites``. Images stay where they are.

    Raises:
        ConfigError: an argument makes no sense.
        DataError: the cohort is too small: a site would have nothing to train on.
    """
    _check_arguments(sites, strategy, alpha)
    subjects = _subjects(cohort)
    trainers = sum(subject.role == "train" for subject in subjects)
    if trainers < len(sites):
        raise DataError(
            f"{trainers} training subjects cannot be dealt over {len(sites)} sites",
            where=cohort.name,
            remedy="name fewer sites",
        )
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative", remedy="choose 0 or more")
    rng = np.random.default_rng(seed)
    dealt = _STRATEGIES[strategy](subjects, len(sites), alpha, rng)
    names = sorted({record.subject for record in cohort.unsolved.values()})
    dealt |= {names[n]: turn % len(sites) for turn, n in enumerate(rng.permutation(len(names)))}
    idle = set(range(len(sites))) - {dealt[s.name] for s in subjects if s.role == "train"}
    if idle:
        raise DataError(
            f"site {sites[min(idle)]!r} would get no training image with the split {strategy!r}",
            where=cohort.name,
            remedy="name fewer sites or choose another split",
        )
    return {site: _silo(cohort, site, dealt, index) for index, site in enumerate(sites)}


def write_silos(silos: Mapping[str, Cohort], out: Path) -> None:
    """Write each silo as a complete GMDB folder ``out/SITE``; each appears only when it is whole.

    Raises:
        ConfigError: a folder of that name is there already.
        DataError: it cannot be written.
    """
    for site in silos:
        if (out / site).exists():
            raise ConfigError(
                "the folder is there already", where=str(out / site), remedy="choose a new folder"
            )
    for site, silo in silos.items():
        try:
            out.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{site}-", dir=out))
        except OSError as error:
            raise DataError(
                f"the folder cannot be written: {error.strerror}",
                where=str(out),
                remedy="choose another folder",
            ) from None
        try:
            write_cohort(silo, building)
            building.chmod(0o755)
            building.rename(out / site)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _check_arguments(sites: Sequence[str], strategy: str, alpha: float) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(f"no split is called {strategy!r}", remedy=nearest(strategy, STRATEGIES))
    if len(sites) < 2:
        raise ConfigError("a split needs at least two sites", remedy="name more sites")
    if len(set(sites)) < len(sites):
        raise ConfigError("a site is named twice", remedy="give each site its own name")
    odd = [site for site in sites if not is_plain_name(site)]
    if odd:
        remedy = "use letters, digits, dot, hyphen and underscore"
        raise ConfigError(f"site name {odd[0]!r} cannot be a folder name", remedy=remedy)
    if not alpha > 0:
        raise ConfigError(f"alpha is {alpha}", remedy="choose a number above 0")


def _subjects(cohort: Cohort) -> list[_Subject]:
    """All subjects by name, so that the order of rows in files does not matter."""
    groups = (cohort.train, cohort.validation, cohort.frequent_test)
    role_of = {i: role for role, ids in zip(_ROLES, groups, strict=False) for i in ids}
    images: dict[str, list[str]] = defaultdict(list)
    for record in cohort.images.values():
        images[record.subject].append(record.image_id)
    return [
        _Subject(
            name=name,
            syndrome=cohort.images[ids[0]].syndrome,
            role=min((role_of.get(i, "rare") for i in ids), key=_ROLES.index),
            images=len(ids),
        )
        for name, ids in sorted(images.items())
    ]


def _strata(subjects: Iterable[_Subject]) -> dict[tuple[str, int], list[_Subject]]:
    """Subjects by role and syndrome."""
    strata: dict[tuple[str, int], list[_Subject]] = defaultdict(list)
    for subject in subjects:
        strata[subject.role, subject.syndrome].append(subject)
    return dict(sorted(strata.items()))


def _near_uniform(
    subjects: Sequence[_Subject], sites: int, alpha: float, rng: np.random.Generator
) -> _Dealt:
    """Go round the sites within each syndrome and role, those with the fewest images first."""
    del alpha
    dealt: _Dealt = {}
    held: dict[str, Counter[int]] = defaultdict(Counter)
    for (role, _), members in _strata(subjects).items():
        order = sorted(rng.permutation(sites).tolist(), key=lambda site: held[role][site])
        for turn, index in enumerate(rng.permutation(len(members))):
            site = order[turn % sites]
            dealt[members[index].name] = site
            held[role][site] += members[index].images
    return dealt


def _non_overlapping(
    subjects: Sequence[_Subject], sites: int, alpha: float, rng: np.random.Generator
) -> _Dealt:
    """Give the largest syndrome left to the site with the fewest images; rare ones apart."""
    del alpha
    owner: dict[int, int] = {}
    for rare in (False, True):
        sizes: Counter[int] = Counter()
        for subject in subjects:
            sizes[subject.syndrome] += subject.images * ((subject.role == "rare") == rare)
        held = dict.fromkeys(rng.permutation(sites).tolist(), 0)
        syndromes = [s for s in rng.permutation(list(sizes)).tolist() if sizes[s]]
        for syndrome in sorted(syndromes, key=lambda s: -sizes[s]):
            site = owner.setdefault(syndrome, min(held, key=held.__getitem__))
            held[site] += sizes[syndrome]
    return {subject.name: owner[subject.syndrome] for subject in subjects}


def _dirichlet(
    subjects: Sequence[_Subject], sites: int, alpha: float, rng: np.random.Generator
) -> _Dealt:
    """Draw until every site can train; if that does not come about, move one subject to each."""
    strata = _strata(subjects)
    trainers = [subject for subject in subjects if subject.role == "train"]
    dealt: _Dealt = {}
    for _ in range(_DRAWS):
        shares = {s: _shares(sites, alpha, rng) for s in sorted({s for _, s in strata})}
        for (_, syndrome), members in strata.items():
            chosen = rng.choice(sites, size=len(members), p=shares[syndrome])
            dealt |= {m.name: int(site) for m, site in zip(members, chosen, strict=True)}
        if len({dealt[subject.name] for subject in trainers}) == sites:
            return dealt
    for site in range(sites):
        held = Counter(dealt[subject.name] for subject in trainers)
        if not held[site]:
            donor = held.most_common(1)[0][0]
            given = [subject.name for subject in trainers if dealt[subject.name] == donor]
            dealt[given[int(rng.integers(len(given)))]] = site
    return dealt


def _shares(sites: int, alpha: float, rng: np.random.Generator) -> list[float]:
    """A Dirichlet draw; for a tiny ``alpha``, where it underflows, its limit: one site has all."""
    shares = rng.dirichlet(np.full(sites, alpha))
    if not np.isfinite(shares).all() or shares.sum() < 0.5:
        shares = np.eye(sites)[rng.integers(sites)]
    drawn: list[float] = (shares / shares.sum()).tolist()
    return drawn


_Strategy = Callable[[Sequence[_Subject], int, float, np.random.Generator], _Dealt]
_STRATEGIES: Final[Mapping[str, _Strategy]] = MappingProxyType(
    {"near-uniform": _near_uniform, "non-overlapping": _non_overlapping, "dirichlet": _dirichlet}
)
STRATEGIES: Final = tuple(_STRATEGIES)
"""Names that :func:`split_cohort` knows."""


def _silo(cohort: Cohort, site: str, dealt: _Dealt, index: int) -> Cohort:
    def here(image_ids: Iterable[str]) -> tuple[str, ...]:
        return tuple(r.image_id for r in cohort.records(image_ids) if dealt[r.subject] == index)

    rare = tuple(RareSplit(here(split.gallery), here(split.test)) for split in cohort.rare_splits)
    return replace(
        cohort,
        name=site,
        images={image_id: cohort.images[image_id] for image_id in here(cohort.images)},
        train=here(cohort.train),
        validation=here(cohort.validation),
        frequent_test=here(cohort.frequent_test),
        rare_splits=rare if any(split.gallery or split.test for split in rare) else (),
        unsolved={i: r for i, r in cohort.unsolved.items() if dealt[r.subject] == index},
    )
