"""What to train: pydantic models that travel inside a job."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedgestalt.errors import ConfigError


class Spec(BaseModel):
    """Base of all job specifications: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingSpec(Spec):
    """Local training of one member, with a class-weighted cross-entropy."""

    epochs: int = Field(default=2, ge=1, description="local epochs per round")
    batch_size: int = Field(default=64, ge=2)
    optimiser: Literal["adam", "sgd"] = Field(
        default="adam",
        description="sgd: without momentum, so that a mean of one-step updates is a step of all;"
        " meant for `server_optimiser: adam`",
    )
    learning_rate: float = Field(default=5e-4, gt=0, description="of trunk and neck")
    head_learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=5e-5, ge=0, description="of trunk and neck")
    head_weight_decay: float = Field(default=5e-4, ge=0)
    dropout: float = Field(default=0.5, ge=0, lt=1, description="before the classifier")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    variants: int = Field(
        default=4, ge=1, le=64, description="augmented variants per image, drawn once"
    )
    proximal: float = Field(
        default=0.0,
        ge=0,
        description="FedProx: weight of half the squared distance to the round's start",
    )
    softmax: Literal["all", "present"] = Field(
        default="all", description="classes that the loss is over; present: those the site has"
    )
    batch_norm: Literal["shared", "local", "pooled"] = Field(
        default="shared",
        description="local: BatchNorm layers stay at the site (FedBN); the published ensemble has"
        " those of the start. pooled: they normalise with all sites' statistics in training, too",
    )


class MemberSpec(Spec):
    """One network of the ensemble."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")
    backbone: str = Field(description="name of a backbone plugin")
    options: dict[str, Any] = Field(default_factory=dict, description="for the backbone plugin")
    trainable: Literal["none", "neck", "last-stage", "all"] = Field(
        default="neck",
        description="what trains and travels; of none and neck the whole trunk is frozen and its"
        " features are cached, of last-stage all before the last stage",
    )
    training: TrainingSpec = TrainingSpec()


class EnsembleSpec(Spec):
    """The global feature extractor: its members, in the order of the encoding."""

    members: tuple[MemberSpec, ...] = Field(min_length=1)
    seed: int = Field(default=1, ge=0, description="of random start weights and batch order")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            message = "two members have the same name"
            raise ValueError(message)
        return self

    @property
    def digest(self) -> str:
        """SHA-256 over the specification, hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def member(self, name: str) -> MemberSpec:
        """Return the member called ``name``.

        Raises:
            ConfigError: there is none.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise ConfigError(f"the ensemble has no member {name!r}")


def default_ensemble(seed: int = 1) -> EnsembleSpec:
    """A fine-tuned network, a small one trained from scratch, and the untouched original."""
    narrow = {"depth": 18, "width": 16, "embedding_size": 128, "input_size": 56}
    adapt = TrainingSpec(epochs=5, batch_size=32, variants=2)
    from_scratch = TrainingSpec(
        epochs=1, batch_size=32, learning_rate=2e-3, head_learning_rate=2e-3, dropout=0.0
    )
    return EnsembleSpec(
        members=(
            MemberSpec(name="fine-tuned", backbone="sface", trainable="neck", training=adapt),
            MemberSpec(
                name="scratch",
                backbone="iresnet",
                options=narrow,
                trainable="all",
                training=from_scratch,
            ),
            MemberSpec(name="original", backbone="sface", trainable="none"),
        ),
        seed=seed,
    )
