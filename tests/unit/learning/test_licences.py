"""Only a licence that is known to allow it lets weights be passed on."""

from __future__ import annotations

import pytest

from fedgestalt.learning.licences import may_be_passed_on


@pytest.mark.parametrize(
    "expression", ["", "Apache-2.0", "MIT", "Apache-2.0 AND MIT", "CC-BY-NC-4.0 OR MIT"]
)
def test_what_may_be_passed_on(expression: str) -> None:
    assert may_be_passed_on(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "NOASSERTION",
        "NONE",
        "CC-BY-NC-4.0",
        "LicenseRef-research-only",
        "Apache-2.0 AND CC-BY-NC-4.0",
        "MIT AND (Apache-2.0 OR CC-BY-NC-4.0)",
        "apache",
        " ",
    ],
)
def test_what_may_not_or_is_not_understood(expression: str) -> None:
    assert not may_be_passed_on(expression)
