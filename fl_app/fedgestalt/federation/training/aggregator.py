"""The FLARE Aggregator over :mod:`fedgestalt.secagg`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator

from fedgestalt.errors import ConfigError, PeerError, ServerError
from fedgestalt.federation.job.wire import body
from fedgestalt.federation.training.rounds import Aggregation
from fedgestalt.keys import Verifier
from fedgestalt.messages import from_site
from fedgestalt.secagg import (
    Endorsement,
    KeyOffer,
    ServerSession,
    SessionFacts,
    ShareOffer,
    UnmaskShares,
)


class ZeroSumMaskAggregator(Aggregator):
    """Sums masked vectors; sees no update of a single site.

    The workflow opens a session with :meth:`begin`, hands over what the sites send, and reads the
    sum from :attr:`session`.

    Args:
        scope: ``all``, or ``encoder`` to keep classifiers at the sites.
        rule: ``mean``, or ``class-weighted``.
        reveal_aggregate_to: ``server``, or ``sites`` to keep the sum from the server as well.
        threat_model: ``malicious``, or ``honest-but-curious`` to lose more sites.
        server_optimiser: what makes a step of a mean update, ``sgd`` or ``adam``.
        server_learning_rate: of the optimiser, positive.
        server_momentum: of the model's steps, 0 to below 1.
    """

    def __init__(
        self,
        scope: str = "all",
        rule: str = "mean",
        reveal_aggregate_to: str = "server",
        threat_model: str = "malicious",
        server_optimiser: str = "sgd",
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.0,
    ) -> None:
        super().__init__()
        self._said: dict[str, Any] = {
            "scope": scope,
            "rule": rule,
            "recipient": reveal_aggregate_to,
            "threat_model": threat_model,
            "optimiser": server_optimiser,
            "learning_rate": float(server_learning_rate),
            "momentum": float(server_momentum),
        }
        self._session: ServerSession | None = None

    def aggregation(self, max_weight: int) -> Aggregation:
        """The settings of the job.

        Raises:
            ConfigError: an argument is unknown.
        """
        try:
            return Aggregation.named(**self._said, max_weight=max_weight)
        except ServerError as error:
            raise ConfigError(error.what, where="arguments of the aggregator") from None

    def begin(self, facts: SessionFacts, peers: Mapping[str, Verifier]) -> ServerSession:
        """Open a session; whatever the last one held is dropped."""
        self._session = None
        self._session = ServerSession(facts, peers)
        return self._session

    @property
    def session(self) -> ServerSession:
        """The open session.

        Raises:
            ServerError: none is open.
        """
        if self._session is None:
            raise ServerError("no session is open", where="aggregator")
        return self._session

    def take(self, site: str, fields: object) -> None:
        """Take any of a site's messages of the session, by its schema.

        Raises:
            PeerError: it is no such message, or the session refuses it.
        """
        fault = from_site(site)
        said = fields.get("schema") if isinstance(fields, Mapping) else None
        match said if isinstance(said, str) else None:
            case KeyOffer.schema:
                self.session.accept_keys(site, KeyOffer.from_fields(fields, fault))
            case ShareOffer.schema:
                self.session.accept_shares(site, ShareOffer.from_fields(fields, fault))
            case Endorsement.schema:
                self.session.accept_endorsement(site, Endorsement.from_fields(fields, fault))
            case UnmaskShares.schema:
                self.session.accept_unmask(site, UnmaskShares.from_fields(fields, fault))
            case _:
                raise PeerError("it sent no message of secure aggregation", site=site)

    # FLARE's interface

    def reset(self, fl_ctx: FLContext) -> None:  # noqa: ARG002
        """Close the session."""
        self._session = None

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take a message from the peer of ``fl_ctx``."""
        self.take(fl_ctx.get_peer_context().get_identity_name(), body(shareable))
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:  # noqa: ARG002
        """Open the sum; a Shareable with the mean update, one entry per tensor."""
        session = self.session
        return Shareable(dict(session.facts.plan.decode(session.total()).mean))
