"""HPO terms beside faces, at the asking site: its own patients' and those that came with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedgestalt.cohort.phenotype import known_terms, term_similarities
from fedgestalt.similarity.phenotype import case_similarities, fuse
from fedgestalt.similarity.ranking import Floats

Terms = Sequence[tuple[str, ...]]


def with_phenotypes(
    faces: Floats, queries: Terms, rows: Terms, weight: float
) -> tuple[Floats, dict[str, Any]]:
    """Similarities (queries, rows) of faces and HPO terms together, and what they rest on.

    Terms that this site's ontology does not know are left out. A query or row without terms keeps
    what its face says; see :func:`fedgestalt.similarity.phenotype.fuse`.

    Raises:
        ConfigError: hpo3 is not installed, and there are terms to compare.
    """
    about = {
        "weight": weight,
        "queries_with_terms": sum(map(bool, queries)),
        "rows_with_terms": sum(map(bool, rows)),
    }
    if not (weight and about["queries_with_terms"] and about["rows_with_terms"]):
        return faces, about
    names = sorted(known_terms({term for case in (*queries, *rows) for term in case}))
    number = {name: place for place, name in enumerate(names)}
    asked, came = (
        [[number[term] for term in case if term in number] for case in cases]
        for cases in (queries, rows)
    )
    phenotypes = case_similarities(term_similarities(names), asked, came)
    return fuse(faces, phenotypes, weight), about
