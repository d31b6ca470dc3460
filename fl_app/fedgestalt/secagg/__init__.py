"""Zero-sum-mask secure aggregation: pure state machines, no I/O, no clock, no framework.

The rules of a session, in the order of its messages:

- **Facts.** Every party computes the session digest itself, from job, round, attempt, global model,
  number plan, roster with certificate fingerprints, threshold, recipient and cipher. Whoever was
  told something else cannot go on with the others.
- **Policy.** A site takes part with no fewer sites, survivors and agreement than it asks for.
- **Keys.** Two hybrid key pairs per site and session (X25519 and ML-KEM-768), one for masks, one
  for boxes, fresh from the operating system and signed by the site's certificate.
- **Shares.** Each site deals Shamir shares of its self seed and of its mask key's root to all
  sites, in sealed boxes. It signs a header that commits to every share, secret and box. A site that
  is missing up to here costs a new session with fresh keys, nothing else.
- **Vector.** A site adds a stream of its self seed, and one per pair: of two sites the first adds,
  the second subtracts it. All streams are bound to all headers. One session masks one vector.
- **Survivors.** The server names the sites whose vectors arrived, no fewer than the threshold. A
  site signs one such set per session, ever.
- **Unmask.** A site that sees a threshold of signatures on the same set gives its share of the self
  seed of each survivor, or of the root of each other site; never both of one.
- **Sum.** The server rebuilds these from any threshold of answers, compares them with the
  commitments, and takes the streams off. Fewer answers open nothing.
- Where only the sites shall learn the sum, each adds one more stream, from a secret that the first
  site dealt in its boxes, and the sites take these streams off.

What this does not protect is written in ``docs/explanation/secure-aggregation.md``. Modules:
:mod:`.facts` and :mod:`.messages`, :mod:`.site` and :mod:`.server` (the two state machines),
:mod:`.binding` (what is bound to what), :mod:`.keys`, :mod:`.shamir`, :mod:`.stream`, and
:mod:`.plan` (the arithmetic). Source: Bonawitz et al. 2017, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning".
"""

from fedgestalt.secagg.facts import (
    MINIMUM_SITES,
    Recipient,
    SessionFacts,
    SitePolicy,
    ThreatModel,
)
from fedgestalt.secagg.messages import (
    Endorsement,
    Endorsements,
    KeyList,
    KeyOffer,
    ShareDelivery,
    ShareHeader,
    ShareOffer,
    Survivors,
    UnmaskShares,
)
from fedgestalt.secagg.plan import Aggregate, CountPlan, NumberPlan, TensorPlan, blocks_of
from fedgestalt.secagg.server import ServerSession
from fedgestalt.secagg.site import SiteSession
from fedgestalt.secagg.stream import AES, CHACHA20, Vector, Words

__all__ = [
    "AES",
    "CHACHA20",
    "MINIMUM_SITES",
    "Aggregate",
    "CountPlan",
    "Endorsement",
    "Endorsements",
    "KeyList",
    "KeyOffer",
    "NumberPlan",
    "Recipient",
    "ServerSession",
    "SessionFacts",
    "ShareDelivery",
    "ShareHeader",
    "ShareOffer",
    "SitePolicy",
    "SiteSession",
    "Survivors",
    "TensorPlan",
    "ThreatModel",
    "UnmaskShares",
    "Vector",
    "Words",
    "blocks_of",
]
