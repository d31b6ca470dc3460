"""The FLARE Aggregator over :mod:`fedgestalt.secagg`."""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator

from fedgestalt.errors import ServerError
from fedgestalt.federation.job.wire import body
from fedgestalt.messages import from_site
from fedgestalt.secagg import (
    Aggregate,
    KeyOffer,
    KeyRoster,
    MaskedVector,
    ServerSession,
    SessionFacts,
)


class ZeroSumMaskAggregator(Aggregator):
    """Sums masked vectors; sees no update of a single site.

    :meth:`begin` opens a round, :meth:`accept_key` and :meth:`accept_vector` take what sites send,
    :meth:`mean` gives the weighted mean once all have sent. ``accept`` and ``aggregate`` are the
    same for callers that know FLARE's interface only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._session: ServerSession | None = None

    def begin(self, facts: SessionFacts) -> None:
        """Open a round; whatever the last one held is dropped."""
        self._session = ServerSession(facts)

    @property
    def session(self) -> ServerSession:
        """The open round.

        Raises:
            ServerError: no round is open.
        """
        if self._session is None:
            raise ServerError("no round is open", where="aggregator")
        return self._session

    def accept_key(self, site: str, fields: object) -> None:
        """Take a site's mask key; raises PeerError as :class:`ServerSession` does."""
        self.session.accept_key(site, KeyOffer.from_fields(fields, from_site(site)))

    def key_roster(self) -> KeyRoster:
        """Everybody's keys."""
        return self.session.key_roster()

    def accept_vector(self, site: str, fields: object) -> None:
        """Take a site's masked vector; raises PeerError as :class:`ServerSession` does."""
        self.session.accept_vector(site, MaskedVector.from_fields(fields, from_site(site)))

    def mean(self) -> Aggregate:
        """Weighted mean, total weight and clip counts."""
        return self.session.aggregate()

    # FLARE's interface

    def reset(self, fl_ctx: FLContext) -> None:  # noqa: ARG002
        """Close the round."""
        self._session = None

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take a masked vector from the peer of ``fl_ctx``."""
        self.accept_vector(fl_ctx.get_peer_context().get_identity_name(), body(shareable))
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:  # noqa: ARG002
        """The mean update as a Shareable with one entry per tensor."""
        return Shareable(self.mean().mean)
