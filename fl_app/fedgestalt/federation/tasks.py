"""The tasks of all jobs, and what a site answers to each: the whole surface of what leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedgestalt.federation.job.handshake import Present
from fedgestalt.federation.matching.messages import MaskedRows, Ranked
from fedgestalt.federation.training.messages import Published
from fedgestalt.messages import Message
from fedgestalt.secagg import KeyOffer, MaskedVector
from fedgestalt.similarity.kernel import KernelKey, SealedContributions

TASK_PREFIX: Final = "fgm_"

JOIN, ROUND, UPDATE, PUBLISH = "fgm_join", "fgm_round", "fgm_update", "fgm_publish"
START, KEYS, SEAL = "fgm_match_start", "fgm_kernel_keys", "fgm_kernel_seal"
ENCODE, RANK = "fgm_encode", "fgm_rank"

ANSWERS: Final[Mapping[str, type[Message]]] = {
    JOIN: Present,
    ROUND: KeyOffer,
    UPDATE: MaskedVector,
    PUBLISH: Published,
    START: Present,
    KEYS: KernelKey,
    SEAL: SealedContributions,
    ENCODE: MaskedRows,
    RANK: Ranked,
}

PHASES: Final[Mapping[str, str]] = {
    JOIN: "the sites say what they would work with",
    ROUND: "the sites exchange mask keys",
    UPDATE: "the sites train",
    PUBLISH: "the sites store the model",
    START: "the sites say what they would work with",
    KEYS: "the sites agree on a kernel",
    SEAL: "the sites agree on a kernel",
    ENCODE: "the sites encode their patients",
    RANK: "the sites rank their patients",
}
"""What each task is about, for people."""
