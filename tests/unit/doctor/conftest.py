"""Kits and a cohort made once; a hospital of one's own for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from consortium import tiny_silos
from doctor_trial import SITE, Endpoint, Hospital, hospital, provision


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provision(tmp_path_factory.mktemp("kits"))


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    tiny_silos(folder, [SITE])
    return folder / "hospitals" / SITE


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _an_ordinary_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is active, and no proxy is set."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "NVFL_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site(tmp_path: Path, kits: Path, cohort_folder: Path, endpoint: Endpoint) -> Hospital:
    return hospital(tmp_path, kits, cohort_folder, endpoint)
