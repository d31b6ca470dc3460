"""The schema of ``result.json``, version 1: keys are added, never changed or removed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedgestalt import RESEARCH_USE_ONLY, __version__
from fedgestalt.errors import DataError

Fraction = float


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class CohortFacts(_Part):
    """Which data a run used."""

    name: str
    version: str
    digest: str
    images: int
    subjects: int
    syndromes: int
    has_patients: bool


class SiteFacts(_Part):
    """What one hospital contributed; known here because this run played all hospitals."""

    name: str
    images: int
    subjects: int
    training_images: int
    queries: int


class RoundFacts(_Part):
    """One round of training, as the server knows it: sums over all sites, nothing of one site."""

    seed: int
    round: int
    images: int
    members: dict[str, dict[str, float]] = Field(description="mean loss and accuracy by member")
    clipped: int
    uploaded_bytes_per_site: int
    seconds: float


class Table(_Part):
    """Mean per-syndrome top-k accuracy; fractions 0..1."""

    top1: Fraction
    top5: Fraction
    top10: Fraction
    top30: Fraction
    gallery: int
    test: int
    interval: dict[str, tuple[Fraction, Fraction]] = Field(
        default_factory=dict, description="95 % bootstrap intervals over subjects"
    )


class Privacy(_Part):
    """What each party learns, in the words of the matching strategy."""

    strategy: str
    server_learns: str
    sites_learn: str
    asking_site_learns: str
    training: str = Field(description="what each party learns from the training job")


class Result(_Part):
    """Everything a run found."""

    schema_: Literal["fedgestalt.result/1"] = Field(default="fedgestalt.result/1", alias="schema")
    notice: str = RESEARCH_USE_ONLY
    fedgestalt: str = __version__
    cohort: CohortFacts
    split: str
    ensemble: list[dict[str, str]] = Field(description="name, backbone and trainable part")
    sites: list[SiteFacts]
    rounds: list[RoundFacts]
    evaluation: dict[str, dict[str, Table]] = Field(
        description="by federated, centralised, local-only, pretrained, chance; then by table"
    )
    privacy: Privacy
    timings_seconds: dict[str, float]
    seeds: list[int]

    def write(self, path: Path) -> None:
        """Write the JSON document."""
        path.write_text(self.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """Read and check a ``result.json``.

    Raises:
        DataError: the file is missing or does not follow the schema.
    """
    try:
        return Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(
            f"does not follow its schema: {key}: {first['msg']}", where=str(path)
        ) from None
