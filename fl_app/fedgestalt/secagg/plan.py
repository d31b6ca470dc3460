"""The number plan: how real tensors become words of the ring Z_2^32, and back.

Each site encodes its update *v* (a delta to the global model) with its sample weight *w*::

    q = rint(clip(v, -R, R) * w / w_max * L / R),      L = 2^31 // n - 1

where *R* is the tensor's public power-of-two range, *w_max* a public bound on the weights and *n*
the number of sites. ``|q| <= L``, so the sum of *n* sites fits a signed 32-bit word: overflow
cannot happen, and :meth:`NumberPlan.check` proves it before anything is sent. Behind the values
follow one word per tensor that counts the clipped values, and one word with *w*; all are masked, so
only sums show. The weighted mean is exact up to the rounding above.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import PlanError, SiteError

Tensors = Mapping[str, NDArray[np.float32]]
Words = NDArray[np.uint32]

WORD_BITS = 32


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the update: its shape and its range ``2**exponent``."""

    name: str
    shape: tuple[int, ...]
    exponent: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Aggregate:
    """What the sum of all sites says.

    Attributes:
        mean: weighted mean of the updates, float32, by tensor.
        weight: sum of the sites' weights.
        clipped: how many values were clipped, summed over sites, by tensor.
    """

    mean: dict[str, NDArray[np.float32]]
    weight: int
    clipped: dict[str, int]


@dataclass(frozen=True)
class NumberPlan:
    """Ranges and sizes that all sites of a round share.

    Attributes:
        sites: number of sites in the sum.
        max_weight: largest sample weight that a site may have.
        tensors: in the order in which they are laid out.
    """

    sites: int
    max_weight: int
    tensors: tuple[TensorPlan, ...]

    @property
    def level(self) -> int:
        """Largest absolute value of one site's word."""
        return (1 << WORD_BITS - 1) // self.sites - 1

    @functools.cached_property
    def words(self) -> int:
        """Length of a masked vector: values, clip counts, weight."""
        return sum(t.size for t in self.tensors) + len(self.tensors) + 1

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 over the plan; part of the session that every site computes for itself."""
        rows = [f"{t.name}|{t.shape}|{t.exponent}" for t in self.tensors]
        text = f"number-plan/1|{self.sites}|{self.max_weight}|" + ";".join(rows)
        return hashlib.sha256(text.encode()).digest()

    def check(self) -> None:
        """Prove that no sum can overflow.

        Raises:
            PlanError: with the bits that are needed and what to change.
        """
        if self.sites < 1 or self.max_weight < 1:
            raise PlanError(f"{self.sites} sites and a largest weight of {self.max_weight}")
        site_bits = math.ceil(math.log2(self.sites))
        largest = max((t.size for t in self.tensors), default=1)
        for what, value, remedy in (
            ("the sum of the weights", self.max_weight, "lower max_images_per_site"),
            ("the clip count of the largest tensor", largest, "split the tensor"),
            ("8 bits of precision", 2**8, "run with fewer sites"),
        ):
            bits = value.bit_length()
            if value * self.sites >= 2**WORD_BITS:
                needed = f"{bits} + {site_bits} bits needed, {WORD_BITS} available"
                raise PlanError(f"{what}: {needed}", remedy=remedy)

    def encode(self, update: Tensors, weight: int) -> Words:
        """Encode one site's update; see the module docstring.

        Raises:
            SiteError: a tensor is missing, has another shape or is not finite, or the weight is
                out of range. Nothing has been sent then.
        """
        if not 1 <= weight <= self.max_weight:
            raise SiteError(
                f"{weight} training images, but the job allows 1 to {self.max_weight} per site",
                remedy="raise max_images_per_site in the job",
            )
        if update.keys() != {t.name for t in self.tensors}:
            differing = sorted(update.keys() ^ {t.name for t in self.tensors})
            raise SiteError(f"the update and the number plan differ in tensor {differing[0]!r}")
        words = np.empty(self.words, np.int32)
        counts = words[len(words) - 1 - len(self.tensors) : -1]
        share = weight / self.max_weight
        for index, (tensor, place) in enumerate(self._places()):
            values = np.asarray(update[tensor.name])
            if values.shape != tensor.shape:
                raise SiteError(
                    f"tensor {tensor.name!r} has shape {values.shape}, not {tensor.shape}"
                )
            if not np.isfinite(values).all():
                raise SiteError(
                    f"the update of tensor {tensor.name!r} is not finite: training diverged",
                    remedy="lower the learning rate or check the images",
                )
            bound = 2.0**tensor.exponent
            flat = values.ravel().astype(np.float64)
            counts[index] = np.count_nonzero(np.abs(flat) > bound)
            np.clip(flat, -bound, bound, out=flat)
            flat *= share * (self.level / bound)
            words[place] = np.rint(flat, out=flat)
        words[-1] = weight
        return words.view(np.uint32)

    def decode(self, total: Words) -> Aggregate:
        """Decode the unmasked sum of all sites.

        Args:
            total: (words,) uint32.
        """
        signed = total.view(np.int32)
        weight = int(total[-1])
        if not 0 < weight <= self.sites * self.max_weight:
            raise PlanError(f"the weights sum to {weight}", remedy="a site sent a wrong vector")
        mean: dict[str, NDArray[np.float32]] = {}
        for tensor, place in self._places():
            unit = 2.0**tensor.exponent / self.level * (self.max_weight / weight)
            mean[tensor.name] = (signed[place] * unit).astype(np.float32).reshape(tensor.shape)
        counts = total[len(total) - 1 - len(self.tensors) : -1]
        clipped = {t.name: int(n) for t, n in zip(self.tensors, counts, strict=True)}
        return Aggregate(mean, weight, clipped)

    def _places(self) -> Iterator[tuple[TensorPlan, slice]]:
        start = 0
        for tensor in self.tensors:
            yield tensor, slice(start, start + tensor.size)
            start += tensor.size
