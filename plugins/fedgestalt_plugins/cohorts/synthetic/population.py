"""Synthetic people: identity, syndrome and looks, each from a random stream of its own.

So any subject, and any image of it, can be made alone and in any order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedgestalt.contracts import Pixels
from fedgestalt.errors import DataError
from fedgestalt_plugins.cohorts.synthetic.head import HeadModel
from fedgestalt_plugins.cohorts.synthetic.paint import Appearance
from fedgestalt_plugins.cohorts.synthetic.parameters import Parameters
from fedgestalt_plugins.cohorts.synthetic.photograph import degrade, draw_view
from fedgestalt_plugins.cohorts.synthetic.render import FaceRenderer

DATA: Final = Path(__file__).parents[1] / "data"
AGE_GROUPS: Final = ("baby", "child", "young", "old")
_MAX_IMAGES = 4

# First part of the key of each random stream.
_IDENTITY, _SYNDROME, _PHOTOGRAPH, _COUNT = 1, 2, 3, 4


@dataclass(frozen=True)
class Subject:
    """Shape, looks and ground truth of one synthetic person; ``hpo`` are the features shown."""

    number: int
    syndrome: str
    hpo: tuple[str, ...]
    ancestry: str
    sex: str
    age_group: str
    coefficients: Mapping[str, float]
    look: Appearance


@dataclass(frozen=True)
class Plan:
    """A subject that a cohort wants: number, label of the syndrome, how many images."""

    number: int
    syndrome: str
    images: int


def load_catalogue() -> dict[str, Any]:
    """The content of ``syndromes.json``: features, syndromes, population.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        catalogue: dict[str, Any] = json.loads((DATA / "syndromes.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "the catalogue of syndromes is missing or damaged",
            where="syndromes.json",
            remedy="install fedgestalt again",
        ) from error
    return catalogue


def plan(parameters: Parameters, catalogue: Mapping[str, Any]) -> Iterator[Plan]:
    """All subjects of a cohort, syndrome by syndrome."""
    sizes = {"frequent": parameters.frequent_subjects, "rare": parameters.rare_subjects}
    labels = [e["label"] for e in catalogue["syndromes"] for _ in range(sizes[e["group"]])]
    for number, label in enumerate(labels):
        rng = np.random.default_rng([parameters.seed, _COUNT, number])
        yield Plan(number, label, min(1 + int(rng.geometric(0.55)), _MAX_IMAGES))


class Population:
    """Draws and photographs the subjects of a cohort."""

    def __init__(self, parameters: Parameters, catalogue: Mapping[str, Any]) -> None:
        self._parameters, self._catalogue = parameters, catalogue
        self._renderer = FaceRenderer(HeadModel.load(DATA / "head_model.npz"))
        self._syndromes = {entry["label"]: entry for entry in catalogue["syndromes"]}

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._parameters.seed, *key])

    def subject(self, number: int, syndrome: str) -> Subject:
        """Draw a person: identity is a function of ``number``, the syndrome is added to it."""
        rng, population = self._random(_IDENTITY, number), self._catalogue["population"]
        groups = population["ancestry"]
        ancestry = str(rng.choice(list(groups), p=[g["share"] for g in groups.values()]))
        mixture = rng.dirichlet([9 if name == ancestry else 0.6 for name in groups])
        male = float(np.clip(rng.normal(rng.choice([0.15, 0.85]), 0.12), 0, 1))
        age = int(rng.choice(4, p=population["age_shares"]))
        ages = rng.dirichlet(6 * np.eye(4)[age] + [0.3, 0.5, 0.5, 0.05])
        shape = {
            f"m-{name}-{sex}-{group}": float(share * sex_share * age_share)
            for name, share in zip(groups, mixture, strict=True)
            for sex, sex_share in (("male", male), ("female", 1 - male))
            for group, age_share in zip(AGE_GROUPS, ages, strict=True)
            if share * sex_share * age_share > 0.01
        }
        model = self._renderer.model
        spread = model.identity_scale * self._parameters.identity
        for (low, high), draw in zip(model.identity_axes, rng.normal(0, spread), strict=True):
            signed = low == high  # left-right asymmetries are one target for both signs
            shape[high if draw > 0 else low] = float(draw if signed else abs(draw))
        looks = self._looks(rng, groups[ancestry], age, male)
        hpo = self._express(syndrome, number, shape, looks)
        for name, limits in population["limits"].items():
            looks[name] = float(np.clip(looks[name], *limits))
        sex, look = "male" if male > 0.5 else "female", Appearance(**looks)
        return Subject(number, syndrome, hpo, ancestry, sex, AGE_GROUPS[age], shape, look)

    def photographs(self, subject: Subject, count: int) -> Iterator[Pixels]:
        """The first ``count`` photographs of a subject, RGB uint8 (112, 112, 3)."""
        head = self._renderer.prepare(subject.coefficients, subject.look)
        for index in range(count):
            rng, amount = (
                self._random(_PHOTOGRAPH, subject.number, index),
                self._parameters.nuisance,
            )
            expression, view = draw_view(rng, amount)
            yield degrade(self._renderer.render(head, view, expression), rng, amount)

    def _looks(
        self, rng: np.random.Generator, group: Mapping[str, Any], age: int, male: float
    ) -> dict[str, Any]:
        """Draw the arguments of :class:`Appearance`."""
        population = self._catalogue["population"]
        tones = population["hair_tones"], population["iris_tones"]
        hair, iris = (
            np.array(tone[rng.choice(len(tone), p=group[share])], float)
            for tone, share in zip(tones, ("hair_shares", "iris_shares"), strict=True)
        )
        skin = np.array(group["skin_mean"]) + rng.normal() * np.array(group["skin_spread"])
        skin += rng.normal(0, 2.5, 3)
        draw: dict[str, Callable[[float, float], float]]
        draw = {"normal": rng.normal, "uniform": rng.uniform}
        looks: dict[str, Any] = {
            name: draw[kind](first, second)
            for name, (kind, first, second) in population["appearance"].items()
        }
        looks |= {"skin": skin, "hair": hair * rng.uniform(0.8, 1.2), "iris": iris}
        looks["lip"] = skin * [0.88, 0.68, 0.72] * rng.uniform(0.87, 1.04)
        looks["texture_seed"] = int(rng.integers(2**31))
        if age == 0:
            looks |= {"baldness": rng.uniform(0.25, 0.75), "hair_volume": 0.02}
        elif rng.random() > 0.25 + 0.7 * male:
            looks["long_hair"] = rng.uniform(0.1, 0.4)
        return looks

    def _express(
        self, syndrome: str, number: int, shape: dict[str, float], looks: dict[str, Any]
    ) -> tuple[str, ...]:
        """Add the features that this subject shows to ``shape`` and ``looks``; return them."""
        rng, parameters = self._random(_SYNDROME, number), self._parameters
        shown: list[str] = []
        severity = np.clip(rng.normal(parameters.severity, parameters.severity_spread), 0.0, 2)
        for entry in self._syndromes[syndrome]["features"]:
            gain = float(severity * np.clip(rng.normal(1, 0.25), 0.3, 1.8))
            if rng.random() < entry["penetrance"]:
                shown.append(entry["hpo"])
                feature = self._catalogue["features"][entry["hpo"]]
                for values, kind in ((shape, "morph"), (looks, "appearance")):
                    for name, weight in feature[kind].items():
                        values[name] = values.get(name, 0.0) + weight * gain
        return tuple(shown)
