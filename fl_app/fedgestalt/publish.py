"""``fedgestalt bundle export``: a stored ensemble becomes a bundle that anybody can read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cohort import read_cohort
from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.hooks import get_registry
from fedgestalt.learning.bundle import write_bundle
from fedgestalt.learning.model_card import NO_LICENCE, CardFacts, DataFacts, facts_of_outcome
from fedgestalt.learning.store import load_ensemble

SCHEMA: Final = "fedgestalt.bundle-export/1"
_OUTCOME: Final = "outcome.json"


@dataclass(frozen=True)
class Request:
    """What to publish.

    Attributes:
        ensemble: folder of a stored ensemble.
        out: new folder or zip.
        result: downloaded result of the job that trained it, or its ``outcome.json``.
        cohort: of the site that exports, if it wants its counts on the card.
        licence: file with the licence of what was trained.
        with_frozen: whether parts that training did not change come along.
    """

    ensemble: Path
    out: Path
    result: Path | None = None
    cohort: Path | None = None
    licence: Path | None = None
    with_frozen: bool = True


def publish(request: Request) -> dict[str, Any]:
    """Write the bundle; returns what is in it, and why what is not.

    Raises:
        ConfigError: the ensemble is damaged, the result is of another one, or ``out`` exists.
        SiteError: there is no ensemble, or the bundle cannot be written.
        DataError: the cohort cannot be read.
    """
    if not request.ensemble.is_dir():
        raise SiteError(
            "there is no stored ensemble",
            where=str(request.ensemble),
            remedy="name a folder of `ensembles` in the site's store",
        )
    registry = get_registry()
    ensemble, digest = load_ensemble(request.ensemble, registry)
    facts = _facts(request.result, digest)
    if request.cohort is not None:
        cohort = read_cohort(request.cohort)
        data = DataFacts(
            cohort.name,
            cohort.version,
            cohort.digest,
            len(cohort.images),
            len(cohort.subjects),
            len(cohort.images_per_syndrome()),
        )
        facts = dataclasses.replace(facts, data=data)
    licence = request.licence.read_text(encoding="utf-8") if request.licence else NO_LICENCE
    left_out = write_bundle(
        request.out,
        ensemble,
        digest,
        registry,
        facts,
        licence,
        with_frozen=request.with_frozen,
    )
    return {
        "schema": SCHEMA,
        "notice": RESEARCH_USE_ONLY,
        "model": digest,
        "out": str(request.out),
        "left_out": left_out,
    }


def _facts(result: Path | None, digest: str) -> CardFacts:
    if result is None:
        return CardFacts()
    paths = [result] if result.is_file() else sorted(result.rglob(_OUTCOME))
    for path in paths:
        try:
            outcome = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(outcome, dict) and outcome.get("ensemble") == digest:
            return facts_of_outcome(outcome)
    raise ConfigError(
        f"holds no {_OUTCOME} of the job that trained model {digest[:12]}",
        where=str(result),
        remedy="download the result of that job, or leave --result out",
    )
