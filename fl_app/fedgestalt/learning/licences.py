"""Whether weights may be passed on, by their SPDX licence expression."""

from __future__ import annotations

from typing import Final

MAY_BE_PASSED_ON: Final = frozenset(
    {
        *("Apache-2.0", "MIT", "MIT-0", "ISC", "0BSD", "Unlicense", "Zlib"),
        *("BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0"),
    }
)
"""Licences under which anybody may pass weights on for any purpose."""


def may_be_passed_on(expression: str) -> bool:
    """Whether an SPDX expression allows it for certain; random weights have no licence.

    What is not understood, ``NOASSERTION`` and every other licence count as a no.
    """
    if not expression:
        return True
    choices = [choice.split(" AND ") for choice in expression.split(" OR ")]
    return any(all(name.strip() in MAY_BE_PASSED_ON for name in names) for names in choices)
