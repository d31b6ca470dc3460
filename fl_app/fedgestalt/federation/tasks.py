"""The tasks of all jobs, and what a site answers to each: the whole surface of what leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedgestalt.federation.handshake import Present
from fedgestalt.federation.matching_messages import MaskedRows, Ranked
from fedgestalt.federation.training_messages import Published
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
