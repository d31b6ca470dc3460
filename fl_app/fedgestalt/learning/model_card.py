"""What a published model says about itself: the model card, and MONAI's metadata."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final

from fedgestalt import RESEARCH_USE_ONLY, __version__
from fedgestalt.contracts import FACE_SIZE
from fedgestalt.learning.augment import TEST_VARIANTS
from fedgestalt.learning.ensemble import Ensemble
from fedgestalt.learning.licences import may_be_passed_on

META_SCHEMA: Final = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
MONAI_VERSION: Final = "1.4.0"
"""Whose bundle specification is followed; nothing of MONAI runs."""

NAME: Final = "fedgestalt face ensemble"
TASK: Final = "Encode photographs of faces, to find patients with alike rare disorders"
INTENDED_USE: Final = (
    "Research: ranking diagnosed patients by how alike their faces are, in a consortium of"
    " hospitals that compares encodings under the protection that fedgestalt describes."
)
LIMITS: Final = (
    "A similarity is not a probability and does not say whether a person is affected.",
    "Encodings identify people. They deserve the care that photographs get, and so does this model"
    " in the hands of whoever holds encodings.",
    "How well it does on other ancestries, ages, cameras or syndromes than those it was trained on"
    " is not known from this card.",
    "A model can tell something about its training images to whoever studies it long enough; none"
    " are in it as such.",
)

NO_LICENCE: Final = (
    "The consortium that trained this model has not stated under which licence it may be used:\n"
    "ask it. docs/README.md names the licences of the start weights.\n"
)


@dataclass(frozen=True)
class DataFacts:
    """What one site says about the data that it trained on; counts, no identifiers."""

    name: str
    version: str
    digest: str
    images: int
    subjects: int
    syndromes: int


@dataclass(frozen=True)
class CardFacts:
    """How a model came about, as far as whoever exports it knows.

    Attributes:
        rounds: complete ones; None if unknown.
        sites: how many took part; None if unknown.
        images: training images of all sites together, in the last round; None if unknown. What one
            site has is not known to anybody else, and stands here only if that site says so.
        aggregation: settings by name.
        data: of the site that exports the bundle, if it wants to say so.
        day: of the export.
    """

    rounds: int | None = None
    sites: int | None = None
    images: int | None = None
    aggregation: Mapping[str, str] = field(default_factory=dict)
    data: DataFacts | None = None
    day: dt.date = field(default_factory=lambda: dt.datetime.now(dt.UTC).date())


def facts_of_outcome(outcome: Mapping[str, Any]) -> CardFacts:
    """What the outcome of a training job tells about its model."""
    rounds, sites = outcome.get("rounds"), outcome.get("sites")
    records = rounds if isinstance(rounds, list) else []
    last = records[-1] if records and isinstance(records[-1], dict) else {}
    aggregation = outcome.get("aggregation")
    return CardFacts(
        rounds=len(records) or None,
        sites=len(sites) if isinstance(sites, list) else None,
        images=int(last["images"]) if "images" in last else None,
        aggregation=(
            {str(k): str(v) for k, v in aggregation.items()}
            if isinstance(aggregation, dict)
            else {}
        ),
    )


def metadata(ensemble: Ensemble, digest: str, facts: CardFacts) -> dict[str, Any]:
    """``configs/metadata.json`` in the keys of the MONAI Bundle specification."""
    return {
        "schema": META_SCHEMA,
        "version": __version__,
        "changelog": {__version__: f"exported on {facts.day.isoformat()}"},
        "monai_version": MONAI_VERSION,
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "fedgestalt": __version__,
            "safetensors": version("safetensors"),
        },
        "optional_packages_version": {},
        "name": NAME,
        "task": TASK,
        "description": f"An ensemble of {len(ensemble.members)} face networks, trained by hospitals"
        f" together under secure aggregation. {RESEARCH_USE_ONLY} Model {digest}.",
        "authors": "The sites of the consortium that trained it, with fedgestalt",
        "copyright": "Its authors; for the start weights see docs/README.md",
        "intended_use": f"{INTENDED_USE} {RESEARCH_USE_ONLY}",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "RGB photograph of an aligned face",
                    "num_channels": 3,
                    "spatial_shape": [FACE_SIZE, FACE_SIZE],
                    "dtype": "uint8",
                    "value_range": [0, 255],
                    "is_patch_data": False,
                    "channel_def": {"0": "red", "1": "green", "2": "blue"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "tuples",
                    "format": "encoding of length 1: members x test-time variants, concatenated",
                    "num_channels": ensemble.encoding_size,
                    "spatial_shape": [1],
                    "dtype": "float32",
                    "value_range": [-1, 1],
                    "is_patch_data": False,
                    "channel_def": {"0": "encoding"},
                }
            },
        },
    }


def model_card(
    ensemble: Ensemble, digest: str, facts: CardFacts, left_out: Mapping[str, str]
) -> str:
    """``docs/README.md``.

    Args:
        ensemble: what is published.
        digest: of the model.
        facts: how it came about.
        left_out: members whose frozen parts are not in the bundle, and why.
    """
    variants = ", ".join(name for name, _, _ in TEST_VARIANTS)
    lines = [
        "# Face ensemble",
        "",
        f"**{RESEARCH_USE_ONLY}**",
        "",
        f"Model `{digest}`, exported on {facts.day.isoformat()} with fedgestalt {__version__}.",
        "",
        "## What it is",
        "",
        f"{len(ensemble.members)} face networks; an encoding has {ensemble.encoding_size} numbers:"
        f" each network's vectors of {len(TEST_VARIANTS)} variants of the photograph ({variants}).",
        "",
        "| member | backbone | trained | encoding | licence of the start weights | frozen parts |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for member in ensemble.members:
        licence = member.weights_licence or "none: random start"
        there = "left out" if member.spec.name in left_out else "here"
        lines.append(
            f"| {member.spec.name} | {member.spec.backbone} | {member.spec.trainable} |"
            f" {member.embedding_size} | {licence} | {there} |"
        )
    lines += [""]
    for name, why in left_out.items():
        lines.append(
            f"Frozen parts of `{name}` are not in this bundle: {why}. To use it, give its backbone"
            " the same start weights; another file is noticed by its digest."
        )
    restricted = [
        member
        for member in ensemble.members
        if member.trained_parts and not may_be_passed_on(member.weights_licence)
    ]
    for member in restricted:
        lines.append(
            f"The trained parts of `{member.spec.name}` began as weights under"
            f" {member.weights_licence}: ask whoever licensed those before passing this bundle on."
        )
    lines += ["", "## How it was trained", ""]
    lines += _training_lines(ensemble, facts)
    lines += ["", "## Intended use", "", INTENDED_USE, "", "## Limits", ""]
    lines += [f"- {limit}" for limit in LIMITS]
    lines += [
        "",
        "## Use",
        "",
        "```",
        "fedgestalt encode --model THIS --images PHOTOGRAPHS --out encodings.npz",
        "```",
        "",
        RESEARCH_USE_ONLY,
        "",
    ]
    return "\n".join(lines)


def _training_lines(ensemble: Ensemble, facts: CardFacts) -> list[str]:
    def said(value: object) -> str:
        return "not stated" if value is None else f"{value:,}"

    lines = [
        f"- rounds: {said(facts.rounds)}",
        f"- sites: {said(facts.sites)}; photographs of all sites together: {said(facts.images)}."
        " Updates were summed under masks: no site's own update or number of photographs is known"
        " to the others",
        f"- syndromes that it was trained on: {ensemble.classes:,}",
    ]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.aggregation.items()]
    data = facts.data
    if data is None:
        lines.append("- data of the site that exported the bundle: not stated")
    else:
        lines.append(
            f"- data of the site that exported the bundle: {data.name}, version {data.version},"
            f" digest `{data.digest}`; {data.images:,} photographs of {data.subjects:,} subjects"
            f" with {data.syndromes:,} syndromes"
        )
    return lines
