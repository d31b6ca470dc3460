"""No protection at all: what the others are compared with, in tests."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Disclosure
from fedgestalt.errors import ConfigError
from fedgestalt_plugins.matching.one_party import OneParty, checked

PERMISSION: Final = "FEDGESTALT_TEST_WITHOUT_PROTECTION"
"""Environment variable that must be ``1``, at every site by itself; no job can set it."""


@dataclass(frozen=True)
class Plaintext(OneParty):
    """Matching strategy ``plaintext``, for tests alone."""

    name: str = "plaintext"
    summary: str = "encodings in the clear, for tests alone: refuses to work in a consortium"
    licence: str = "Apache-2.0"
    disclosure: Disclosure = Disclosure(
        server_learns="All encodings, which is nearly as much as all photographs: no protection.",
        sites_learn="Nothing about other sites' images.",
        asking_site_learns=(
            "For its own queries: score, syndrome and opaque handle of the released images of other"
            " sites."
        ),
    )

    def mask(self, encodings: NDArray[np.floating], seed: bytes) -> NDArray[np.floating]:  # noqa: ARG002
        """Return (n, f) encodings unchanged.

        Raises:
            ConfigError: this process is no test.
            DataError: there is none, or one is not finite or not of length 1.
        """
        if os.environ.get(PERMISSION) != "1":
            raise ConfigError(
                "strategy 'plaintext' protects nothing and works in tests alone",
                remedy="use 'isometry' or 'secret-shared'",
            )
        return checked(encodings)
