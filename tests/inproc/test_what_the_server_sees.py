"""Everything that reaches the server in both jobs, searched for what must never be there."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from consortium import BothJobs, Plain, Received, Run, tiny_ensemble
from numpy.typing import NDArray

from fedgestalt.cohort import Cohort
from fedgestalt.federation.job.transfer import DOWNLOAD, UPLOAD
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.encoding import Encodings, encode
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.store import load_ensemble
from fedgestalt.similarity.order import image_order

PIECE_BYTES = 16
"""Any run of so many secret bytes found in a message is a leak."""


def leaves(fields: object, path: str = "") -> Iterator[tuple[str, object]]:
    """All values of a reply, with where they stand."""
    if isinstance(fields, dict):
        for key, value in fields.items():
            yield f"{path}/{key}", key
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, fields


def uniformity_defect(words: NDArray[np.uint32]) -> float:
    """How far words are from uniform: the largest z score of several tests.

    Chi-squared of the byte values at each of the four byte positions, and of every single bit;
    the serial correlation of neighbouring words.
    """
    count = len(words)
    scores = []
    for column in words.view(np.uint8).reshape(count, 4).T:
        observed = np.bincount(column, minlength=256)
        chi = ((observed - count / 256) ** 2 / (count / 256)).sum()
        scores.append(abs(chi - 255) / np.sqrt(2 * 255))
        for bit in range(8):
            ones = int(((column >> bit) & 1).sum())
            scores.append(abs(ones - count / 2) / np.sqrt(count / 4))
    centred = words.astype(np.float64) - words.mean()
    serial = (centred[1:] * centred[:-1]).mean() / centred.var()
    scores.append(abs(serial) * np.sqrt(count))
    return float(max(scores))


UNIFORM_BELOW = 6.0
"""Of 37 z scores of uniform words, one above 6 comes about once in ten million runs."""


class Secrets:
    """What one site holds and must not send, as byte strings."""

    def __init__(self, both: BothJobs, plain: Plain, site: str) -> None:
        cohort = both.consortium.silos[site]
        first = plain.first_update(site)
        self.words, self.update = first.words, [*first.update.values(), *first.new.values()]
        store = both.consortium.store(site) / "ensembles" / both.training.outcome["ensemble"]
        self.encodings = _encodings(cohort, store)
        self.texts = [r.subject for r in cohort.images.values()]
        self.texts += list(cohort.images)
        self.texts += [r.subject for r in cohort.unsolved.values()]
        self.texts += list(cohort.unsolved)
        self.texts += [s.name for s in cohort.syndromes.values()]
        self.texts += [term for r in cohort.images.values() for term in r.hpo]
        self.texts += [str(both.consortium.folder), "_rot_aligned"]


def _encodings(cohort: Cohort, folder: Path) -> Encodings:
    ensemble, _ = load_ensemble(folder, get_registry())
    faces = load_faces(cohort.records(image_order(cohort).image_ids))
    return encode(ensemble, faces, torch.device("cpu"))


@pytest.fixture(scope="module")
def secrets(both_jobs: BothJobs) -> dict[str, Secrets]:
    plain = Plain(both_jobs.consortium, TrainingJob(ensemble=tiny_ensemble()))
    return {site: Secrets(both_jobs, plain, site) for site in both_jobs.consortium.sites}


def uploads(run: Run) -> dict[tuple[str, str], NDArray[np.uint32]]:
    """The vectors that sites uploaded, by (site, session)."""
    chunks: dict[tuple[str, str], dict[int, bytes]] = {}
    for message in run.received:
        if message.task == UPLOAD:
            fields = message.reply["fedgestalt"]
            vector = chunks.setdefault((message.site, fields["name"]), {})
            vector[fields["chunk"]] = fields["words"]
    return {
        key: np.frombuffer(b"".join(vector[n] for n in sorted(vector)), np.uint32)
        for key, vector in chunks.items()
    }


def pieces_of(values: NDArray) -> Iterator[bytes]:
    """Byte strings of several places of an array, unless they are all alike (zeros say nothing)."""
    raw = np.ascontiguousarray(values).tobytes()
    for start in range(0, max(1, len(raw) - PIECE_BYTES), max(PIECE_BYTES, len(raw) // 400)):
        piece = raw[start : start + PIECE_BYTES]
        if len(piece) == PIECE_BYTES and len(set(piece)) > 6:
            yield piece


def found_in(received: list[Received], pieces: Iterator[bytes]) -> int:
    """How many of ``pieces`` stand in any message."""
    everything = [message.payload for message in received]
    return sum(any(piece in payload for payload in everything) for piece in pieces)


def test_no_plaintext_update_reaches_the_server(both_jobs: BothJobs, secrets: dict) -> None:
    received = both_jobs.training.received
    assert {UPLOAD, DOWNLOAD} < {message.task for message in received}
    for site, secret in secrets.items():
        assert len(list(pieces_of(secret.words))) > 10
        assert found_in(received, pieces_of(secret.words)) == 0, site
        for values in secret.update:
            assert found_in(received, pieces_of(values)) == 0, site
            assert found_in(received, pieces_of(values.astype(np.float64))) == 0, site


def test_the_update_search_finds_an_update_that_is_sent_unmasked(
    both_jobs: BothJobs, secrets: dict
) -> None:
    secret = next(iter(secrets.values()))
    planted = Received("x", UPLOAD, b"head" + secret.words.tobytes(), None)  # type: ignore[arg-type]
    assert found_in([*both_jobs.training.received, planted], pieces_of(secret.words)) > 10


def test_no_embedding_reaches_the_server(both_jobs: BothJobs, secrets: dict) -> None:
    received = both_jobs.training.received + both_jobs.matching.received
    rows = both_jobs.matching.replies("fgm_enrol")
    for site, secret in secrets.items():
        assert len(list(pieces_of(secret.encodings))) > 10
        for dtype in (np.float32, np.float64, np.float16):
            assert found_in(received, pieces_of(secret.encodings.astype(dtype))) == 0, site
        plain = secret.encodings
        masked = rows[site]["rows"][: len(plain)]  # behind them are planted rows
        assert masked.shape == plain.shape
        assert np.abs((masked * plain).sum(1)).max() < 0.9, "a masked row points where its own does"
        sums = np.corrcoef(masked.sum(1), plain.sum(1))[0, 1]
        assert abs(sums) < 0.9, "the sum of coordinates survives the mask"


def test_no_label_subject_or_image_name_reaches_the_server(
    both_jobs: BothJobs, secrets: dict
) -> None:
    received = both_jobs.training.received + both_jobs.matching.received
    for site, secret in secrets.items():
        assert len(secret.texts) > 50
        for text in secret.texts:
            assert all(text.encode() not in m.payload for m in received), (site, text)


def test_the_same_label_never_looks_the_same(both_jobs: BothJobs) -> None:
    sealed = [f["labels"] for f in both_jobs.matching.replies("fgm_enrol").values()]
    rows = np.concatenate(sealed)
    assert len(np.unique(rows, axis=0)) == len(rows)
    for part in (rows[:, :12], rows[:, 12:20], rows[:, 20:100], rows[:, 100:]):
        assert len(np.unique(part, axis=0)) == len(rows)


def test_replies_hold_nothing_but_the_agreed_fields(both_jobs: BothJobs) -> None:
    present = {"schema", "facts", "clock", "certificate", "cipher"}
    allowed = {
        "fgm_join": present,
        "fgm_train": {"schema", "round"},
        "fgm_keys": {"schema", "session", "mask_key", "channel_key", "signature"},
        "fgm_shares": {"schema", "session", "header", "boxes"},
        UPLOAD: {"schema", "name", "ticket", "chunk", "checksum", "words"},
        "fgm_vector": {"schema", "session"},
        "fgm_survivors": {"schema", "session", "signature"},
        "fgm_unmask": {"schema", "session", "shares"},
        DOWNLOAD: {"schema", "name", "chunk"},
        "fgm_apply": {"schema", "record", "signature"},
        "fgm_publish": {"schema", "digest", "doubtful_labels"},
        "fgm_match_start": present,
        "fgm_kernel_holdings": {"schema", "kernels", "has_ensemble", "layout"},
        "fgm_kernel_keys": {"schema", "session", "public_key", "signature"},
        "fgm_kernel_seal": {"schema", "boxes"},
        "fgm_kernel_agree": {"schema", "kernel"},
        "fgm_enrol": {
            *("schema", "kernel", "removed", "rows", "handles", "labels", "queries", "yardstick"),
            *("signature", "withdrawn"),
        },
        "fgm_consider": {"schema", "kernel", "signatures"},
        "fgm_rank": {"schema", "kernel"},
    }
    received = both_jobs.training.received + both_jobs.matching.received
    assert {message.task for message in received} == allowed.keys()
    for message in received:
        assert set(message.reply["fedgestalt"]) == allowed[message.task], message.task
        others = set(message.reply) - {"fedgestalt", "__headers__"}
        assert not others, (message.task, others)


DIGEST = r"[0-9a-f]{64}"
VERSION = r"[0-9]+(\.[0-9]+)*([a-z0-9.+]*)"
"""What a fact may be; nothing else has room for what a site knows about its patients."""

FACTS = {
    "fedgestalt": VERSION,
    "nvflare": VERSION,
    "fedgestalt code": DIGEST,
    "plugin backbone iresnet": f"fedgestalt {VERSION} {DIGEST}",
    "label map": DIGEST,
}
FACTS_OF_TRAINING = {
    **FACTS,
    "classes": "3",
    "start model": DIGEST,
    "number plan": DIGEST,
}
FACTS_OF_MATCHING = {
    **FACTS,
    "plugin matching strategy isometry": f"fedgestalt {VERSION} {DIGEST}",
}


@pytest.mark.parametrize(
    ("task", "allowed"), [("fgm_join", FACTS_OF_TRAINING), ("fgm_match_start", FACTS_OF_MATCHING)]
)
def test_the_facts_that_a_site_states_are_names_and_digests(
    both_jobs: BothJobs, task: str, allowed: dict[str, str]
) -> None:
    run = both_jobs.training if task == "fgm_join" else both_jobs.matching
    stated = run.replies(task)
    assert stated.keys() == set(both_jobs.consortium.sites)
    for fields in stated.values():
        assert fields["facts"].keys() == allowed.keys()
        for name, value in fields["facts"].items():
            assert re.fullmatch(allowed[name], value), name
        assert abs(fields["clock"] / 1000 - time.time()) < 3600


@pytest.mark.parametrize("task", ["fgm_join", "fgm_match_start"])
def test_sites_with_different_patients_state_the_same_facts(both_jobs: BothJobs, task: str) -> None:
    run = both_jobs.training if task == "fgm_join" else both_jobs.matching
    first, *others = (fields["facts"] for fields in run.replies(task).values())
    assert others == [first, first]


def test_a_site_says_one_bit_about_its_labels(both_jobs: BothJobs) -> None:
    replies = both_jobs.training.replies("fgm_publish")
    assert {site: fields["doubtful_labels"] for site, fields in replies.items()} == dict.fromkeys(
        both_jobs.consortium.sites, 0
    )


def test_the_kernel_seed_is_in_no_message_in_either_direction(both_jobs: BothJobs) -> None:
    run = both_jobs.matching
    boxes = [f["boxes"] for f in run.replies("fgm_kernel_seal").values()]
    contributions = [box for by_peer in boxes for box in by_peer.values()]
    assert len(set(contributions)) == len(contributions) == 6
    assert all(len(box) == 1088 + 32 + 16 for box in contributions)
    assert uniformity_of_bytes(b"".join(contributions))


def uniformity_of_bytes(content: bytes) -> bool:
    """Whether the share of one bits is what random bytes have, within six standard deviations."""
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    return bool(abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(bits)))


def test_a_masked_upload_is_uniform_and_the_same_upload_unmasked_is_not(
    both_jobs: BothJobs, secrets: dict
) -> None:
    vectors = uploads(both_jobs.training)
    assert len(vectors) == 6
    for words in vectors.values():
        assert uniformity_defect(words) < UNIFORM_BELOW
    for secret in secrets.values():
        assert uniformity_defect(secret.words) > 10 * UNIFORM_BELOW


def test_a_site_gets_scores_for_its_own_queries_only(both_jobs: BothJobs) -> None:
    run = both_jobs.matching
    asked = {site: f["queries"] for site, f in run.replies("fgm_enrol").items()}
    for site, task, data in run.sent:
        if task == "fgm_rank":
            assert data["fedgestalt"]["scores"].shape[0] == len(asked[site])


def test_a_released_row_does_not_say_which_site_holds_it(both_jobs: BothJobs) -> None:
    released = [d["fedgestalt"] for _, task, d in both_jobs.matching.sent if task == "fgm_rank"]
    for fields in released:
        assert set(fields) == {
            *("schema", "handles", "labels", "columns", "scores"),
            *("yardstick_columns", "yardstick_scores"),
            "receipts",
        }


def test_no_log_line_names_an_image_subject_or_label(both_jobs: BothJobs, secrets: dict) -> None:
    folders = [both_jobs.training.folder.parents[1], both_jobs.matching.folder.parents[1]]
    files = [p for f in folders for p in f.rglob("*") if p.suffix in {".json", ".jsonl", ".txt"}]
    assert len(files) > 4
    content = "".join(p.read_text() for p in files)
    for secret in secrets.values():
        assert not [text for text in secret.texts if text in content]
