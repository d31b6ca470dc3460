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
    arrays_by_name,
    hexadecimal,
    integer,
    several,
    text,
)


@dataclass(frozen=True)
class Join(Message):
    """Server to sites: who takes part, and the public bound on their sample weights."""

    schema: ClassVar[str] = "fedgestalt.training.join/2"
    roster: tuple[str, ...] = several(text())
    max_weight: int = integer(1, 2**31)


@dataclass(frozen=True)
class RoundStart(Message):
    """Server to sites: the global model and the facts of a round.

    ``exponents`` are the ranges of the number plan, in the order of the sorted tensor names.
    """

    schema: ClassVar[str] = "fedgestalt.training.round-start/1"
    round: int = integer(1, 1_000_000)
    attempt: int = integer(1, 1_000_000)
    max_weight: int = integer(1, 2**31)
    exponents: NDArray[np.int32] = array("int32", 1)
    state: Mapping[str, NDArray[np.float32]] = arrays_by_name("float32")


@dataclass(frozen=True)
class Publish(Message):
    """Server to sites: the final global model, to keep.

    ``agreement`` has one value per trained member, in the order of their names: the share of all
    sites' held-out images with which the model that came into the last round agreed.
    """

    schema: ClassVar[str] = "fedgestalt.training.publish/2"
    digest: str = hexadecimal()
    state: Mapping[str, NDArray[np.float32]] = arrays_by_name("float32")
    agreement: NDArray[np.float32] = array("float32", 1)


@dataclass(frozen=True)
class Published(Message):
    """Site to server: the model is stored, and this is its digest.

    ``doubtful_labels`` is 1 if the consortium's model agrees with far fewer of this site's labels
    than with those of all sites.
    """

    schema: ClassVar[str] = "fedgestalt.training.published/2"
    digest: str = hexadecimal()
    doubtful_labels: int = integer(0, 1)
