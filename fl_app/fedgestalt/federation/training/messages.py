"""Messages of the training job, beside those of :mod:`fedgestalt.secagg`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedgestalt.messages import (
    Message,
    array,
    hexadecimal,
    integer,
    message,
    octets,
    octets_by_site,
    real,
    several,
    text,
)
from fedgestalt.secagg import ShareDelivery

DIGEST_BYTES = 32
_MOST_RATE = 1e6
_MOST_RECORD = 1 << 16
_MOST_CERTIFICATE = 1 << 14


@dataclass(frozen=True)
class Join(Message):
    """Server to sites: who takes part, and how updates are aggregated.

    Attributes:
        roster: all sites of the job.
        max_weight: public bound on their sample weights.
        scope, rule, recipient, threat_model: see :class:`.rounds.Aggregation`.
        optimiser, learning_rate, momentum: see :class:`.model.ServerStep`.
        round: last complete round of the job that this one goes on from; 0 for a new model.
        model: digest of the model after that round; empty for a new model.
    """

    schema: ClassVar[str] = "fedgestalt.training.join/5"
    roster: tuple[str, ...] = several(text())
    max_weight: int = integer(1, 2**31)
    scope: str = text()
    rule: str = text()
    recipient: str = text()
    threat_model: str = text()
    optimiser: str = text()
    learning_rate: float = real(0, _MOST_RATE)
    momentum: float = real(0, 1)
    round: int = integer(0, 1_000_000)
    model: bytes = octets(0, DIGEST_BYTES)


@dataclass(frozen=True)
class TrainRound(Message):
    """Server to sites: train from the model with this digest.

    Attributes:
        round: counted from 1.
        model: digest of the global model that everybody starts from.
        exponents: ranges of the number plan, in the order of the sorted tensor names.
    """

    schema: ClassVar[str] = "fedgestalt.training.train-round/1"
    round: int = integer(1, 1_000_000)
    model: bytes = octets(DIGEST_BYTES)
    exponents: NDArray[np.int32] = array("int32", 1)


@dataclass(frozen=True)
class Trained(Message):
    """Site to server: its update is ready, and has not left it."""

    schema: ClassVar[str] = "fedgestalt.training.trained/1"
    round: int = integer(1, 1_000_000)


@dataclass(frozen=True)
class SessionStart(Message):
    """Server to sites: a session of secure aggregation begins.

    Attributes:
        round: the round whose updates are summed.
        attempt: session of the job, counted from 1.
        threshold: sites that must agree before the sum is opened.
        cipher: of the mask stream.
        certificates: PEM, of every site of the roster.
    """

    schema: ClassVar[str] = "fedgestalt.training.session-start/1"
    round: int = integer(1, 1_000_000)
    attempt: int = integer(1, 1_000_000)
    threshold: int = integer(1, 1000)
    cipher: str = text()
    certificates: Mapping[str, bytes] = octets_by_site(1, _MOST_CERTIFICATE)


@dataclass(frozen=True)
class SendVector(Message):
    """Server to one site: the shares of all others, and the ticket for its upload."""

    schema: ClassVar[str] = "fedgestalt.training.send-vector/1"
    ticket: str = hexadecimal(32)
    delivery: ShareDelivery = message(ShareDelivery)


@dataclass(frozen=True)
class Uploaded(Message):
    """Site to server: all pieces of the masked vector are there."""

    schema: ClassVar[str] = "fedgestalt.training.uploaded/1"
    session: bytes = octets(DIGEST_BYTES)


@dataclass(frozen=True)
class Apply(Message):
    """Server to sites: the sum of a session is there to be fetched.

    Attributes:
        session: digest of the session.
        survivors: whose updates it holds.
        previous: digest of the last round's record; empty in the first round.
    """

    schema: ClassVar[str] = "fedgestalt.training.apply/1"
    session: bytes = octets(DIGEST_BYTES)
    survivors: tuple[str, ...] = several(text())
    previous: bytes = octets(0, DIGEST_BYTES)


@dataclass(frozen=True)
class Receipt(Message):
    """Site to server: it has checked and applied the sum, and signs the record of the round."""

    schema: ClassVar[str] = "fedgestalt.training.receipt/1"
    record: bytes = octets(1, _MOST_RECORD)
    signature: bytes = octets(64, 1024)


@dataclass(frozen=True)
class Publish(Message):
    """Server to sites: keep the model with this digest as the published ensemble."""

    schema: ClassVar[str] = "fedgestalt.training.publish/3"
    model: bytes = octets(DIGEST_BYTES)


@dataclass(frozen=True)
class Published(Message):
    """Site to server: the ensemble is stored, and this is its digest.

    ``doubtful_labels`` is 1 if the consortium's model agrees with far fewer of this site's labels
    than with those of all sites.
    """

    schema: ClassVar[str] = "fedgestalt.training.published/2"
    digest: str = hexadecimal()
    doubtful_labels: int = integer(0, 1)
