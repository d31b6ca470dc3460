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

MAXIMUM_CLASSES = 1_000_000


@dataclass(frozen=True)
class Join(Message):
    """Server to sites: who takes part."""

    schema: ClassVar[str] = "fedgestalt.training.join/1"
    roster: tuple[str, ...] = several(text())


@dataclass(frozen=True)
class Joined(Message):
    """Site to server: what it would start from; equal at all sites, or the job ends."""

    schema: ClassVar[str] = "fedgestalt.training.joined/1"
    version: str = text()
    label_map: str = hexadecimal()
    classes: int = integer(2, MAXIMUM_CLASSES)
    start_model: str = hexadecimal()


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
    """Server to sites: the final global model, to keep."""

    schema: ClassVar[str] = "fedgestalt.training.publish/1"
    digest: str = hexadecimal()
    state: Mapping[str, NDArray[np.float32]] = arrays_by_name("float32")


@dataclass(frozen=True)
class Published(Message):
    """Site to server: the model is stored, and this is its digest."""

    schema: ClassVar[str] = "fedgestalt.training.published/1"
    digest: str = hexadecimal()
