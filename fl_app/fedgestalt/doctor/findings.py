"""What a check says: one sentence about what is, and one about what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, ParamSpec

from fedgestalt.errors import DataError, FedgestaltError

State = Literal["ok", "warning", "problem", "skipped"]
Figure = int | float | str | bool | Mapping[str, str] | list[str] | None

LEAD: Final = "the consortium lead"
_CALL_US: Final = f"run `fedgestalt doctor` again; if it stays so, tell {LEAD}"
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: group and detail, for example ``kit.key``.
        state: ``skipped`` is a check that could not be made because another one found a problem.
        what: what was found, without a full stop; names no subject, image or label.
        remedy: what to do about it; there for warnings and problems, empty otherwise.
        figures: numbers and names behind ``what``, for machines.
    """

    name: str
    state: State
    what: str
    remedy: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The first part of the name."""
        return self.name.partition(".")[0]


def ok(name: str, what: str, **figures: Figure) -> Check:
    """A check that found all well."""
    return Check(name, "ok", what, "", figures)


def warning(name: str, what: str, remedy: str, **figures: Figure) -> Check:
    """A check that found something to look at, which does not keep the site from working."""
    return Check(name, "warning", what, remedy, figures)


def problem(name: str, what: str, remedy: str, **figures: Figure) -> Check:
    """A check that found what keeps the site from working, or from working safely."""
    return Check(name, "problem", what, remedy, figures)


def not_checked(name: str, reason: str) -> list[Check]:
    """A check that was left out because of what another one found."""
    return [Check(name, "skipped", f"not checked, because {reason}")]


class NotCheckedError(Exception):
    """A check cannot be made; the text says why, and another check says what to do about it."""


Arguments = ParamSpec("Arguments")


def check(
    name: str,
) -> Callable[[Callable[Arguments, Iterable[Check]]], Callable[Arguments, list[Check]]]:
    """Make a function of checks return whatever it found, also when it breaks off.

    A foreseeable fault or an unexpected exception becomes a problem called ``name``,
    :class:`NotCheckedError` a skipped check, and the checks that it had yielded before stay.
    """

    def wrap(
        function: Callable[Arguments, Iterable[Check]],
    ) -> Callable[Arguments, list[Check]]:
        @functools.wraps(function)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> list[Check]:
            found: list[Check] = []
            try:
                found.extend(function(*args, **kwargs))
            except NotCheckedError as reason:
                found += not_checked(name, str(reason))
            except FedgestaltError as error:
                found.append(problem(name, told(error), error.remedy or _CALL_US))
            except Exception as error:  # noqa: BLE001  one broken check must not hide the others
                what = f"the check itself stopped with {type(error).__name__}"
                found.append(problem(name, what, _CALL_US))
            return found

        return guarded

    return wrap


def told(error: FedgestaltError) -> str:
    """What a fault is and where; not where in the data, which could name an image."""
    named = error.where and not isinstance(error, DataError)
    return f"{error.where}: {error.what}" if named else error.what


def in_bytes(count: float) -> str:
    """A size for people: ``3.2 GiB``."""
    step = 0
    while count >= 1024 and step < len(_UNITS) - 1:
        count, step = count / 1024, step + 1
    unit = _UNITS[step]
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"


def in_time(seconds: float) -> str:
    """A duration for people: ``4 min``."""
    if seconds < 1:
        return "less than a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def counted(number: int, noun: str, nouns: str = "") -> str:
    """A number with its noun: ``1 image``, ``2 images``."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
