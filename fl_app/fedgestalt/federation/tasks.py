"""The tasks of all jobs, and what a site answers to each: the whole surface of what leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedgestalt.federation.job.handshake import Present
from fedgestalt.federation.matching.messages import (
    Cases,
    Computed,
    Consent,
    Enrolment,
    EnsembleSent,
    GroupsKept,
    HandedOver,
    Holdings,
    KernelReady,
    Ranked,
    SharedEnrolment,
    ShareHoldings,
)
from fedgestalt.federation.training.messages import Published, Receipt, Trained, Uploaded
from fedgestalt.messages import Message
from fedgestalt.secagg import Endorsement, KeyOffer, ShareOffer, UnmaskShares
from fedgestalt.similarity.kernel import KernelKey, SealedContributions

TASK_PREFIX: Final = "fgm_"

JOIN, TRAIN, APPLY, PUBLISH = "fgm_join", "fgm_train", "fgm_apply", "fgm_publish"
KEYS, SHARES, VECTOR = "fgm_keys", "fgm_shares", "fgm_vector"
SURVIVORS, UNMASK = "fgm_survivors", "fgm_unmask"
START, HOLDINGS = "fgm_match_start", "fgm_kernel_holdings"
KERNEL_KEYS, SEAL, AGREE = "fgm_kernel_keys", "fgm_kernel_seal", "fgm_kernel_agree"
HAND_OVER, SEND_ENSEMBLE = "fgm_kernel_hand_over", "fgm_ensemble_send"
TAKE_OVER = "fgm_kernel_take_over"
ENROL, CONSIDER, RANK = "fgm_enrol", "fgm_consider", "fgm_rank"
SHARES_HELD, ENROL_SHARES, COMPUTE = "fgm_shares_held", "fgm_enrol_shares", "fgm_compute"
RANK_SHARES = "fgm_rank_shares"
CASES, GROUPS = "fgm_cases", "fgm_groups"

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
    HOLDINGS: Holdings,
    SEAL: SealedContributions,
    AGREE: KernelReady,
    HAND_OVER: HandedOver,
    SEND_ENSEMBLE: EnsembleSent,
    TAKE_OVER: KernelReady,
    ENROL: Enrolment,
    CONSIDER: Consent,
    RANK: Ranked,
    SHARES_HELD: ShareHoldings,
    ENROL_SHARES: SharedEnrolment,
    COMPUTE: Computed,
    RANK_SHARES: Ranked,
    CASES: Cases,
    GROUPS: GroupsKept,
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
    HOLDINGS: "the sites say which kernels they hold",
    SEAL: "the sites agree on a kernel",
    AGREE: "the sites agree on a kernel",
    HAND_OVER: "a site passes its kernel on",
    SEND_ENSEMBLE: "a site passes the ensemble on",
    TAKE_OVER: "the newcomers take kernel and ensemble over",
    ENROL: "the sites encode their patients",
    CONSIDER: "the sites consider what is asked and withdrawn",
    RANK: "the sites rank their patients",
    SHARES_HELD: "the computing sites say what they hold",
    ENROL_SHARES: "the sites encode their patients",
    COMPUTE: "two sites compute on shares",
    RANK_SHARES: "the sites rank their patients",
    CASES: "the sites encode their unsolved cases",
    GROUPS: "the sites keep the groups that hold a case of theirs",
}
"""What each task is about, for people."""
