"""Zero-sum-mask secure aggregation: pure state machines, no I/O, no clock, no framework.

Read :mod:`fedgestalt.secagg.session` for the rules of the protocol, :mod:`.plan` for the
arithmetic and :mod:`.stream` for the masks. Source: Bonawitz et al. 2017, "Practical Secure
Aggregation for Privacy-Preserving Machine Learning", without its recovery phase so far.
"""

from fedgestalt.secagg.plan import Aggregate, NumberPlan, TensorPlan
from fedgestalt.secagg.session import (
    MINIMUM_SITES,
    KeyOffer,
    KeyRoster,
    MaskedVector,
    ServerSession,
    SessionFacts,
    SiteSession,
)

__all__ = [
    "MINIMUM_SITES",
    "Aggregate",
    "KeyOffer",
    "KeyRoster",
    "MaskedVector",
    "NumberPlan",
    "ServerSession",
    "SessionFacts",
    "SiteSession",
    "TensorPlan",
]
