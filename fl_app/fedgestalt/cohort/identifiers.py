"""Diseases as other catalogues call them: OMIM, MONDO and Orphanet, by the form of the identifier.

The form says nothing about whether an entry exists or fits: that would need the catalogues, which
this project does not carry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

FORMS: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "OMIM": re.compile(r"[1-6][0-9]{5}|PS[1-6][0-9]{5}"),  # PS: phenotypic series
        "MONDO": re.compile(r"[0-9]{7}"),
        "ORPHA": re.compile(r"[1-9][0-9]{0,5}"),
    }
)
_ALIASES: Final = {"MIM": "OMIM", "ORPHANET": "ORPHA"}
_SEPARATORS: Final = re.compile(r"[\s,;|\[\](){}'\"]+")
_NOTHING: Final = frozenset({"", "-", "none", "nan", "null", "na", "n/a", "unknown"})


def curie(text: str) -> str | None:
    """The identifier as this project writes it, such as ``OMIM:122470``; None if it is none."""
    prefix, colon, number = text.strip().partition(":")
    prefix = _ALIASES.get(prefix.upper(), prefix.upper())
    form = FORMS.get(prefix)
    return f"{prefix}:{number}" if colon and form and form.fullmatch(number) else None


def curies(cell: str) -> tuple[tuple[str, ...], bool]:
    """The identifiers in a cell, joined by semicolons, and whether all of it was understood."""
    found = [curie(part) for part in cell.split(";") if part.strip()]
    return tuple(dict.fromkeys(f for f in found if f)), None not in found


def are_omim_numbers(cell: str) -> bool:
    """Whether a cell of ``omim_ids`` holds OMIM numbers, with or without a prefix, or nothing.

    Versions of GMDB join several by commas, semicolons or as a list, so all of these are read.
    """
    parts = [part for part in _SEPARATORS.split(cell) if part.lower() not in _NOTHING]
    return all((curie(p if ":" in p else f"OMIM:{p}") or "").startswith("OMIM:") for p in parts)
