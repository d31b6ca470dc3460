"""Certificates that the server accepts no longer, though they have not expired.

FLARE 2.9 knows no revocation list. It can disable a *name*, which is the right thing for a site
that has left; a stolen certificate, whose name goes on with a new one, needs more:

- a connection opened with a listed certificate is ended before a byte of it is read. So nothing
  that such a certificate once obtained, a token or a session, is of use either;
- a listed certificate proves no identity over any other connection: not when a site registers, not
  when an administrator logs in;
- connections that stand when their certificate gets listed are ended, and their sites logged out,
  at the next heartbeat of any site (every ten seconds);
- the list is read anew every time; while it cannot be read, nobody new is let in;
- a server where this cannot be enforced does not start.

The hook is the listener's connection monitor, a part of FLARE's transport. FLARE's event for
registrations (``CLIENT_REGISTER_RECEIVED``) shows no certificate, and comes too late: FLARE takes a
site back by the token in its heartbeat, without another registration, and a new connection in a
site's name replaces the one before.

The transport layer itself, mutual TLS, still completes its handshake with a revoked certificate.
Only the server reads the list; where TLS ends at a proxy in front of it, only identities are
checked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.fuel.f3.cellnet.defs import (
    CellChannel,
    CellChannelTopic,
    IdentityChallengeKey,
    MessageHeaderKey,
    ReturnCode,
)
from nvflare.fuel.f3.cellnet.identity import get_cert_common_name, is_mtls_connection
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.connection import Connection, ConnState
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.drivers.driver import ConnMonitor
from nvflare.fuel.f3.message import Message
from nvflare.tool.cert.fingerprint import cert_fingerprint_sha256, normalize_sha256_fingerprint

from fedgestalt.errors import ConfigError, PeerError

LIST_FILE: Final = "revoked.txt"
_COMMENT = "#"
_EVERYTHING = "*"
_LOGIN_CERTIFICATE = "cert"
"""The header of an administrator's login."""


def read_revoked(path: Path) -> frozenset[str]:
    """Read fingerprints: one a line, as openssl prints them; what follows a ``#`` is a remark.

    Raises:
        ConfigError: the file cannot be read, or a line is no SHA-256 fingerprint.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            "the list of revoked certificates cannot be read",
            where=str(path),
            remedy="restore it; an empty file revokes nothing",
        ) from None
    revoked = set()
    for number, line in enumerate(lines, 1):
        entry = line.partition(_COMMENT)[0].strip()
        fingerprint = normalize_sha256_fingerprint(entry)
        if entry and not fingerprint:
            raise ConfigError(
                f"line {number} is no SHA-256 fingerprint of a certificate",
                where=str(path),
                remedy="write what `openssl x509 -fingerprint -sha256 -noout -in CRT` prints",
            )
        revoked |= {fingerprint} - {""}
    return frozenset(revoked)


@dataclass(frozen=True)
class Presented:
    """A certificate that somebody showed: its fingerprint and the name it is made out to."""

    fingerprint: str
    name: str

    @classmethod
    def from_pem(cls, pem: bytes) -> Presented:
        """The first certificate of a chain; ValueError if there is none.

        The issuer's signature does not cover the octet before it, which counts unused bits: with
        another one there, the same certificate would have a fingerprint that nobody has listed.
        """
        certificate = x509.load_pem_x509_certificates(pem)[0]
        if not certificate.public_bytes(Encoding.DER).endswith(b"\0" + certificate.signature):
            raise ValueError("the certificate is not written as its issuer wrote it")
        name = get_cert_common_name(certificate) or ""
        return cls(cert_fingerprint_sha256(certificate), name)


class RevokedCertificates(FLComponent):
    """A component of the server's resources; see the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._path = Path(LIST_FILE)
        self._server: Any = None
        self._doors: list[Door] = []
        self._ended: set[str] = set()
        self._lock, self._sweep = threading.Lock(), threading.Lock()
        self.register_event_handler(EventType.SYSTEM_BOOTSTRAP, self._guard_doors)
        # after FLARE has dealt with the heartbeat: before, it would take the site back by its token
        self.register_event_handler(EventType.CLIENT_HEARTBEAT_PROCESSED, self._end_revoked)

    def check(self, shown: Presented) -> None:
        """Raise PeerError if a certificate is revoked, ConfigError if nobody can tell."""
        if shown.fingerprint in read_revoked(self._path):
            with self._lock:
                self._ended.add(shown.name)
            raise PeerError(
                f"its certificate {shown.fingerprint} is revoked",
                site=shown.name,
                remedy="it needs a new one from the consortium's lead",
            )

    def _guard_doors(self, event: str, fl_ctx: FLContext) -> None:
        """Watch the server's listeners, before it accepts a site."""
        self._server = fl_ctx.get_prop(FLContextKey.SITE_OBJ)
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        self._path = Path(workspace.get_site_config_dir()) / LIST_FILE
        try:
            read_revoked(self._path)
            core_cell = self._server.cell.core_cell
            manager = core_cell.communicator.conn_manager
            self._doors = [
                Door(connector.driver, manager, self.check, self._refused)
                for connector in manager.connectors.values()
                if connector.mode == Mode.PASSIVE and is_mtls_connection(connector.params)
            ]
            core_cell.add_incoming_request_filter(_EVERYTHING, _EVERYTHING, self.check_identity)
        except (ConfigError, AttributeError) as error:
            raise UnsafeComponentError(
                f"revoked certificates cannot be refused: {error}"
            ) from error
        if not self._doors:
            message = "revoked certificates cannot be refused: no listener asks for certificates"
            raise UnsafeComponentError(message)
        self._end_revoked(event, fl_ctx)

    def check_identity(self, message: Message) -> Message | None:
        """Refuse a message that proves an identity by a revoked certificate; FLARE's filter."""
        channel = message.get_header(MessageHeaderKey.CHANNEL)
        pem: Any = None
        if channel == CellChannel.HCI:
            pem = message.get_header(_LOGIN_CERTIFICATE)
        elif channel == CellChannel.SERVER_MAIN:
            registers = message.get_header(MessageHeaderKey.TOPIC) == CellChannelTopic.Register
            shown = message.payload if registers else None
            pem = shown.get(IdentityChallengeKey.CERT) if isinstance(shown, dict) else None
        if not pem:
            return None
        try:
            self.check(Presented.from_pem(pem))
        except (PeerError, ConfigError, ValueError, TypeError) as error:
            self._refused(error)
            return make_reply(ReturnCode.UNAUTHENTICATED, "this certificate is not accepted")
        return None

    def _end_revoked(self, _event: str, _fl_ctx: FLContext) -> None:
        """End connections whose certificate has been listed since, and log out their sites."""
        if not self._sweep.acquire(blocking=False):
            return  # the heartbeat of another site is at it
        try:
            for door in self._doors:
                door.end_refused()
            with self._lock:
                ended = self._ended - {name for door in self._doors for name in door.inside()}
            for token, client in list(self._server.client_manager.get_clients().items()):
                if client.name in ended:
                    self._server.logout_client(token)
        finally:
            self._sweep.release()

    def _refused(self, error: Exception) -> None:
        self.logger.warning("refused: %s", error)


class Door(ConnMonitor):
    """Stands between a listener and FLARE's connection manager.

    Args:
        driver: the listener; from now on it reports to this.
        manager: FLARE's connection manager, to which accepted connections go on.
        check: raises PeerError or ConfigError for a certificate that may not come in.
        refused: told of each refusal.
    """

    def __init__(
        self,
        driver: Any,
        manager: Any,
        check: Callable[[Presented], None],
        refused: Callable[[Exception], None],
    ) -> None:
        self._manager, self._check, self._refused = manager, check, refused
        self._inside: dict[str, tuple[Connection, Presented]] = {}
        self._outside: set[str] = set()
        self._lock = threading.Lock()
        driver.register_conn_monitor(self)
        with driver.conn_lock:
            early = list(driver.connections.values())
        for connection in early:
            try:
                self._let_in(connection)
            except CommError:
                connection.close()

    def state_change(self, connection: Connection) -> None:
        """FLARE's call: a connection was opened (raises CommError to refuse it) or has closed."""
        if connection.state == ConnState.CONNECTED:
            try:
                self._let_in(connection)
            except CommError:
                with self._lock:
                    self._outside.add(connection.name)
                raise
        elif connection.state == ConnState.CLOSED:
            with self._lock:
                self._inside.pop(connection.name, None)
                if connection.name in self._outside:
                    self._outside.remove(connection.name)
                    return
        self._manager.state_change(connection)

    def inside(self) -> set[str]:
        """The names on the certificates of all open connections."""
        with self._lock:
            return {shown.name for _, shown in self._inside.values()}

    def end_refused(self) -> None:
        """End the connections whose certificate would not be let in any more."""
        with self._lock:
            inside = list(self._inside.values())
        for connection, shown in inside:
            try:
                self._check(shown)
            except PeerError as error:
                self._refused(error)
                connection.close()
                with self._lock:
                    self._inside.pop(connection.name, None)
            except ConfigError as error:
                self._refused(error)
                return

    def _let_in(self, connection: Connection) -> None:
        try:
            shown = _certificate(connection)
            self._check(shown)
        except (PeerError, ConfigError, ValueError) as error:
            self._refused(error)
            raise CommError(CommError.NOT_READY, "not let in") from None
        with self._lock:
            self._inside[connection.name] = connection, shown


def _certificate(connection: Connection) -> Presented:
    """The TLS certificate of the peer of a gRPC connection; ValueError if there is none."""
    context = getattr(connection, "context", None)
    shown = context.auth_context().get("x509_pem_cert") if context else None
    if not shown:
        raise ValueError(f"connection {connection.name} shows no certificate")
    return Presented.from_pem(shown[0])
