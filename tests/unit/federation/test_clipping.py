"""A round in which many values were cut is reported, and nobody is accused."""

from __future__ import annotations

import pytest

from fedgestalt.federation.training.rounds import clipping_warning
from fedgestalt.secagg import Aggregate, NumberPlan, TensorPlan

PLAN = NumberPlan(3, 100, (TensorPlan("head", (998,), 0),))
"""1000 words: values, a clip count, the weight."""


@pytest.mark.parametrize("clipped", [0, 5, 100])
def test_a_few_cut_values_are_usual(clipped: int) -> None:
    assert clipping_warning(2, Aggregate({}, 10, {"head": clipped}), PLAN) == ""


def test_a_tenth_of_one_sites_values_is_not() -> None:
    said = clipping_warning(2, Aggregate({}, 10, {"head": 960}), PLAN)
    assert said.startswith("round 2: 32% of all values that the sites sent were larger than")
    assert "under the masks nobody can tell which" in said
