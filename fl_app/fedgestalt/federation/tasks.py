"""The tasks of all jobs, and what a site answers to each: the whole surface of what leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedgestalt.federation.job.handshake import Present
from fedgestalt.federation.matching.messages import MaskedRows, Ranked
from fedgestalt.federation.training.messages import Published, Receipt, Trained, Uploaded
from fedgestalt.messages import Message
from fedgestalt.secagg import Endorsement, KeyOffer, ShareOffer, UnmaskShares
from fedgestalt.similarity.kernel import KernelKey, SealedContributions

TASK_PREFIX: Final = "fgm_"

JOIN, TRAIN, APPLY, PUBLISH = "fgm_join", "fgm_train", "fgm_apply", "fgm_publish"
KEYS, SHARES, VECTOR = "fgm_keys", "fgm_shares", "fgm_vector"
SURVIVORS, UNMASK = "fgm_survivors", "fgm_unmask"
START, KERNEL_KEYS, SEAL = "fgm_match_start", "fgm_kernel_keys", "fgm_kernel_seal"
ENCODE, RANK = "fgm_encode", "fgm_rank"

ANSWERS: Final[Mapping[str, type[Message]]] = {
    JOIN: Present,
    TRAIN: Trained,
    KEYS: KeyOffer,
    SHARES: ShareOffer,
    VECTOR: Uploaded,
    SURVIVORS: Endorsement,
    UNMASK: UnmaskShares,
    APPLY: Receipt,
    PUBLISH: Published,
    START: Present,
    KERNEL_KEYS: KernelKey,
    SEAL: SealedContributions,
    ENCODE: MaskedRows,
    RANK: Ranked,
}

PHASES: Final[Mapping[str, str]] = {
    JOIN: "the sites say what they would work with",
    TRAIN: "the sites train",
    KEYS: "the sites exchange mask keys",
    SHARES: "the sites share what opens the sum",
    VECTOR: "the sites send their masked updates",
    SURVIVORS: "the sites agree on whose updates are in the sum",
    UNMASK: "the sites open the sum",
    APPLY: "the sites check and apply the sum",
    PUBLISH: "the sites store the model",
    START: "the sites say what they would work with",
    KERNEL_KEYS: "the sites agree on a kernel",
    SEAL: "the sites agree on a kernel",
    ENCODE: "the sites encode their patients",
    RANK: "the sites rank their patients",
}
"""What each task is about, for people."""
