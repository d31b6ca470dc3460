"""Attacks on our own matching strategies, measured on encodings of real photographs.

Run ``python tests/benchmarks/similarity_attacks.py``: it prints the table of
``docs/explanation/similarity-privacy.md``. Research use only, not a diagnosis.

The photographs are those of the cohort ``orl`` (400 of 40 people), encoded by the default ensemble
as it starts. Whoever attacks knows photographs of 32 people and wants the encodings of the 8
others. Two numbers say how far an attack gets:

- *cosine*: mean cosine similarity of a recovered encoding and the true one;
- *found*: how often the nearest of all 400 true encodings to a recovered one is of the same person.

Attackers that know nothing guess the mean encoding: the first row of the table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.hooks import get_registry
from fedgestalt.similarity.gram import best_per_class, top_rows

Rows = NDArray[np.float64]
SEED, OTHER_SEED = bytes(32), bytes(31) + b"1"


@dataclass(frozen=True)
class Photographs:
    """What is attacked.

    Attributes:
        encodings: (n, f) of length 1.
        people: (n,) who is on them.
        known: (n,) whether the attacker has the photograph itself.
    """

    encodings: Rows
    people: NDArray[np.int64]
    known: NDArray[np.bool_]

    def recovered(self, guesses: Rows) -> tuple[str, str]:
        """Cosine and share found of guesses for all photographs that are not known."""
        lengths = np.maximum(np.linalg.norm(guesses, axis=1, keepdims=True), 1e-12)
        similar = (guesses / lengths) @ self.encodings.T
        targets = np.flatnonzero(~self.known)
        cosine = similar[np.arange(len(targets)), targets].mean()
        found = (self.people[similar.argmax(1)] == self.people[targets]) & (lengths[:, 0] > 1e-9)
        return f"{cosine:.3f}", f"{found.mean():.0%}"

    def some_known(self, count: int) -> NDArray[np.int64]:
        """Numbers of ``count`` known photographs, of as many people as possible."""
        chosen = np.random.default_rng(count).permutation(np.flatnonzero(self.known))[:count]
        return np.sort(chosen)


def masked(strategy: MatchingStrategy, rows: Rows, seed: bytes = SEED) -> Rows:
    """What the server gets."""
    (part,) = strategy.enrol(rows, seed)
    return part.words.astype(np.float64)


# --- attacks -------------------------------------------------------------------------------------


def with_the_seed(strategy: MatchingStrategy, target: Rows, size: int) -> Rows:
    """Server and one site together: mask the axes, and turn back."""
    return target @ masked(strategy, np.eye(size)).T


def procrustes(target: Rows, known_masked: Rows, known: Rows, block: int = 0) -> Rows:
    """The server fits the isometry to photographs that it knows (Schoenemann 1966).

    ``block`` is the number of dimensions that are masked on their own, 0 for all.
    """
    size = known.shape[1]
    block = block or size
    parts = []
    ratio = target.shape[1] / size  # masked blocks may be longer
    for start in range(0, size, block):
        plain = known[:, start : start + block]
        cut = slice(round(start * ratio), round((start + plain.shape[1]) * ratio))
        left, values, right = np.linalg.svd(known_masked[:, cut].T @ plain, full_matrices=False)
        seen = values > 1e-9 * values[0]  # nothing is known of the other directions
        parts.append(target[:, cut] @ (left[:, seen] @ right[seen]))
    return np.concatenate(parts, axis=1)


def trilateration(scores: Rows, known: Rows) -> Rows:
    """Encodings from their scores (n, m) with m known encodings alone.

    Least squares; where scores leave a direction open, the mean of the known encodings. Scores
    that are not known are NaN.
    """
    mean, seen = known.mean(0), np.isfinite(scores)
    surprise = scores - known @ mean
    if seen.all():
        result: Rows = mean + surprise @ np.linalg.pinv(known, rcond=1e-9).T
        return result
    guesses = np.tile(mean, (len(scores), 1))
    for guess, row, here in zip(guesses, surprise, seen, strict=True):
        if here.any():
            guess += np.linalg.pinv(known[here], rcond=1e-9) @ row[here]
    return guesses


def released_scores(queries: Rows, gallery: Rows, count: int) -> Rows:
    """Scores (gallery, queries) that the asking site gets if the best ``count`` are released."""
    best = top_rows(queries, gallery, count)
    scores = np.full((len(queries), len(gallery)), np.nan)
    np.put_along_axis(scores, best.rows, best.scores.astype(np.float64), 1)
    return scores.T


def linked_rows(first: Rows, second: Rows) -> float:
    """Share of rows whose nearest row of another session is the same image."""
    return float(((first @ second.T).argmax(1) == np.arange(len(first))).mean())


def linked_profiles(first: Rows, second: Rows, common: int) -> float:
    """The same by each image's sorted similarities alone; the first ``common`` rows are in both."""
    profiles = []
    for rows in (first, second):
        others = np.sort(rows @ rows.T, axis=1)[:, :-1]
        places = np.linspace(0, others.shape[1] - 1, 50).round().astype(int)
        profiles.append(others[:common, places])
    distances = ((profiles[0][:, None] - profiles[1][None]) ** 2).sum(2)
    return float((distances.argmin(1) == np.arange(common)).mean())


def same_person_auc(gram: Rows, people: NDArray[np.int64]) -> float:
    """How well similarity tells pairs of one person from pairs of two (area under the curve)."""
    upper = np.triu_indices(len(gram), 1)
    scores, same = gram[upper], (people[:, None] == people)[upper]
    order = np.searchsorted(np.sort(scores[~same]), scores[same])
    return float(order.mean() / (~same).sum())


def nearest_is_same_person(scores: Rows, people: NDArray[np.int64]) -> float:
    """Share of images whose best other image is of the same person."""
    scores = scores.copy()
    np.fill_diagonal(scores, -np.inf)
    return float((people[scores.argmax(1)] == people).mean())


# --- the table -----------------------------------------------------------------------------------

Line = tuple[str, str, str, str]
"""Who attacks what, with what, cosine, found."""


def table(photos: Photographs) -> Iterator[Line]:
    """Measure everything."""
    yield from _guess(photos)
    yield from _server(photos)
    yield from _asking_site(photos)
    yield from _blurred(photos)


def other_measurements(photos: Photographs) -> Iterator[tuple[str, str]]:
    """What is not a recovered encoding."""
    rows, people, count = photos.encodings, photos.people, len(photos.people)
    gram = rows @ rows.T
    yield (
        "server, from similarities: one person or two (area under the curve)",
        (f"{same_person_auc(gram, people):.3f}"),
    )
    for name in ("flake", "isometry-blocks", "isometry"):
        strategy = get_registry().matching.get(name)
        kept = np.corrcoef(rows.sum(1), masked(strategy, rows).sum(1))[0, 1]
        yield f"correlation of the sum of coordinates through `{name}`", f"{abs(kept):.4f}"
    isometry = get_registry().matching.get("isometry")
    first, again = masked(isometry, rows), masked(isometry, rows)
    new_key = masked(isometry, rows, OTHER_SEED)
    yield "sessions linked, same kernel", f"{linked_rows(first, again):.0%}"
    yield "sessions linked, new kernel, by masked rows", f"{linked_rows(first, new_key):.0%}"
    yield (
        "sessions linked, new kernel, by similarities, same images",
        (f"{linked_profiles(first, new_key, count):.0%}"),
    )
    third = count // 3
    order = np.random.default_rng(0).permutation(count)
    one, two = first[order[: 2 * third]], new_key[order[np.r_[:third, 2 * third : 3 * third]]]
    yield (
        "sessions linked, new kernel, by similarities, half of the images in both",
        (f"{linked_profiles(one, two, third):.0%}"),
    )


def _guess(photos: Photographs) -> Iterator[Line]:
    mean = photos.encodings[photos.known].mean(0)
    guesses = np.tile(mean, (int((~photos.known).sum()), 1))
    yield "anybody", "the mean of known encodings", *photos.recovered(guesses)


def _server(photos: Photographs) -> Iterator[Line]:
    rows, size = photos.encodings, photos.encodings.shape[1]
    for name, block in (("isometry", 0), ("isometry-blocks", 512), ("flake", 512)):
        strategy = get_registry().matching.get(name)
        sent = masked(strategy, rows)
        target = sent[~photos.known]
        guesses = with_the_seed(strategy, target, size)
        yield f"server, `{name}`", "one site's seed", *photos.recovered(guesses)
        for count in (20, 80, 320):
            chosen = photos.some_known(count)
            guesses = procrustes(target, sent[chosen], rows[chosen], block)
            what = f"{len(chosen)} known photographs (Procrustes)"
            yield f"server, `{name}`", what, *photos.recovered(guesses)
    for count in (20, 80, 320):
        chosen = photos.some_known(count)
        guesses = trilateration(rows[~photos.known] @ rows[chosen].T, rows[chosen])
        what = f"similarities with {len(chosen)} known photographs (trilateration)"
        yield "server, any one-party strategy", what, *photos.recovered(guesses)
    yield from _computing_parties(photos)


def _computing_parties(photos: Photographs) -> Iterator[Line]:
    """The same attack on shares; and the sum of what two parties hold."""
    rows = photos.encodings
    strategy, chosen = get_registry().matching.get("secret-shared"), photos.some_known(320)
    held = [strategy.receive(p, part).words for p, part in enumerate(strategy.enrol(rows, SEED))]
    for role, words in zip(strategy.roles, held, strict=True):
        sent = words.view(np.int64) / 2.0**63
        guesses = procrustes(sent[~photos.known], sent[chosen], rows[chosen])
        what = f"{len(chosen)} known photographs (Procrustes)"
        yield f"{role}, `secret-shared`", what, *photos.recovered(guesses)
    total = held[1] - held[2]
    guesses = total.view(np.int64)[~photos.known].astype(np.float64)
    yield "two computing parties, `secret-shared`", "their shares", *photos.recovered(guesses)


def _asking_site(photos: Photographs) -> Iterator[Line]:
    rows, hidden = photos.encodings, photos.encodings[~photos.known]
    for release in (len(hidden), 20, 5):
        for budget in (20, 80, 320):
            asked = rows[photos.some_known(budget)]
            guesses = trilateration(released_scores(asked, hidden, release), asked)
            whole = release == len(hidden)
            who = (
                "asking site, all rows (`secret-shared`)"
                if whole
                else f"asking site, best {release} of {len(hidden)}"
            )
            yield who, f"{len(asked)} queries", *photos.recovered(guesses)
    asked = rows[photos.some_known(320)]
    for images in (1, 3, 10):  # of each person; the released score is the best of them
        people = photos.people[~photos.known]
        kept = np.concatenate([np.flatnonzero(people == p)[:images] for p in np.unique(people)])
        best = best_per_class(asked, hidden[kept], people[kept])
        guesses = trilateration(best.scores.T.astype(np.float64), asked)
        guesses = guesses[np.searchsorted(best.syndromes, people)]
        what = f"{len(asked)} queries; class of {images}; cosine with all its images"
        yield "asking site, best of each class, no handle", what, photos.recovered(guesses)[0], ""


def _blurred(photos: Photographs) -> Iterator[Line]:
    rows, rng = photos.encodings, np.random.default_rng(0)
    gram, chosen = rows @ rows.T, photos.some_known(320)
    exact = nearest_is_same_person(gram, photos.people)
    blurs = {
        "rounded to .01": np.round(gram, 2),
        "rounded to .1": np.round(gram, 1),
        "noise of .02": gram + rng.normal(0, 0.02, gram.shape),
        "noise of .05": gram + rng.normal(0, 0.05, gram.shape),
        "noise of .1": gram + rng.normal(0, 0.1, gram.shape),
    }
    for name, scores in blurs.items():
        # the attacker, too, knows how much was blurred: ridge instead of least squares, well chosen
        known, ridge = rows[chosen], np.var(scores - gram) * rows.shape[1]
        surprise = scores[np.ix_(~photos.known, chosen)] - known @ known.mean(0)
        best = max(
            photos.recovered(
                known.mean(0)
                + surprise
                @ np.linalg.solve(known @ known.T + part * ridge * np.eye(len(known)), known)
            )
            for part in (0.001, 0.01, 0.1, 1)
        )
        useful = nearest_is_same_person(scores, photos.people)
        what = f"trilateration with {len(chosen)}; right person first: {useful:.0%} ({exact:.0%})"
        yield f"server, scores {name}", what, *best


def orl_photographs() -> Photographs:
    """Encode the cohort ``orl`` with the default ensemble as it starts; about a minute."""
    import torch

    from fedgestalt.cohort import default_cache, materialise, read_cohort
    from fedgestalt.learning.encoding import encode
    from fedgestalt.learning.ensemble import build_ensemble
    from fedgestalt.learning.images import load_faces
    from fedgestalt.learning.spec import default_ensemble

    registry = get_registry()
    source = registry.cohorts.get("orl")
    cohort = read_cohort(materialise(source, default_cache(), lambda done, total: None), name="orl")
    records = list(cohort.records(sorted(cohort.images)))
    ensemble = build_ensemble(default_ensemble(), len(cohort.classes), registry)
    rows = encode(ensemble, load_faces(records), torch.device("cpu")).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    people = np.array([record.syndrome for record in records])
    return Photographs(rows, people, people <= 32)


def main() -> None:
    """Print the tables."""
    photos = orl_photographs()
    write = sys.stdout.write
    count, size = photos.encodings.shape
    write(f"{count} photographs, {size} dimensions, {int((~photos.known).sum())} attacked.\n\n")
    write("| who | with what | cosine | found |\n| --- | --- | --- | --- |\n")
    for line in table(photos):
        write(f"| {' | '.join(line)} |\n")
    write("\n| measurement | value |\n| --- | --- |\n")
    for what, value in other_measurements(photos):
        write(f"| {what} | {value} |\n")


if __name__ == "__main__":
    main()
