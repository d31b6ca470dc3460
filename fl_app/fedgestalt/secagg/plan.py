"""The number plan: how real tensors become words of the ring Z_2^32, and back.

Each site encodes its update *v* (a delta to the global model) with its sample weight *w*::

    q = rint(clip(v, -R, R) * w / w_max * L / R),      L = 2^31 // n - 1

where *R* is the tensor's public power-of-two range, *w_max* a public bound on the weights and *n*
the number of sites. ``|q| <= L``, so the sum of *n* sites fits a signed 32-bit word: overflow
cannot happen, and :meth:`NumberPlan.check` proves it before anything is sent.

A tensor may be *weighted by row* instead: row *r* of a site counts with an integer weight of its
own, 0 if the site has nothing to say about it. These row weights travel as *counts*: integers whose
sum is exact, like any integer buffer. Behind values and counts follow one word per tensor with the
number of its clipped values, and one word with *w*. All of it is masked, so only sums show. The
weighted mean is exact up to the rounding above.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import PlanError, SiteError
from fedgestalt.keys import digest
from fedgestalt.secagg.stream import Words

Tensors = Mapping[str, NDArray[np.float32]]
Counts = Mapping[str, NDArray[np.integer]]

WORD_BITS = 32
_BLOCK = 1 << 16
"""Values that are converted at a time, so that the temporary ones stay in the cache."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the update.

    Attributes:
        name: unique.
        shape: of the tensor.
        exponent: its range is ``2**exponent``.
        row_weights: name of the counts that weight its rows (its first axis); empty: all values
            have the site's sample weight.
    """

    name: str
    shape: tuple[int, ...]
    exponent: int
    row_weights: str = ""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CountPlan:
    """A vector of integers, of which the exact sum shows: ``size`` values in 0..``bound``."""

    name: str
    size: int
    bound: int


@dataclass(frozen=True)
class Aggregate:
    """What the sum of all sites says.

    Attributes:
        mean: weighted mean of the updates, float32, by tensor; computed when it is looked up.
        weight: sum of the sites' weights.
        clipped: how many values were clipped, summed over sites, by tensor.
        counts: sums of the counts, int64, by name.
    """

    mean: Tensors
    weight: int
    clipped: Mapping[str, int]
    counts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)


@dataclass(frozen=True)
class NumberPlan:
    """Ranges and sizes that all sites of a round share.

    Attributes:
        sites: largest number of sites in the sum.
        max_weight: largest sample weight that a site may have.
        tensors: in the order in which they are laid out.
        counts: likewise.
    """

    sites: int
    max_weight: int
    tensors: tuple[TensorPlan, ...]
    counts: tuple[CountPlan, ...] = ()

    @property
    def level(self) -> int:
        """Largest absolute value of one site's word."""
        return (1 << WORD_BITS - 1) // self.sites - 1

    @functools.cached_property
    def words(self) -> int:
        """Length of a masked vector: values, counts, clip counts, weight."""
        values = sum(tensor.size for tensor in self.tensors)
        return values + sum(count.size for count in self.counts) + len(self.tensors) + 1

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 over the plan; part of the session that every site computes for itself."""
        parts: list[object] = [self.sites, self.max_weight, len(self.tensors)]
        for tensor in self.tensors:
            parts += [tensor.name, tensor.row_weights, tensor.exponent, len(tensor.shape)]
            parts += tensor.shape
        for count in self.counts:
            parts += [count.name, count.size, count.bound]
        return digest("number plan", *(str(part).encode() for part in parts))

    def check(self) -> None:
        """Prove that no sum can overflow.

        Raises:
            PlanError: with the bits that are needed and what to change; or the plan is no plan.
        """
        if self.sites < 1 or self.max_weight < 1:
            raise PlanError(f"{self.sites} sites and a largest weight of {self.max_weight}")
        bounds = {count.name: count for count in self.counts}
        if len(bounds.keys() | {t.name for t in self.tensors}) < len(self.tensors + self.counts):
            raise PlanError("two tensors or counts of the number plan have the same name")
        for tensor in self.tensors:
            if min(tensor.shape, default=1) < 1 or not -126 <= tensor.exponent <= 127:
                raise PlanError(f"tensor {tensor.name!r} has no values or no range of float32")
            weights = bounds.get(tensor.row_weights) if tensor.row_weights else None
            if tensor.row_weights and (
                weights is None
                or tensor.shape[:1] != (weights.size,)
                or weights.bound != self.max_weight
            ):
                raise PlanError(f"tensor {tensor.name!r} has no fitting row weights")
        largest = max((t.size for t in self.tensors), default=1)
        parts = [
            ("the sum of the weights", self.max_weight, "lower max_images_per_site"),
            ("the clip count of the largest tensor", largest, "split the tensor"),
            ("8 bits of precision", 2**8, "run with fewer sites"),
        ]
        parts += [(f"the sum of {c.name}", c.bound, "lower its bound") for c in self.counts]
        for what, value, remedy in parts:
            if value * self.sites >= 2**WORD_BITS:
                site_bits = math.ceil(math.log2(self.sites))
                needed = f"{value.bit_length()} + {site_bits} bits needed, {WORD_BITS} available"
                raise PlanError(f"{what}: {needed}", remedy=remedy)

    def encode(self, update: Tensors, weight: int, counts: Counts | None = None) -> Words:
        """Encode one site's update; see the module docstring.

        Args:
            update: by tensor name.
            weight: the site's sample weight, 1..``max_weight``.
            counts: by name, (size,) each.

        Returns:
            (words,) uint32.

        Raises:
            SiteError: a tensor is missing, has another shape or is not finite, or a weight or count
                is out of range. Nothing has been sent then.
        """
        counts = counts or {}
        if not 1 <= weight <= self.max_weight:
            raise SiteError(
                f"{weight} training images, but the job allows 1 to {self.max_weight} per site",
                remedy="raise max_images_per_site in the job",
            )
        expected = {t.name for t in self.tensors} | {c.name for c in self.counts}
        if differing := sorted((update.keys() | counts.keys()) ^ expected):
            raise SiteError(f"the update and the number plan differ in tensor {differing[0]!r}")
        words = np.empty(self.words, np.int32)
        for count, place in self._count_places():
            words.view(np.uint32)[place] = _checked(counts[count.name], count)
        clipped = words[len(words) - 1 - len(self.tensors) : -1]
        for index, (tensor, place) in enumerate(self._places()):
            values = np.asarray(update[tensor.name])
            if values.shape != tensor.shape:
                raise SiteError(
                    f"tensor {tensor.name!r} has shape {values.shape}, not {tensor.shape}"
                )
            shares = np.full(1, weight / self.max_weight)
            if tensor.row_weights:
                shares = np.asarray(counts[tensor.row_weights]) / self.max_weight
            target = words[place].reshape(len(shares), -1)
            rows = values.reshape(len(shares), -1)
            clipped[index] = sum(
                self._encode_row(tensor, row, share, out)
                for row, share, out in zip(rows, shares, target, strict=True)
            )
        words[-1] = weight
        return words.view(np.uint32)

    def _encode_row(
        self, tensor: TensorPlan, values: NDArray[np.float32], share: float, out: NDArray[np.int32]
    ) -> int:
        """Encode values of one weight; returns how many were clipped."""
        bound = 2.0**tensor.exponent
        scaled = np.empty(min(_BLOCK, values.size), np.float64)
        factor = share * (self.level / bound)
        clipped = 0
        for start in range(0, values.size, _BLOCK):
            part = values[start : start + _BLOCK]
            block = scaled[: part.size]
            if -bound <= float(part.min()) and float(part.max()) <= bound:  # not where one is NaN
                np.multiply(part, factor, out=block, dtype=np.float64)
            else:
                block[:] = part
                if not np.isfinite(block).all():
                    raise SiteError(
                        f"the update of tensor {tensor.name!r} is not finite: training diverged",
                        remedy="lower the learning rate or check the images",
                    )
                outside = np.count_nonzero(block > bound) + np.count_nonzero(block < -bound)
                clipped += int(outside) if share else 0
                np.clip(block, -bound, bound, out=block)
                block *= factor
            out[start : start + _BLOCK] = np.rint(block, out=block)
        return clipped

    def decode(self, total: Words) -> Aggregate:
        """Decode the unmasked sum of all sites; ``total``, (words,) uint32, must stay as it is.

        Raises:
            PlanError: the sum cannot be one of vectors that sites encoded by this plan.
        """
        weight = int(total[-1])
        if not 0 < weight <= self.sites * self.max_weight:
            raise PlanError(f"the weights sum to {weight}", remedy="a site sent a wrong vector")
        counts = {}
        for count, place in self._count_places():
            counts[count.name] = sums = total[place].astype(np.int64)
            if sums.size and int(sums.max()) > self.sites * count.bound:
                raise PlanError(f"{count.name} sums to {sums.max()}", remedy="a site sent nonsense")
        words = total[len(total) - 1 - len(self.tensors) : -1]
        clipped = {t.name: int(n) for t, n in zip(self.tensors, words, strict=True)}
        for tensor in self.tensors:
            if clipped[tensor.name] > self.sites * tensor.size:
                what = f"{clipped[tensor.name]} values of tensor {tensor.name!r} were clipped"
                raise PlanError(what, remedy="a site sent a wrong vector")
        return Aggregate(_Means(self, total, weight, counts), weight, clipped, counts)

    def _places(self) -> Iterator[tuple[TensorPlan, slice]]:
        start = 0
        for tensor in self.tensors:
            yield tensor, slice(start, start + tensor.size)
            start += tensor.size

    def _count_places(self) -> Iterator[tuple[CountPlan, slice]]:
        start = sum(tensor.size for tensor in self.tensors)
        for count in self.counts:
            yield count, slice(start, start + count.size)
            start += count.size


def blocks_of(tensors: Tensors, name: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Parts of a flattened tensor, with their places in it; of a mean update no more is decoded.

    Args:
        tensors: by name, or :attr:`Aggregate.mean`.
        name: of one.
    """
    if isinstance(tensors, _Means):
        yield from tensors.blocks(name)
    else:
        yield slice(0, tensors[name].size), tensors[name].reshape(-1)


class _Means(Mapping[str, NDArray[np.float32]]):
    """Decodes one tensor at a time, so that the whole model is never there twice."""

    def __init__(
        self, plan: NumberPlan, total: Words, weight: int, counts: Mapping[str, NDArray[np.int64]]
    ) -> None:
        self._plan, self._signed, self._weight, self._counts = (
            plan,
            total.view(np.int32),
            weight,
            counts,
        )
        self._places = {tensor.name: (tensor, place) for tensor, place in plan._places()}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        tensor, _ = self._places[name]
        mean = np.empty(tensor.size, np.float32)
        for place, values in self.blocks(name):
            mean[place] = values
        return mean.reshape(tensor.shape)

    def blocks(self, name: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Parts of a flattened tensor, with their places in it."""
        tensor, place = self._places[name]
        weights = np.full(1, self._weight, np.float64)
        if tensor.row_weights:
            weights = self._counts[tensor.row_weights].astype(np.float64)
        step = 2.0**tensor.exponent / self._plan.level * self._plan.max_weight
        units = np.divide(step, weights, out=np.zeros_like(weights), where=weights > 0)
        first = 0
        for row, unit in zip(self._signed[place].reshape(len(units), -1), units, strict=True):
            for start in range(0, row.size, _BLOCK):
                values = (row[start : start + _BLOCK] * unit).astype(np.float32)
                yield slice(first + start, first + start + values.size), values
            first += row.size

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _checked(values: NDArray[np.integer], count: CountPlan) -> NDArray[np.integer]:
    values = np.asarray(values)
    if values.shape != (count.size,) or values.dtype.kind not in "iu":
        raise SiteError(f"{count.name} is no vector of {count.size} integers")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= count.bound:
        raise SiteError(f"{count.name} holds a number outside 0..{count.bound}")
    return values
