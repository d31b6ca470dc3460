"""A provisioned consortium trains and matches; its policy forbids what it must."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hospitals import SITES, Hospitals, matching, training

from fedgestalt.federation.local import LocalConsortium

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    return Hospitals(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def local(hospitals: Hospitals) -> Iterator[LocalConsortium]:
    with hospitals.local() as running:
        hospitals.up(running)
        yield running


def test_three_hospitals_train_and_match(hospitals: Hospitals, local: LocalConsortium) -> None:
    trained = hospitals.run(local, training())
    assert trained["status"] == "completed"
    assert trained["sites"] == list(SITES)
    matched = hospitals.run(local, matching(trained["ensemble"]))
    assert matched["status"] == "completed"
    for site in SITES:
        assert list((hospitals.store(site) / "matches").glob("*.json"))
